"""A run on several processes gives the numbers of a run on one."""

from __future__ import annotations

import os

import pytest
import torch

from probe.config.parsing import parse_config
from probe.distributed.ranks import Ranks
from probe.module import EntropyProbe
from probe.runner import ProbeRunner, TrainerSection
from probe.scoring.forward_mode import scores_and_tangents
from probe.scoring.gradients import token_gradients
from probe.scoring.score import score_tokens
from tests.support.little_memory import backward, without_memory_for
from tests.support.trainings import in_processes

NOT_COMPARED = {"processes", "timing", "throughput", "timestamp", "results_path"}
"""What no two runs have in common."""
ROUNDING = ("sampling_scoring_gap", "derivative_agreement")
"""What is nothing but rounding: of the sampler's cached decoding, and of two ways to one derivative."""


def sections(cache, folder, ranks, **changes):
    """The configuration of a small run of the demo policy."""
    os.environ["ENTROPY_PROBE_CACHE"] = str(cache)
    settings = {
        "checkpoint": {"checkpoint_path": "demo"},
        "batch_config": {"dataset_name": "arithmetic", "B_E": 48, "B_U": 8, "G": 4},
        "generation": {"max_new_tokens": 24, "batch_size": 16},
        "memory_config": {"tokens_per_microbatch": 384, "threads": 1},
        "detailed_logging": {"enabled": False},
        "trainer": {"accelerator": "cpu", "devices": ranks, "logger": False},
    }
    for section, values in changes.items():
        settings[section] = {**settings.get(section, {}), **values}
    return settings


def probe_run(folder, cache, ranks, changes, spoil=None):
    """One run, from its sections to its mapping; `spoil` is given the module before."""
    torch.set_num_threads(1)
    resolved = parse_config(sections(cache, folder, ranks, **changes), TrainerSection)
    runner = ProbeRunner(**resolved.trainer)
    module = EntropyProbe(resolved.probe, resolved.seed, resolved.given)
    if spoil is not None:
        spoil(runner, module)
    from probe.callbacks.defaults import measuring_callbacks

    result = runner.run(module, measuring_callbacks(module.config))
    tokens = runner.state.drawn.E.completion_ids, runner.state.drawn.U.completion_ids
    before = {name: p.clone() for name, p in module.policy.parameters.items()}
    return {
        "values": dict(result.values),
        "tokens": tokens,
        "parameters": before,
        "rank": runner.ranks.rank,
        "sent": runner.ranks.sent,
        "traffic": dict(runner.state.traffic),
    }


def differences(one, other, small, at=""):
    """Where two mappings differ, by how much relative to the first, or to what is called small."""
    if isinstance(one, dict):
        assert set(one) == set(other), at
        for key in one:
            if key not in NOT_COMPARED:
                yield from differences(one[key], other[key], small, f"{at}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), at
        for k, (x, y) in enumerate(zip(one, other, strict=True)):
            yield from differences(x, y, small, f"{at}[{k}]")
    elif isinstance(one, float) and isinstance(other, float):
        if one != other and not (one != one and other != other):
            yield at, abs(one - other) / max(abs(one), small, 1e-300)
    elif one != other:
        yield at, float("inf")


CONFIGURATIONS = {
    "defaults": {},
    "float64": {"checkpoint": {"dtype": "float64"}},
    "differences, snis": {
        "probe_rework": {"derivative_mode": "finite_difference"},
        "importance": {"is_mode": "snis", "noise_floor": True},
    },
    "attribution": {
        "checkpoint": {"dtype": "float64"},
        "attribution": {"enabled": True, "blocks": 3, "states": 4, "responses": 2},
        "whatif": {"enabled": True, "exact": ["positive_advantage"], "target_deltaH": -1e-3},
    },
    "resample": {"importance": {"is_mode": "resample"}, "batch_config": {"B_E": 24}},
}


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_numbers_and_tokens_do_not_depend_on_the_number_of_ranks(tmp_path, demo_cache, kind):
    changes = CONFIGURATIONS[kind]
    (alone,) = in_processes(1, probe_run, tmp_path, demo_cache, 1, changes)
    for ranks in (2, 4):
        found = in_processes(ranks, probe_run, tmp_path, demo_cache, ranks, changes, seconds=120)
        assert [one["rank"] for one in found] == list(range(ranks))
        for one in found:
            assert all(torch.equal(a, b) for a, b in zip(alone["tokens"], one["tokens"], strict=True))
            # only sums of gradients are made in another order, and those in float64; where one is rounded to another
            # float32 all the same, numbers far below the changes of entropy differ by their rounding
            limit, small = {"float64": (1e-10, 0.0), "attribution": (1e-6, 1e-6)}.get(kind, (1e-6, 1e-3))
            off = [
                (at, by)
                for at, by in differences(alone["values"], one["values"], small)
                if by > limit and ".trainer" not in at and not at.endswith(ROUNDING)
            ]
            assert not off
            assert one["traffic"] == alone["traffic"] or kind == "resample"
            assert one["sent"] > 0


def on_rank(rank, act):
    """Do something to the model of one rank when E and U are there."""
    from probe.callbacks import ProbeCallback

    class Act(ProbeCallback):
        def on_entropy_gradient_start(self, runner, module):
            if runner.ranks.rank == rank:
                act(module)

    def spoil(runner, module):
        runner.extra_callbacks.append(Act())

    return spoil


def small_memory(module):
    """No memory for a backward of more than three sequences."""
    layer = module.model.get_input_embeddings()
    without_memory_for(layer, lambda output: torch.is_grad_enabled() and output.shape[0] > 3)


def no_memory(module):
    """No memory for any backward."""
    layers = [m for m in module.model.modules() if type(m).__name__ == "Qwen2DecoderLayer"]
    without_memory_for(layers[0], lambda output: backward(output))


def probe_with(folder, cache, ranks, act):
    return probe_run(folder, cache, ranks, {}, on_rank(ranks - 1, act))


def test_what_one_rank_has_no_memory_for_all_do_in_smaller_parts(tmp_path, demo_cache):
    (alone,) = in_processes(1, probe_run, tmp_path, demo_cache, 1, {})
    for one in in_processes(2, probe_with, tmp_path, demo_cache, 2, small_memory, seconds=120):
        for key in ("deltaH1", "deltaH_true", "deltaH1_tok", "deltaH_true_tok"):
            assert one["values"][key] == pytest.approx(alone["values"][key], rel=1e-4)


def error_of(folder, cache, ranks, act):
    try:
        probe_with(folder, cache, ranks, act)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def test_an_error_of_one_rank_ends_the_run_on_all(tmp_path, demo_cache):
    texts = in_processes(2, error_of, tmp_path, demo_cache, 2, no_memory)
    assert texts[0] == texts[1]
    assert "OutOfMemory" in texts[0] or "MemoryExhausted" in texts[0]


def bytes_sent(folder, cache):
    """Bytes that this rank hands to the network in some passes, and what docs/scaling.md says of them."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    resolved = parse_config(sections(cache, folder, 1, batch_config={"B_E": 96}), TrainerSection)
    module = EntropyProbe(resolved.probe, resolved.seed, resolved.given)
    module.load(torch.device("cpu"))
    module.ranks = ranks = Ranks.of_job()
    sample = module.sample()
    basis = sample.controls.memory.basis
    policy, found = module.policy, {}

    def sent_in(what, run, per_token, besides=0):
        before = ranks.sent
        run()
        own = sum(int(sample.E.lengths[part].sum()) for part in policy.own_parts(sample.E))
        found[what] = ranks.sent - before, per_token * own + besides

    parameters = sum(p.numel() for p in policy.parameters.values())
    sent_in("score", lambda: score_tokens(policy, sample.E), 16)
    sent_in("score, with control variates", lambda: score_tokens(policy, sample.E, basis=basis), 128)
    step = {name: torch.ones_like(p) for name, p in policy.parameters.items()}
    sent_in("forward mode", lambda: scores_and_tangents(policy, sample.E, step, basis), 224)
    sent_in("gradient", lambda: entropy_of(policy, sample.E), 16, 8 * parameters)
    return found


def entropy_of(policy, batch):
    """A gradient of one objective."""
    return token_gradients(
        policy, batch, lambda i, t, l, h: (torch.zeros_like(l)[None], torch.ones_like(h)[None]), 1
    )


def test_as_many_bytes_cross_the_network_as_the_documentation_says(tmp_path, demo_cache):
    for found in in_processes(2, bytes_sent, tmp_path, demo_cache):
        for what, (sent, said) in found.items():
            assert said <= sent <= 1.05 * said + 10_000, (
                what
            )  # beside the numbers there are rows, and how they are packed

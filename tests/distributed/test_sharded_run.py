"""A run whose processes hold parts of the weights (FSDP2) gives the numbers of a run on one that holds them all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule, fully_shard

from probe.config.batches import GenerationConfig
from probe.config.parsing import parse_config
from probe.data.batch import PromptExample
from probe.distributed.lockstep import lockstep
from probe.distributed.ranks import Ranks
from probe.distributed.sharding import by_blocks, shard
from probe.errors.exceptions import ConfigError, RanksApartError
from probe.logs.write import log_of
from probe.module import EntropyProbe
from probe.parameters import inner_product, norm
from probe.rollouts.sampling import sample_rollouts
from probe.runner import ProbeRunner, TrainerSection
from probe.scoring.gradients import token_gradients
from probe.scoring.policy import Policy
from probe.scoring.score import score_tokens
from probe.shards import first_nonfinite, from_part, nonzero, part, part_like, total, whole, why_not
from tests.distributed.test_shared_run import ROUNDING, differences
from tests.support.by_accelerate import sharded_by_accelerate
from tests.support.enumerable import ragged_batch
from tests.support.helpers import char_tokenizer
from tests.support.tiny_models import adamw as plain_adamw
from tests.support.tiny_models import (
    add_lora,
    lora_checkpoint,
    save_base,
    save_checkpoint,
    take_steps,
    tiny_model,
)
from tests.support.trainings import bits, in_processes

BOTH = {"probe_rework": {"derivative_mode": "reverse", "kl_coef": 0.0}}


def sections(folder, checkpoint, ranks, changes):
    """A small run in float64, in which another order of sums shows in the last digits only."""
    settings = {
        "checkpoint": {"checkpoint_path": str(checkpoint), "dtype": "float64"},
        "batch_config": {"dataset_name": "arithmetic", "B_E": 12, "B_U": 4, "G": 3},
        "generation": {"max_new_tokens": 6, "batch_size": 8},
        "memory_config": {"tokens_per_microbatch": 80, "threads": 1},
        "detailed_logging": {"level": "debug", "output_directory": str(folder / "logs")},
        "trainer": {"accelerator": "cpu", "devices": ranks, "logger": False},
    }
    for section, values in changes.items():
        settings[section] = {**settings.get(section, {}), **values}
    return settings


def run(folder, checkpoint, ranks, changes):
    """One run: its mapping, its log, and whether weights and optimizer are bitwise what they were."""
    from probe.callbacks.defaults import measuring_callbacks

    torch.set_num_threads(1)
    # prompts that are not shared, as before the backward of a sharded model: norms of layers round to float32
    import probe.scoring.policy

    probe.scoring.policy.worth_sharing = lambda batch: False
    resolved = parse_config(sections(folder, checkpoint, ranks, changes), TrainerSection)
    runner = ProbeRunner(**resolved.trainer)
    module = EntropyProbe(resolved.probe, resolved.seed, resolved.given)
    kept = []
    sample = module.sample

    def before_sampling(progress):
        kept.append(state_of(module))
        return sample(progress)

    module.sample = before_sampling
    result = runner.run(module, measuring_callbacks(module.config))
    log = log_of(result, runner.state, module.config.detailed_logging)
    untouched = kept[0] == state_of(module)
    held = sum(part(p).numel() for p in module.policy.model.parameters())
    return dict(result.values), {k: log[k] for k in ("parameters", "raw")}, untouched, held


def state_of(module):
    """The bits of this process's weights and moments."""
    optimizer = module.loaded_optimizer.optimizer
    moments = [
        {key: part(x) for key, x in optimizer.state[p].items()}
        for g in optimizer.param_groups
        for p in g["params"]
    ]
    return bits([{n: part(p) for n, p in module.policy.model.named_parameters()}, moments])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A LoRA and a full checkpoint whose sizes three processes cannot share evenly."""
    folder = tmp_path_factory.mktemp("checkpoints")
    base = save_base(folder / "base", hidden=20, num_attention_heads=2, num_key_value_heads=1)
    lora, *_ = lora_checkpoint(folder / "lora", base, steps=3)
    model = tiny_model(hidden=20, num_attention_heads=2, num_key_value_heads=1, tied=False)
    optimizer = plain_adamw(model)
    take_steps(model, optimizer)
    return {"lora": lora, "full": save_checkpoint(folder / "full", model, optimizer)}


KINDS = {
    "lora, reverse": ("lora", 2, {"probe_rework": {"derivative_mode": "reverse", "kl_coef": 0.02}}),
    "lora, auto": ("lora", 3, {}),
    "full, differences": ("full", 2, {"probe_rework": {"derivative_mode": "finite_difference"}}),
    "lora, attribution": (
        "lora",
        2,
        {
            "attribution": {"enabled": True, "blocks": 2, "states": 3, "responses": 2},
            "whatif": {"enabled": True, "interventions": ["steer"], "exact": ["steer"]},
        },
    ),
    "full, attribution": (
        "full",
        2,
        {"attribution": {"enabled": True, "blocks": 2, "states": 2, "responses": 1}},
    ),
    "full, resample": ("full", 3, {"importance": {"is_mode": "resample", "noise_floor": True}}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_a_run_on_one_process(tmp_path, checkpoints, kind):
    name, ranks, changes = KINDS[kind]
    own = changes.get("probe_rework", {})
    # the way that is taken where there is no forward mode
    plain = {**changes, "probe_rework": {"derivative_mode": "reverse", **own}}
    ((values, log, untouched, all_held),) = in_processes(1, run, tmp_path, checkpoints[name], 1, plain)
    assert untouched
    fsdp = {**changes, "trainer": {"strategy": "fsdp"}}
    found = in_processes(ranks, run, tmp_path, checkpoints[name], ranks, fsdp, seconds=120)
    assert sum(held for *_, held in found) == all_held
    assert max(held for *_, held in found) < 0.6 * all_held
    for sharded, of_log, left, _ in found:
        assert left
        off = [
            (at, by)
            for at, by in differences(values, sharded, 1e-6)
            if by > 1e-7 and ".trainer" not in at and not at.endswith(ROUNDING) and "config" not in at
        ]
        assert not [one for one in off if "derivative" not in one[0]], off
        assert not [x for x in differences(json_of(log), json_of(of_log), 1e-6) if x[1] > 1e-6]


def json_of(log):
    return json.loads(json.dumps(log))


def connected():
    """This process's part of a little world, and its mesh."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    return torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),)), Ranks.of_job()


def sums(folder):
    mesh, ranks = connected()
    generator, found = torch.Generator().manual_seed(0), []
    for shape in ((5, 3), (1, 4), (7,)):
        x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        like = torch.distributed.tensor.distribute_tensor(
            x, mesh, [torch.distributed.tensor.Shard(0)], src_data_rank=None
        )
        other = part_like(y, like)
        only_last = part_like(torch.zeros(shape).index_fill_(0, torch.tensor([shape[0] - 1]), 1.0), like)
        bad = part_like(
            torch.full(shape, 1.0).index_fill_(0, torch.tensor([shape[0] - 1]), float("nan")), like
        )
        found += [
            norm({"x": like, "whole": x}) == pytest.approx(norm({"x": x, "whole": x})),
            inner_product(lambda n, a=like: a, {"n": other}) == pytest.approx(float((x * y).sum())),
            torch.equal(whole(from_part(part(like) * 2, like)), 2 * x),
            nonzero(only_last) and not nonzero(only_last * 0),
            first_nonfinite({"a": only_last, "b": bad}) == "b" and first_nonfinite({"a": like}) is None,
            total([(like, 1.0), (x, 1.0)]) == ranks.size + 1.0,
        ]
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_over_parts_are_sums_over_all(tmp_path, ranks):
    assert all(ok for found in in_processes(ranks, sums, tmp_path) for ok in found)


def sharded_policy(lora=True, tied=True):
    mesh, ranks = connected()
    torch.manual_seed(0)
    model = tiny_model(layers=2, tied=tied)
    model = (add_lora(model, lora_dropout=0.0) if lora else model).eval().double()
    plain = Policy(model, microbatch_size=2)
    batch = ragged_batch()
    return mesh, ranks, model, plain, batch


def weights(i, t, l, h):
    return torch.stack([h, l]), torch.stack([torch.ones_like(h), 0 * h])


def in_two_groups(model, mesh):
    """Parts within each half of the processes, which the other half has too (HSDP)."""
    size = mesh.size() // 2
    own = torch.distributed.init_device_mesh("cpu", (2, size), mesh_dim_names=("replicate", "data_parallel"))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=own)
    return fully_shard(model, mesh=own)


def by_layers_alone(model, mesh):
    """Everything is brought together anew for each forward, the root's own weights too."""
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh["data_parallel"], reshard_after_forward=True)
    return fully_shard(model, mesh=mesh["data_parallel"], reshard_after_forward=True)


HOW = {
    "blocks": by_blocks,
    "accelerate": sharded_by_accelerate,
    "two groups": in_two_groups,
    "layers": by_layers_alone,
}


def drawn(policy):
    """Token ids of responses."""
    prompts = [PromptExample(text, {}, i) for i, text in enumerate(("3+4=", "ab", "what?", "7"))]
    settings = GenerationConfig(max_new_tokens=5, batch_size=1)
    return sample_rollouts(policy, char_tokenizer(), prompts, settings, 3)[0].completion_ids


def passes(folder, how, lora, tied):
    """Scores, gradients of two objectives and scores at moved weights, before a policy is sharded and after."""
    _mesh, ranks, model, plain, batch = sharded_policy(lora, tied)
    responses = drawn(plain)
    step = {n: torch.full_like(p, 1e-2) for n, p in plain.parameters.items()}
    grads, scores = token_gradients(plain, batch, weights, 2)
    there = score_tokens(plain.moved(step, 1.0), batch)
    optimizer = torch.optim.AdamW(plain.parameters.values())
    shard(
        model,
        optimizer,
        lambda m: HOW[how](
            m, torch.distributed.init_device_mesh("cpu", (ranks.size,), mesh_dim_names=("data_parallel",))
        ),
    )
    policy = Policy(model, microbatch_size=2, ranks=ranks)
    before = bits({n: part(p) for n, p in model.named_parameters()})
    kept = {n: torch.full_like(p, 7.0) for n, p in policy.parameters.items()}
    for n, p in policy.parameters.items():
        p.grad = kept[n]
    own, of_own = token_gradients(policy, batch, weights, 2)
    direction = {n: part_like(x, policy.parameters[n]) for n, x in step.items()}
    moved = score_tokens(policy.moved(direction, 1.0), batch)
    return {
        "grads": max(float((whole(own[k][n]) - grads[k][n]).abs().max()) for k in range(2) for n in grads[k]),
        "size": max(float(g.abs().max()) for g in grads[0].values()),
        "scores": float((of_own.entropy - scores.entropy).abs().max()),
        "moved": float((moved.entropy - there.entropy).abs().max()),
        "change": float((there.entropy - scores.entropy).abs().max()),
        "responses": torch.equal(responses, drawn(policy)),
        "same": before == bits({n: part(p) for n, p in model.named_parameters()}),
        "kept": all(p.grad is kept[n] for n, p in policy.parameters.items()),
    }


@pytest.mark.parametrize(
    ("how", "ranks", "lora", "tied"),
    [
        ("blocks", 3, False, True),
        ("blocks", 4, True, True),
        ("accelerate", 2, False, True),
        ("accelerate", 2, True, False),
        ("two groups", 4, True, True),
        ("layers", 2, True, False),
    ],
)
def test_passes_of_a_sharded_policy_are_those_of_a_whole_one(tmp_path, how, ranks, lora, tied):
    """Four responses in two microbatches: some processes have none, and keep the others company."""
    for found in in_processes(ranks, passes, tmp_path, how, lora, tied):
        assert found["responses"]
        assert found["grads"] < 1e-6 * found["size"]
        assert found["scores"] < 1e-6
        assert found["moved"] < 1e-6 < found["change"]
        assert found["same"]
        assert found["kept"]


def gathered(folder):
    """Bytes of weights that a scoring brings together on this process, and what docs/scaling.md says of them."""
    _mesh, ranks, model, _plain, batch = sharded_policy(lora=False)
    mesh = torch.distributed.init_device_mesh("cpu", (ranks.size,), mesh_dim_names=("data_parallel",))
    by_blocks(model, mesh)
    policy = Policy(model, microbatch_size=1, ranks=ranks, share_prompts=False)
    score_tokens(policy, batch)
    of_blocks = sum(p.numel() * p.element_size() for p in model.model.layers.parameters())
    of_all = sum(p.numel() * p.element_size() for p in model.parameters())
    # by the newer name where torch has it
    name = next(n for n in ("all_gather_single", "all_gather_into_tensor") if hasattr(torch.distributed, n))
    own, found = getattr(torch.distributed, name), []

    def counted(output_tensor, *args, **kwargs):
        found.append(output_tensor.nbytes)
        return own(output_tensor, *args, **kwargs)

    setattr(torch.distributed, name, counted)
    score_tokens(policy, batch)
    forwards = max(len(part) for part in ranks.gathered("parts", policy.own_parts(batch)))
    assert forwards > 1
    return sum(found), of_all - of_blocks + forwards * of_blocks


def test_as_much_is_brought_together_as_the_documentation_says(tmp_path):
    for found, said in in_processes(2, gathered, tmp_path):
        assert said <= found <= 1.02 * said  # parts are padded


def in_16_bits(folder):
    """How far gradients of tiny weights are from a whole policy's, in float16, whose smallest number is 6e-8."""
    _mesh, ranks, model, _plain, batch = sharded_policy()
    model = model.half()
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data

    def tiny(i, t, l, h):
        return torch.zeros_like(l)[None], torch.full_like(h, 1e-6)[None]

    (own,), _ = token_gradients(Policy(model), batch, tiny, 1)
    by_blocks(
        model, torch.distributed.init_device_mesh("cpu", (ranks.size,), mesh_dim_names=("data_parallel",))
    )
    (found,), _ = token_gradients(Policy(model, ranks=ranks, microbatch_size=2), batch, tiny, 1)
    off = sum(float((whole(found[n]).double() - g.double()).square().sum()) for n, g in own.items())
    return off**0.5 / norm(own)


def test_gradients_in_float16_are_scaled(tmp_path):
    assert max(in_processes(2, in_16_bits, tmp_path)) < 0.03


def without_memory(folder):
    """What each process raises where the last one has no memory after a forward, on the way to a backward."""
    import probe.scoring.gradients

    _mesh, ranks, model, _plain, batch = sharded_policy()
    by_blocks(
        model, torch.distributed.init_device_mesh("cpu", (ranks.size,), mesh_dim_names=("data_parallel",))
    )
    policy = Policy(model, microbatch_size=2, ranks=ranks)

    def too_much(*args):
        raise torch.OutOfMemoryError("out of memory")

    if ranks.rank == ranks.size - 1:
        probe.scoring.gradients._head_gradients = too_much
    try:
        token_gradients(policy, batch, weights, 2)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_a_lack_of_memory_before_a_backward_is_one_on_all(tmp_path):
    assert set(in_processes(2, without_memory, tmp_path)) == {"OutOfMemoryError: out of memory"}


def failing(folder, where):
    """What each process raises where the last one fails: between forwards, or in the middle of one."""
    if where == "within, older torch":
        del FSDPModule.reset_iter_state
    _mesh, ranks, model, _plain, batch = sharded_policy()
    by_blocks(
        model, torch.distributed.init_device_mesh("cpu", (ranks.size,), mesh_dim_names=("data_parallel",))
    )
    policy = Policy(model, microbatch_size=1, ranks=ranks)
    held = bits({n: part(p) for n, p in model.named_parameters()})
    score_tokens(policy, batch)

    def fail(*_):
        raise ValueError("a broken layer")

    if ranks.rank == ranks.size - 1:
        if where == "between":
            import probe.scoring.score

            probe.scoring.score.token_values = fail
        else:
            next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp")).register_forward_pre_hook(
                fail
            )
    direction = {n: torch.ones_like(p) for n, p in policy.parameters.items()}
    try:
        score_tokens(policy.moved(direction, 0.1), batch)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    same = held == bits({n: part(p) for n, p in model.named_parameters()})
    if where != "between":  # the others wait for this process, which ends
        if ranks.rank == ranks.size - 1:
            (Path(folder) / "said").write_text(json.dumps([text, same]))
        os._exit(3)
    return text, same


def test_an_error_between_forwards_is_raised_by_all_and_weights_are_put_back(tmp_path):
    found = in_processes(2, failing, tmp_path, "between")
    assert {text for text, _ in found} == {"ValueError: a broken layer"}
    assert all(same for _, same in found)


@pytest.mark.parametrize("where", ["within", "within, older torch"])
def test_an_error_in_a_forward_says_that_the_others_cannot_go_on(tmp_path, where):
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        in_processes(2, failing, tmp_path, where)
    text, same = json.loads((tmp_path / "said").read_text())
    assert text.startswith("ForwardCutOffError")
    assert "ValueError: a broken layer" in text
    assert same


def refused(folder):
    """What is said of models that cannot be sharded, and of passes that do not fit together."""
    mesh, ranks = connected()
    named = torch.distributed.init_device_mesh("cpu", (ranks.size,), mesh_dim_names=("data_parallel",))
    said = []

    def note(what):
        try:
            what()
        except (ConfigError, RuntimeError) as error:
            said.append(str(error))

    packed = tiny_model()
    packed.model.embed_tokens.extra = torch.nn.Parameter(
        torch.zeros(3, dtype=torch.uint8), requires_grad=False
    )
    optimizer = torch.optim.AdamW(tiny_model().parameters())
    note(lambda: shard(packed, optimizer, lambda m: by_blocks(m, named)))
    note(lambda: shard(tiny_model(), optimizer, lambda m: m))

    def by_sums(model):
        by_blocks(model, named).set_gradient_divide_factor(1.0)
        return model

    summed = tiny_model()
    note(lambda: shard(summed, torch.optim.AdamW(summed.parameters()), by_sums))
    model = fully_shard(tiny_model(), mesh=mesh)
    values = {n: p.detach() for n, p in model.named_parameters()}

    def nested():
        with lockstep(model, ranks), lockstep(model, ranks, values):
            pass

    try:
        nested()
    except RuntimeError as error:
        said.append(str(error))
    parallel = tiny_model()
    parallel.lm_head.weight = torch.nn.Parameter(
        torch.distributed.tensor.distribute_tensor(
            parallel.lm_head.weight.data, mesh, [torch.distributed.tensor.Shard(0)]
        )
    )
    said.append(why_not(parallel))
    with pytest.raises(RanksApartError, match="in one way at a time"), lockstep(model, ranks) as step:
        step.turn(1 + ranks.rank, 0, 0)
    return said


def test_refusals(tmp_path):
    for said in in_processes(2, refused, tmp_path):
        assert "packed in 4 or 8 bits" in said[0]
        assert "found whole weights" in said[1]
        assert "another divide factor" in said[2]
        assert "one inside of another" in said[3]
        assert "tensor parallelism" in said[4]

"""Coverage and verdicts on a policy that derails now and then, beside those on tables of known tails.

The policy is made by the demo's recipe from texts of which some break off after a random word and go on in random
numbers (`probe.demo.recipe`, `derailing`): most of its responses are short and decided, one in some eighty goes on at
high entropy up to the cap.

The update is one real step of the optimizer. No enumeration gives the truth here; a pool of independent responses does,
drawn and scored once and kept in the cache:

    deltaH1      `causal+cv` on the whole pool
    deltaH_true  `per_decision+cv` on the pool, and reweighted backward from as many responses of the new policy,
                 put together by their variances; without weights, from both, as a check
    residual     the same-E difference of `matched` and `snis` on the whole pool

Every E is a part of the pool of its own, as far as it reaches; everything else is as in `benchmarks/coverage.py`.
What is kept belongs to a policy and a step: after a change of sampling, scoring or estimators, give another folder.

    python benchmarks/derailing.py [--responses 200000] [--repetitions 400] [--sizes 64 256 1024] [--cache FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from probe.config.files import read_config_file
from probe.data.batch import PromptExample, RolloutBatch
from probe.demo import DemoRecipe, ensure_demo_checkpoint
from probe.demo.cache import default_cache_dir
from probe.estimators.control_variates import SMALLEST_SAMPLE
from probe.estimators.estimate import Estimate, Estimates
from probe.estimators.ground_truth import change_by, resampled_change
from probe.files.atomic import atomic_write_bytes
from probe.module import EntropyProbe
from probe.phases.sample import drawn_prompts
from probe.rollouts.draw import stream_seed
from probe.rollouts.sampling import sample_rollouts
from probe.scoring.features import FeatureBasis
from probe.scoring.forward_mode import scores_and_tangents
from probe.scoring.score import score_tokens
from probe.scoring.scores import TokenScores, TokenTangents
from probe.snapshot import evaluation_mode, one_thread, parameters_at
from tests.support.coverage import ESTIMATES_HEAD, VERDICTS_HEAD, Coverage
from tests.support.experiment import PREDICTIONS, Drawn, Scored, estimates_of, exact_values, judged
from tests.support.loaded import loaded_probe

RECIPE = DemoRecipe(derailing=0.03)
"""The demo's own, but for 3 % of its texts."""
BLOCK = 10_000
"""Responses that are sampled, scored and kept together."""


@dataclass(frozen=True)
class Update:
    """A policy and one real step of its optimizer.

    Attributes:
        probe: the loaded policy.
        step: `theta_new - theta_old` by parameter name.
        new: `theta_new`.
        basis: features for control variates, of the update batch's tokens.
        derailed: responses of the update batch that the cap ended, and all of them.
    """

    probe: EntropyProbe
    step: Mapping[str, Tensor]
    new: Mapping[str, Tensor]
    basis: FeatureBasis
    derailed: tuple[int, int]

    @property
    def name(self) -> str:
        """Of policy and step, for what is kept about them."""
        digest = hashlib.sha256()
        for values in (self.new, self.step):
            for name, value in values.items():
                digest.update(name.encode() + value.numpy().tobytes())
        return digest.hexdigest()[:12]


def make_update(recipe: DemoRecipe, cache: Path, seed: int = 0, **batches: int) -> Update:
    """Make the policy by its recipe where the cache has none, and take a step as the demo's configuration has it.

    Args:
        recipe: of the policy.
        cache: folder of this recipe.
        seed: of the policy and of the update batch.
        batches: sizes other than those of the demo's configuration.
    """
    config = read_config_file("quickstart")
    sections = {
        "checkpoint": {"checkpoint_path": str(ensure_demo_checkpoint(cache, seed, recipe=recipe))},
        "batch_config": {**config["batch_config"], "B_E": 2, **batches},
        "generation": {"max_new_tokens": recipe.max_new_tokens, "batch_size": 1024},
        "memory_config": {"microbatch_size": 256, "head_chunk_tokens": 4096},
        "probe_rework": {**config["probe_rework"], "control_variates": "on"},
    }
    probe = loaded_probe({**sections, "seed_everything": seed})
    with evaluation_mode(probe):
        sample = probe.sample()
        taken = probe.update(sample)
    assert sample.controls.memory is not None
    derailed = int(sample.U.truncated.sum()), len(sample.U)
    return Update(probe, taken.step, taken.new_parameters, sample.controls.memory.basis, derailed)


# --- the pools -------------------------------------------------------------------------------------------------


def old_block(update: Update, prompts: Sequence[PromptExample], seed: int) -> dict[str, Tensor]:
    """Responses of the policy before the step, with everything that the estimators need, one number per token."""
    policy = update.probe.policy
    batch = _sampled(update.probe, prompts, seed)
    old, first = scores_and_tangents(policy, batch, update.step, update.basis)
    new = score_tokens(policy.at(update.new), batch)
    assert old.state_features is not None
    assert first.expected_features is not None
    of_tokens = {
        "l": old.logprob,
        "h": old.entropy,
        "l_new": new.logprob,
        "h_new": new.entropy,
        "dl": first.logprob,
        "dh": first.entropy,
        "dpsi": first.expected_features,
        "states": old.state_features,
        "psi": update.basis.sampled(batch),
    }
    return _packed(batch, of_tokens)


def new_block(update: Update, prompts: Sequence[PromptExample], seed: int) -> dict[str, Tensor]:
    """Responses of the policy after the step, with scores of both."""
    policy = update.probe.policy
    with parameters_at(policy.parameters, update.new):
        batch = _sampled(update.probe, prompts, seed)
    old, new = score_tokens(policy, batch), score_tokens(policy.at(update.new), batch)
    return _packed(batch, {"l": old.logprob, "h": old.entropy, "l_new": new.logprob, "h_new": new.entropy})


def _sampled(probe: EntropyProbe, prompts: Sequence[PromptExample], seed: int) -> RolloutBatch:
    """One response to each prompt."""
    return sample_rollouts(probe.policy, probe.tokenizer, prompts, probe.config.generation, seed)[0]


def _packed(batch: RolloutBatch, of_tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is kept of a block: without padding, in float32, which is what the policy computes in."""
    found = {name: x[batch.mask].float() for name, x in of_tokens.items()}
    return {**found, "lengths": batch.lengths, "truncated": batch.truncated}


Block = Callable[[Update, Sequence[PromptExample], int], dict[str, Tensor]]


def pool_blocks(
    update: Update, kind: str, make: Block, prompts: Sequence[PromptExample], folder: Path, block: int = BLOCK
) -> dict[str, Tensor]:
    """The blocks of a pool, those that the cache lacks made, and put together; padded to the cap, `(n, T, ...)`.

    Args:
        update: policy and step.
        kind: of pool, names its files and its random streams.
        make: makes one block.
        prompts: one for each response.
        folder: the cache.
        block: responses in a block.
    """
    parts = []
    cap = update.probe.config.generation.max_new_tokens
    for start in range(0, len(prompts), block):
        chosen = prompts[start : start + block]
        file = folder / f"{kind}-{update.name}-{start}-{len(chosen)}.safetensors"
        if not file.is_file():
            begun = time.perf_counter()
            seed = stream_seed(update.probe.seed, f"{kind} {start}")
            atomic_write_bytes(file, save(make(update, chosen, seed)))
            print(f"{file.name}: {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
        parts.append(_padded(load_file(file), cap))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _padded(packed: Mapping[str, Tensor], cap: int) -> dict[str, Tensor]:
    """Arrays `(n, cap, ...)` of what was kept without padding."""
    mask = torch.arange(cap) < packed["lengths"].unsqueeze(1)
    found = {"mask": mask, "truncated": packed["truncated"]}
    for name in packed.keys() - {"lengths", "truncated"}:
        flat = packed[name]
        found[name] = torch.zeros(*mask.shape, *flat.shape[1:])
        found[name][mask] = flat
    return found


def scored(pool: Mapping[str, Tensor], rows: Tensor) -> Scored:
    """Some responses of the policy before the step, in the precision that the estimators take."""
    taken = {name: x[rows] for name, x in pool.items()}
    old, new = token_scores(taken)
    tangents = TokenTangents(taken["dl"].double(), taken["dh"].double(), taken["dpsi"].double())
    return Scored(replace(old, state_features=taken["states"]), new, tangents, taken["psi"])


def token_scores(pool: Mapping[str, Tensor]) -> tuple[TokenScores, TokenScores]:
    """Scores of a pool before and after the step."""
    old = TokenScores(pool["l"].double(), pool["h"].double(), pool["mask"])
    return old, TokenScores(pool["l_new"].double(), pool["h_new"].double(), pool["mask"])


# --- the truth -------------------------------------------------------------------------------------------------

Pair = list[list[float]]
"""`[[value, se], [value, se]]`, per response and per token, nats."""


@dataclass(frozen=True)
class Truth:
    """What the estimates estimate, from the pools.

    Attributes:
        slope: `<grad H, step>`.
        change: `H(theta + step) - H(theta)`.
        residual: their difference as `matched` and `snis` have it, by the same responses.
        by: the change by single ways: `forward`, `backward` (reweighted, from one pool each), `unweighted` (from both).
        top_share: of the variance of an estimate, the share that the 1 % of responses with the largest influences has,
            per response and per token.
    """

    slope: Pair
    change: Pair
    residual: Pair
    by: dict[str, Pair]
    top_share: dict[str, list[float]]

    @property
    def exact(self) -> dict[str, list[float]]:
        """By the names of `estimates_of`, `[sequence, token]`."""
        slope, change, residual = (
            [value for value, _ in x] for x in (self.slope, self.change, self.residual)
        )
        return {**exact_values(torch.tensor(slope), torch.tensor(change)), "residual": residual}

    def error(self, name: str) -> list[float]:
        """Standard errors of `exact[name]`, nats."""
        pair = {"residual": self.residual}.get(name, self.slope if name in PREDICTIONS else self.change)
        return [se for _, se in pair]


def truth_of(pool: Scored, fresh: tuple[TokenScores, TokenScores]) -> Truth:
    """The truth, as far as the pools know it.

    Args:
        pool: responses of the policy before the step, one to each prompt.
        fresh: scores before and after the step of as many responses of the new policy, to the same draws of prompts.
    """
    group = torch.arange(len(pool.old.mask))
    found = estimates_of(pool.old, pool.new, pool.first, pool.sampled_features, group, controls=True)
    old, new = fresh
    forward = found["per_decision+cv"]
    backward = change_by("per_decision", new, old, group).map(lambda one: one.scaled(-1.0))
    ways = {
        "forward": forward,
        "backward": backward,
        "unweighted": resampled_change(pool.old, group, new, group),
    }
    return Truth(
        slope=_pair(found["causal+cv"]),
        change=_pair(forward.with_other(_together, backward)),
        residual=_pair(found["residual"]),
        by={name: _pair(one) for name, one in ways.items()},
        top_share={name: [top_share(one) for one in pair] for name, pair in found.items()},
    )


def _pair(estimates: Estimates) -> Pair:
    """Values and standard errors."""
    return [[one.value, one.se] for one in estimates]


def _together(one: Estimate, other: Estimate) -> Estimate:
    """The mean of two estimates of one number, weighted by their variances; what their errors share is counted."""
    share = other.se**2 / (one.se**2 + other.se**2)
    return one.scaled(share) + other.scaled(1 - share)


def top_share(one: Estimate, top: float = 0.01) -> float:
    """The share of an estimate's variance that the largest influences have, `top` of their number."""
    squares = one.influence.square().sort(descending=True).values
    return float(squares[: max(round(top * len(squares)), 1)].sum() / squares.sum())


def known_truth(pool: Mapping[str, Tensor], fresh: Mapping[str, Tensor], file: Path) -> Truth:
    """The truth from a file, or from the pools and then kept there."""
    if not file.is_file():
        everything = torch.arange(len(pool["mask"]))
        found = truth_of(scored(pool, everything), token_scores(fresh))
        atomic_write_bytes(file, json.dumps(asdict(found), indent=2).encode())
    return Truth(**json.loads(file.read_text(encoding="utf-8")))


# --- coverage --------------------------------------------------------------------------------------------------


def repeated(pool: Mapping[str, Tensor], size: int, repetitions: int) -> list[Drawn]:
    """What the probe makes of E's that share no response: as many as asked for, or as the pool has."""
    count = min(repetitions, len(pool["mask"]) // size)
    return [
        judged(scored(pool, torch.arange(k * size, (k + 1) * size)), size >= SMALLEST_SAMPLE)
        for k in range(count)
    ]


WITHOUT_HEAD = (
    "E's without a derailed response, and how many of these, of the others, miss (headline) or are trustworthy\n\n"
    "| family | B_E | without | miss | trustworthy | with | miss | trustworthy |\n|---|---|---|---|---|---|---|---|"
)


def without_row(found: Coverage, derailed: Tensor) -> str:
    """What E's look like that have not seen a derailed response; counts, under `WITHOUT_HEAD`.

    Args:
        found: repeated draws, parts of the pool in its order.
        derailed: which responses of the pool are, `(n,)` bool.
    """
    seen = derailed[: found.size * len(found.runs)].view(-1, found.size).any(1).tolist()
    cells = []
    for which in (False, True):
        runs = [run for run, has in zip(found.runs, seen, strict=True) if has == which]
        missed = sum(found.misses(run) for run in runs)
        trusted = sum(run.verdict.word == "trustworthy" for run in runs)
        cells += [len(runs), missed, trusted]
    return f"| {found.family} | {found.size} | {' | '.join(map(str, cells))} |"


REACH_HEAD = (
    "Typical error of E over that of the truth: coverage with the truth two of its errors off, %\n\n"
    "| family | B_E | E's | prediction: sequence | token | measurement: sequence | token |\n"
    "|---|---|---|---|---|---|---|"
)


def reach_row(found: Coverage, truth: Truth) -> str:
    """How little the truth's error matters: beside that of E, and coverage with the truth two of its errors off."""
    cells = []
    for name, which in itertools.product(found.runs[0].reported, (0, 1)):
        error = truth.error(name)[which]
        typical = statistics.median(list(run.estimates[name])[which].se for run in found.runs)
        low, high = sorted(found.shares(name, which, shift)[1] for shift in (-2 * error, 2 * error))
        cells.append(f"{typical / error:.0f}: {100 * low:.0f} to {100 * high:.0f}")
    return f"| {found.family} | {found.size} | {len(found.runs)} | {' | '.join(cells)} |"


def describe_policy(pool: Mapping[str, Tensor], fresh: Mapping[str, Tensor], update: Update) -> None:
    """Print what the policy and its update are like."""
    cut, entropy = pool["truncated"], pool["h"].double().sum(1)
    length = pool["mask"].sum(1).double()
    # deltaH1 of `matched` as a sum over responses
    parts = pool["dl"].double().sum(1) * (entropy - entropy.mean()) + pool["dh"].double().sum(1)
    print(f"{len(cut)} responses of each policy; U: {update.derailed[0]} of {update.derailed[1]} derailed\n")
    print(
        "| | share, % | tokens | nats per response | nats per token | part of deltaH1, nats per response "
        "| of its variance, % |\n|---|---|---|---|---|---|---|"
    )
    for name, rows in (("derailed", cut), ("others", ~cut), ("all", torch.ones_like(cut))):
        T, N = float(length[rows].mean()), float(entropy[rows].mean())
        part = parts * rows
        error = float(part.std()) / len(part) ** 0.5
        variance = 100 * float(
            ((parts - parts.mean()).square() * rows).sum() / parts.var() / (len(parts) - 1)
        )
        cells = f"{100 * float(rows.double().mean()):.2f} | {T:.1f} | {N:.2f} | {N / T:.3f}"
        print(f"| {name} | {cells} | {float(part.mean()):+.4f} +/- {error:.4f} | {variance:.0f} |")
    print(f"\nderailed after the step: {100 * float(fresh['truncated'].double().mean()):.2f} %")


def describe_truth(truth: Truth) -> None:
    """Print the truth with its errors, and how heavy the tails of the estimates are."""
    print("\n| truth | nats per response | nats per token |\n|---|---|---|")
    rows = {"deltaH1": truth.slope, "deltaH_true": truth.change, "residual": truth.residual}
    for name, pair in {**rows, **{f"deltaH_true {name}": pair for name, pair in truth.by.items()}}.items():
        print(f"| {name} | {' | '.join(f'{value:+.3g} +/- {se:.2g}' for value, se in pair)} |")
    print(
        "\n| top 1 % of the responses' share of the variance, % | per response | per token |\n|---|---|---|"
    )
    for name, shares in truth.top_share.items():
        print(f"| {name} | {' | '.join(f'{100 * share:.0f}' for share in shares)} |")


def main(arguments: Sequence[str] | None = None, recipe: DemoRecipe = RECIPE, **batches: int) -> None:
    """Make what the cache lacks and print the tables.

    Args:
        arguments: of the command line.
        recipe: of the policy.
        batches: sizes of the update batch other than those of the demo's configuration.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--responses", type=int, default=200_000, help="in each pool")
    parser.add_argument("--repetitions", type=int, default=400)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--cache", type=Path, default=default_cache_dir() / "derailing")
    options = parser.parse_args(arguments)
    begun = time.perf_counter()
    verdicts, without, reaches = [VERDICTS_HEAD], [WITHOUT_HEAD], [REACH_HEAD]
    with one_thread():
        for found, truth, derailed in _coverage(options, make_update(recipe, options.cache, **batches)):
            verdicts.append(found.verdict_row())
            without.append(without_row(found, derailed))
            reaches.append(reach_row(found, truth))
    print("\n".join(["", *verdicts, "", *without, "", *reaches]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{(time.perf_counter() - begun) / 60:.1f} minutes, at most {peak:.1f} GiB")


def _coverage(options: argparse.Namespace, update: Update) -> Iterator[tuple[Coverage, Truth, Tensor]]:
    """For each size of E; what the policy is like and the coverage of every estimate are printed."""
    probe, folder = update.probe, options.cache
    wanted = replace(probe.config.batch_config, B_E=options.responses)
    prompts, _ = drawn_prompts(wanted, probe.tokenizer, probe.seed, None)
    with evaluation_mode(probe):
        pool, fresh = (
            pool_blocks(update, kind, make, prompts, folder)
            for kind, make in (("old", old_block), ("new", new_block))
        )
    truth = known_truth(pool, fresh, folder / f"truth-{update.name}-{options.responses}.json")
    describe_policy(pool, fresh, update)
    describe_truth(truth)
    family = f"derailing 1/{1 / float(pool['truncated'].double().mean()):.0f}"
    print(f"\n{ESTIMATES_HEAD}", flush=True)
    for size in options.sizes:
        found = Coverage(family, size, truth.exact, repeated(pool, size, options.repetitions))
        print("\n".join(found.estimate_rows()), flush=True)
        yield found, truth, pool["truncated"]


if __name__ == "__main__":
    main()

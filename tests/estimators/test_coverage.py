"""Identity 8: the 95 % intervals of every estimator cover the exact value in 93 to 97 % of 1,000 repetitions.

The space is enumerable: five prompts, every response of up to four tokens. E draws prompts with replacement and
responses from the policy, as a run does, with one response per prompt or two; every estimator and both estimands are
looked at, with the errors of the jackknife (64 prompts) and of the influence function (250).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from transformers.models.qwen2 import modeling_qwen2

from probe.estimators.curvature import nested_curvature
from probe.estimators.estimate import Estimate, error_method
from probe.estimators.ground_truth import resampled_change
from probe.scoring import Policy
from tests.support.enumerable import float64_norm, tiny_model
from tests.support.exact import (
    Enumeration,
    enumerate_prompts,
    enumeration,
    random_step,
    sample_rows,
    take_scores,
    take_tangents,
)
from tests.support.experiment import estimates_of, exact_values

PROMPTS = [(0, 1), (1, 2), (2, 2), (3, 0), (1, 0)]
REPETITIONS = 1000
SEED = 4
Found = dict[str, list[Estimate]]


@pytest.fixture(scope="module")
def space():
    """The enumerated policy and an update of a realistic size: entropy changes by a few hundredths of a nat."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", float64_norm)
        policy = Policy(tiny_model(0), temperature=0.8, microbatch_size=256, head_chunk_tokens=5000)
        batch = enumerate_prompts(PROMPTS)
        g = torch.Generator().manual_seed(17)
        U = torch.randint(len(batch), (64,), generator=g)
        yield enumeration(policy, batch, random_step(policy, 0.006, seed=0), basis_from=U)


def one_experiment(
    space: Enumeration, prompts: int, responses: int, curvature: bool, g: torch.Generator
) -> Found:
    """Draw E and estimate everything."""
    rows, group = sample_rows(space.probability, prompts, responses, space.batch.group, g)
    old, new = take_scores(space.old, rows), take_scores(space.new, rows)
    first, second = take_tangents(space.first, rows), take_tangents(space.second, rows)
    found = {
        name: list(pair)
        for name, pair in estimates_of(
            old, new, first, space.sampled_features[rows], group, controls=True
        ).items()
    }
    of = space.batch.group[rows[::responses]]
    inside = torch.where(space.batch.group == of.unsqueeze(1), space.new_probability, 0.0)
    again = torch.multinomial(inside, responses, replacement=True, generator=g).flatten()
    found["resample"] = list(resampled_change(old, group, take_scores(space.new, again), group))
    if curvature:
        found["deltaH2"] = list(nested_curvature(old, first, second, group))
    return found


def exact_value(space: Enumeration, name: str) -> list[float]:
    """What an estimator estimates."""
    others = {"resample": space.change.tolist(), "deltaH2": space.curvature.tolist()}
    return {**exact_values(space.slope, space.change), **others}[name]


def table(space: Enumeration, experiment: Callable[[torch.Generator], Found], seed: int) -> list[dict]:
    """Coverage, bias in standard errors of the mean, and mean standard error over the spread, per estimator."""
    g = torch.Generator().manual_seed(seed)
    runs = [experiment(g) for _ in range(REPETITIONS)]
    out = []
    for name in runs[0]:
        for k, estimand in enumerate(("sequence", "token")):
            exact = exact_value(space, name)[k]
            values = torch.tensor([run[name][k].value for run in runs], dtype=torch.float64)
            errors = torch.tensor([run[name][k].se for run in runs], dtype=torch.float64)
            inside = [run[name][k].ci95[0] <= exact <= run[name][k].ci95[1] for run in runs]
            spread = float(values.std())
            centred = (values - values.mean()) / spread
            out.append(
                {
                    "name": name,
                    "estimand": estimand,
                    "exact": exact,
                    "mean": float(values.mean()),
                    "spread": spread,
                    "z": (float(values.mean()) - exact) / spread * math.sqrt(REPETITIONS),
                    "se": float(errors.mean()) / spread,
                    "skew": float((centred**3).mean()),
                    "covered": sum(inside) / REPETITIONS,
                }
            )
    return out


def show(title: str, rows: list[dict]) -> None:
    heads = ("exact", "bias", "spread", "se/spread", "skew", "covered")
    print(f"\n{title}\n{'estimator':<29}{'estimand':<10}" + "".join(f"{head:>10}" for head in heads))
    for r in rows:
        print(
            f"{r['name']:<29}{r['estimand']:<10}{r['exact']:>10.5f}{r['mean'] - r['exact']:>10.5f}{r['spread']:>10.5f}"
            f"{r['se']:>10.3f}{r['skew']:>10.2f}{r['covered']:>10.1%}"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompts", "responses", "method", "curvature"),
    [(64, 1, "jackknife", False), (250, 1, "influence", True), (250, 2, "influence", False)],
)
def test_intervals_cover_the_exact_value(space, capsys, prompts, responses, method, curvature):
    assert error_method(torch.arange(prompts)) == method
    found = table(space, lambda g: one_experiment(space, prompts, responses, curvature, g), seed=SEED)
    with capsys.disabled():
        show(f"{prompts} prompts, {responses} responses each, errors by {method}", found)
    for r in found:
        assert 0.93 <= r["covered"] <= 0.97, r
        assert abs(r["z"]) < 4, r  # nothing is biased by more than its spread lets one see
        assert 0.9 < r["se"] < 1.1, r

"""A finished run made of random numbers, for the tests of what publishes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from probe.config.schema import ProbeConfig
from probe.data.batch import RolloutBatch
from probe.estimand import PerEstimand
from probe.estimators.entropy_gradient import EntropyGradient
from probe.estimators.estimate import Estimate
from probe.estimators.ground_truth import reweighted_change
from probe.estimators.loss_settings import LossSettings
from probe.estimators.losses import LossInputs
from probe.estimators.noise_floor import NoiseFloor
from probe.estimators.prediction import Prediction, first_order
from probe.estimators.weighting import ScoreWeights
from probe.from_checkpoint.sources import SettingSources
from probe.phases.controls import ControlSource
from probe.phases.entropy_gradient import Derivative
from probe.phases.passes import Way
from probe.phases.prediction import Predicted
from probe.phases.sample import Sample
from probe.phases.state import ProbeState
from probe.phases.update import Update
from probe.results import DIAGNOSTIC_KEYS
from probe.results.build import build_result
from probe.results.provenance import Provenance
from probe.results.result import ProbeResult
from probe.scoring.scores import TokenScores

WORDS = (
    "so",
    "the",
    "total",
    "number",
    "of",
    "apples",
    "is",
    "12",
    "and",
    "we",
    "add",
    "7",
    "<answer>",
    "which",
)


class Tokenizer:
    """Decodes an id as the word of that rank."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f" {WORDS[i % len(WORDS)]}" for i in ids)


def rollouts(
    generator: torch.Generator, groups: int, size: int, lengths: tuple[int, int], rewarded: bool
) -> RolloutBatch:
    """`groups` prompts of 150 tokens with `size` responses each, of `lengths[0]` to `lengths[1]` tokens."""
    B, T = groups * size, lengths[1]
    length = torch.randint(lengths[0], T + 1, (B,), generator=generator)
    ids = torch.randint(100, 150_000, (B, T), generator=generator)
    prompt_ids = [
        tuple(torch.randint(100, 150_000, (150,), generator=generator).tolist()) for _ in range(groups)
    ]
    decode = Tokenizer().decode
    rewards = torch.randint(0, 2, (groups, size), generator=generator).double()
    if rewarded:
        rewards[0] = 1.0
    spread = rewards.std(dim=1, keepdim=True).clamp(min=1e-6) if size > 1 else 1.0
    advantages = (rewards - rewards.mean(dim=1, keepdim=True)) / spread
    return RolloutBatch(
        prompts=tuple(decode(list(prompt_ids[i // size])) for i in range(B)),
        completions=tuple(decode(ids[i, : length[i]].tolist()) for i in range(B)),
        prompt_ids=tuple(prompt_ids[i // size] for i in range(B)),
        completion_ids=ids,
        mask=torch.arange(T) < length[:, None],
        truncated=length == T,
        group=torch.arange(B) // size,
        rewards=rewards.flatten() if rewarded else None,
        advantages=advantages.flatten() if rewarded else None,
        rows=({},) * B,
    )


def scores(generator: torch.Generator, mask: Tensor) -> TokenScores:
    """Entropies and log-probs of a plausible size."""
    h = torch.rand(mask.shape, generator=generator, dtype=torch.float64) * mask
    l = -torch.rand(mask.shape, generator=generator, dtype=torch.float64) * mask
    return TokenScores(logprob=l, entropy=h, mask=mask)


def nudged(generator: torch.Generator, old: TokenScores, size: float) -> TokenScores:
    """The scores after a small update."""

    def noise() -> Tensor:
        return size * torch.randn(old.mask.shape, generator=generator, dtype=torch.float64) * old.mask

    return TokenScores(logprob=old.logprob + noise(), entropy=old.entropy + noise(), mask=old.mask)


def parameters(
    generator: torch.Generator, layers: int, shape: tuple[int, int], scale: float
) -> dict[str, Tensor]:
    """One random float32 tensor per LoRA factor."""
    return {
        f"base_model.model.model.layers.{k}.self_attn.q_proj.lora_{factor}.default.weight": scale
        * torch.randn(shape, generator=generator)
        for k in range(layers)
        for factor in ("A", "B")
    }


def make_state(
    B_E: int = 64,
    B_U: int = 16,
    G: int = 8,
    lengths: tuple[int, int] = (60, 150),
    layers: int = 28,
    shape: tuple[int, int] = (8, 64),
    seed: int = 0,
) -> ProbeState:
    """What a run with both prediction and ground truth leaves behind."""
    generator = torch.Generator().manual_seed(seed)
    E = rollouts(generator, B_E, 1, lengths, rewarded=False)
    U = rollouts(generator, B_U, G, lengths, rewarded=True)
    E_scores, U_scores = scores(generator, E.mask), scores(generator, U.mask)
    step, gradient = parameters(generator, layers, shape, 1e-6), parameters(generator, layers, shape, 1e-3)
    gradient_of_entropy = EntropyGradient(
        total=parameters(generator, layers, shape, 1e-2),
        pathwise=parameters(generator, layers, shape, 1e-2),
        length=parameters(generator, layers, shape, 1e-2),
        H_seq=float(E_scores.sequence_entropy.mean()),
        H_tok=float(E_scores.sequence_entropy.mean() / E_scores.lengths.mean()),
        mean_length=float(E_scores.lengths.mean()),
        weights=ScoreWeights(entropy=E_scores.entropy * 3, length=E_scores.mask.double()),
        weighting="causal",
    )
    assert U.advantages is not None
    update = Update(
        step=step,
        new_parameters=step,
        gradient=gradient,
        gradient_norm=1.25,
        clip_factor=0.8,
        learning_rate=1e-6,
        loss_weights=-U.advantages[:, None] * U.mask / U.mask.sum(),
        entropy_weights=torch.zeros(U.mask.shape, dtype=torch.float64),
        scores=U_scores,
        loss=LossSettings(),
        inputs=LossInputs(U.mask, U.advantages, U_scores.logprob, U_scores.entropy, U.truncated),
        zero_advantage_groups=1,
    )
    return ProbeState(
        sample=Sample(
            E=E,
            U=U,
            E_scores=E_scores,
            E_seen=None,
            U_seen=None,
            controls=ControlSource(None, "probe_rework.control_variates", "seed 0"),
            shared=0,
            sampling_gap=None,
            on_policy_z=0.12,
            config=ProbeConfig(),
            sources=SettingSources("none"),
            sampling_threads=1,
            threads=1,
        ),
        derivative=Derivative(Way("reverse", ""), gradient_of_entropy, check_error=3.4e-5),
        update=update,
        predicted=Predicted(
            with_errors(first_order(gradient_of_entropy, step, 1e-6), B_E), gradient_of_entropy
        ),
        ground_truth=replace(
            reweighted_change(E_scores, nudged(generator, E_scores, 0.01), reported="per_decision"),
            noise_floor=NoiseFloor(PerEstimand(2e-6, 2e-8), B_E),
        ),
        timing={
            "sample": 12.3,
            "entropy_gradient": 4.5,
            "update": 6.7,
            "prediction": 0.01,
            "ground_truth": 2.1,
            "total": 25.61,
        },
    )


def with_errors(prediction: Prediction, P: int) -> Prediction:
    """What comes with a prediction: errors and curvature that are plausible shares of it."""

    def near(value: float, share: float, size: float = 1.0) -> Estimate:
        # all prompts contribute alike, so that the standard error is the share of the value
        return Estimate(
            size * value, torch.full((P,), share * size * abs(value) * math.sqrt(P - 1) / P).double()
        )

    total = prediction.deltaH1
    return replace(
        prediction,
        estimates={
            "causal": total.map(lambda value: near(value, 0.2)),
            "matched": total.map(lambda value: near(value, 0.4, 1.1)),
        },
        deltaH2=total.map(lambda value: near(value, 0.2, 0.02)),
        sd_U=total.map(lambda value: abs(value) / 3),
        reason="attention kernel without forward mode",
        agreement=3e-5,
        curvature_mode="finite_difference",
        control_variates="off: 64 sequences are fewer than 2048",
    )


@dataclass(frozen=True)
class MadeResult(ProbeResult):
    """A result with a mapping of the test's own."""

    values: Mapping[str, Any]


def make_result(state: ProbeState, config: ProbeConfig | None = None, **changes: Any) -> ProbeResult:
    """The result of that run; `changes` replace values of its mapping."""
    return replace_values(run_result(state, config), **changes)


def run_result(state: ProbeState, config: ProbeConfig | None = None) -> ProbeResult:
    """The result of that run as it is."""
    started_at = datetime(2025, 1, 15, 14, 30, 25)
    return build_result(state, made_provenance(), _resolved(config or ProbeConfig()), started_at)


def replace_values(result: ProbeResult, **changes: Any) -> MadeResult:
    """The result with other values in its mapping."""
    parts = {field.name: getattr(result, field.name) for field in fields(ProbeResult)}
    return MadeResult(**parts, values={**result.values, **changes})


def as_result(values: Mapping[str, Any], checkpoint_name: str = "step_60") -> ProbeResult:
    """A result that is nothing but its mapping."""
    nothing = dict.fromkeys((field.name for field in fields(ProbeResult)), None)
    made: dict[str, Any] = {**nothing, "config": {}, "started_at": "2025-01-15T14:30:25"}
    return MadeResult(**{**made, "checkpoint_name": checkpoint_name, "values": values})


def make_values(**changes: Any) -> dict[str, Any]:
    """A result mapping as a good run has it, with round numbers; `changes` replace values and diagnostics.

    A change of a value replaces its interval as well, and `None` stays null; `...` takes a key out.
    """
    values: dict[str, Any] = {"learning_rate": 1e-6, "B_E": 1024, "B_U": 16, "G": 8}
    sizes = {"": 1.0, "_tok": 0.01}
    for suffix, size in sizes.items():
        values |= {
            f"H_orig{suffix}": 60 * size,
            f"H_upd{suffix}": 59.9 * size,
            f"deltaH1{suffix}": -0.1 * size,
            f"deltaH1{suffix}_se": 0.02 * size,
            f"deltaH1{suffix}_sd_U": 0.03 * size,
            f"pathwise{suffix}": -0.08 * size,
            f"score{suffix}": -0.02 * size,
            f"bars_dot{suffix}": -1e5 * size,
            f"deltaH_true{suffix}": -0.098 * size,
            f"deltaH_true{suffix}_se": 0.021 * size,
            f"residual{suffix}": -0.002 * size,
            f"residual{suffix}_se": 0.0005 * size,
            f"deltaH2{suffix}": 0.002 * size,
            f"deltaH2{suffix}_se": 0.0004 * size,
            f"eta_10{suffix}": 5e-6,
        }
    diagnostics = {
        "ESS": 1000.0,
        "w_max": 1.6,
        "w_min": 0.55,
        "pareto_k": 0.21,
        "pareto_k_good": True,
        "pareto_k_limit": 0.667,
        "noise_floor": 2e-5,
        "noise_floor_tok": 2e-7,
        "derivative_mode": "jvp",
        "derivative_reason": "every layer has forward-mode derivatives",
        "derivative_agreement": 3e-6,
        "second_order_mode": "jvp",
        "control_variates": "off: 1024 sequences are fewer than 2048",
        "se_method": "jackknife",
        "is_mode": "per_decision",
        "truncated_fraction": 0.02,
        "distinct_responses": 1020,
        "zero_advantage_groups": 2,
        "bias_flags": [],
    }
    for key, value in changes.items():
        (diagnostics if key in DIAGNOSTIC_KEYS else values)[key] = value
    values = {key: value for key, value in values.items() if value is not ...}
    for name in [key.removesuffix("_se") for key in values if key.endswith("_se")]:
        interval = _interval(values.get(name), values[f"{name}_se"])
        if not name.startswith("deltaH2"):
            values.setdefault(f"{name}_ci95", interval)
    values["diagnostics"] = {key: value for key, value in diagnostics.items() if value is not ...}
    return values


def estimate_rows(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The entry `estimates`: every estimator of both estimands, the noisier ones with twice the error."""
    rows = []
    kinds = {"deltaH1": ("causal", "matched"), "deltaH_true": ("per_decision", "snis", "resample")}
    for quantity, estimators in kinds.items():
        for suffix, estimand in (("_tok", "token"), ("", "sequence")):
            value, error = values.get(quantity + suffix), values.get(f"{quantity}{suffix}_se")
            for rank, estimator in enumerate(estimators):
                se = None if error is None else error * 2**rank
                rows.append(
                    {
                        "quantity": quantity,
                        "estimand": estimand,
                        "estimator": estimator,
                        "value": value,
                        "se": se,
                        "ci95": _interval(value, se),
                        "variance_ratio": 4.0 ** (1 - rank),
                        "reported": rank == 0,
                    }
                )
    return rows


def make_runner(state: ProbeState, loggers: tuple[Any, ...] = (), config: ProbeConfig | None = None) -> Any:
    """Stands in for the runner: what the publishing callbacks use of it."""
    fabric = SimpleNamespace(loggers=list(loggers), is_global_zero=True)
    return SimpleNamespace(
        state=state,
        fabric=fabric,
        errors=[],
        written={},
        config=config or ProbeConfig(),
        logger=list(loggers),
    )


def make_module() -> Any:
    """Stands in for the module."""
    config = ProbeConfig()
    return SimpleNamespace(
        tokenizer=Tokenizer(),
        config=replace(config, checkpoint=replace(config.checkpoint, checkpoint_path="/runs/qwen/step_60")),
        files=SimpleNamespace(step=60, name="step_60"),
    )


def made_provenance() -> Provenance:
    """What such a run rests on."""
    return Provenance(
        sources=SettingSources("none"),
        checkpoint_path="/runs/qwen/step_60",
        checkpoint_name="step_60",
        training_step=60,
        other_base=None,
        dropout=0.0,
        half_precision=False,
        schedule_at_zero=False,
        preconditioned=False,
        per_token=True,
    )


def _interval(value: float | None, se: float | None) -> list[float] | None:
    return None if value is None or se is None else [value - 1.96 * se, value + 1.96 * se]


def _resolved(config: ProbeConfig) -> dict[str, Any]:
    return {
        "seed_everything": 7,
        "trainer": {"accelerator": "cpu", "devices": 1, "precision": "32-true", "callbacks": None},
        **asdict(config),
    }

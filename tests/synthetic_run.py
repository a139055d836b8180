"""A finished run made of random numbers, for the tests of what publishes it."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from probe.config import ProbeConfig
from probe.data.batch import RolloutBatch
from probe.estimators.entropy_gradient import EntropyGradient
from probe.estimators.prediction import first_order
from probe.estimators.snis import GroundTruth, snis
from probe.estimators.update import Update
from probe.estimators.weighting import ScoreWeights
from probe.results import ProbeResult
from probe.scoring.scores import TokenScores
from probe.state import ProbeState

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
        pathwise=parameters(generator, layers, shape, 1e-2),
        score=parameters(generator, layers, shape, 1e-2),
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
        scores=U_scores,
    )
    return ProbeState(
        E=E,
        U=U,
        E_scores=E_scores,
        entropy_gradient=gradient_of_entropy,
        update=update,
        prediction=first_order(gradient_of_entropy, step, 1e-6),
        ground_truth=snis(E_scores, nudged(generator, E_scores, 0.01)),
        timing={
            "sample": 12.3,
            "entropy_gradient": 4.5,
            "update": 6.7,
            "prediction": 0.01,
            "ground_truth": 2.1,
        },
    )


def make_result(state: ProbeState, config: ProbeConfig | None = None, **changes: Any) -> ProbeResult:
    """The result of that run, with the keys a runner gives; `changes` replace values."""
    assert state.E is not None
    assert state.U is not None
    assert state.prediction is not None
    assert state.ground_truth is not None
    truth, prediction = state.ground_truth, state.prediction
    values: dict[str, Any] = {
        "checkpoint_path": "/runs/qwen/step_60",
        "training_step": 60,
        "learning_rate": 1e-6,
    }
    values |= {"B_E": len(state.E), "B_U": len(state.U.group.unique()), "G": 8}
    values |= {name: getattr(prediction, name) for name in vars(prediction)}
    for suffix, change in (("", truth.sequence), ("_tok", truth.token)):
        predicted = getattr(prediction, f"deltaH1{suffix}")
        values |= {
            f"H_orig{suffix}": change.H_orig,
            f"H_upd{suffix}": change.H_upd,
            f"deltaH_true{suffix}": change.delta,
            f"deltaH_true{suffix}_se": change.se,
            f"deltaH_true{suffix}_ci95": list(change.ci95),
            f"residual{suffix}": predicted - change.delta,
        }
    values["diagnostics"] = _diagnostics(state, truth)
    values["timing"] = {**state.timing, "total": sum(state.timing.values())}
    values["batch_statistics"] = _batch_statistics(state)
    return ProbeResult(
        values=values | changes,
        config=_resolved(config or ProbeConfig()),
        checkpoint_name="step_60",
        started_at="2025-01-15T14:30:25.123456",
    )


def make_runner(state: ProbeState, loggers: tuple[Any, ...] = (), config: ProbeConfig | None = None) -> Any:
    """Stands in for the runner: what the publishing callbacks use of it."""
    fabric = SimpleNamespace(loggers=list(loggers), is_global_zero=True)
    return SimpleNamespace(state=state, fabric=fabric, errors=[], config=config or ProbeConfig())


def make_module() -> Any:
    """Stands in for the module."""
    return SimpleNamespace(tokenizer=Tokenizer())


def _diagnostics(state: ProbeState, truth: GroundTruth) -> dict[str, Any]:
    assert state.E is not None
    return {
        "ESS": truth.ess,
        "w_max": truth.w_max,
        "w_min": truth.w_min,
        "truncated_fraction": float(state.E.truncated.double().mean()),
        "zero_advantage_groups": 1,
        "derivative_mode": "reverse",
        "derivative_check_error": 3.4e-5,
        "on_policy_z": 0.12,
        "bias_flags": [],
    }


def _batch_statistics(state: ProbeState) -> dict[str, Any]:
    def stats(values: Tensor) -> dict[str, float]:
        values = values.double()
        numbers = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
        return {name: float(number) for name, number in numbers.items()}

    assert state.E is not None
    assert state.U is not None
    assert state.U.rewards is not None
    assert state.U.advantages is not None
    return {
        "avg_generation_length": float(state.E.lengths.double().mean()),
        "avg_reward": float(state.U.rewards.mean()),
        "E": {"length": stats(state.E.lengths)},
        "U": {
            "length": stats(state.U.lengths),
            "reward": stats(state.U.rewards),
            "advantage": stats(state.U.advantages),
        },
    }


def _resolved(config: ProbeConfig) -> dict[str, Any]:
    return {
        "seed_everything": 7,
        "trainer": {"accelerator": "cpu", "devices": 1, "precision": "32-true", "callbacks": None},
        **asdict(config),
    }

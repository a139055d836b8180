"""Options that make the training another one than the probe takes it for: refused, or flagged."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from probe.config.losses import TOKEN_MEANS
from probe.config.schema import ProbeConfig
from probe.errors.exceptions import CheckpointError
from probe.from_checkpoint.options import READ, SAMPLING, UNSUPPORTED, known_options
from probe.from_checkpoint.sampling_options import (
    ENDS,
    NEUTRAL_SAMPLING,
    WITHOUT_EFFECT,
    changed_ends,
    changed_sampling,
)
from probe.from_checkpoint.sizes import processes, several_updates, whole_number
from probe.from_checkpoint.sources import ORDER_OF_ROWS
from probe.loading.training_args import SWITCH_OFF, TrainingArgs

INHERITED = ("max_grad_norm", "optim", "neftune_noise_alpha")
"""What counts in arguments of another trainer than GRPO's: its loss and its batches are not those of the probe."""


def generation_kwargs(args: TrainingArgs) -> dict[str, Any]:
    """What the training gave the engine beside its own options."""
    kwargs = args.values.get("generation_kwargs")
    return dict(kwargs) if isinstance(kwargs, dict) else {}


def refuse_unsupported(args: TrainingArgs, config: ProbeConfig, known: Collection[str]) -> None:
    """Raise where an option makes the trainer's update another one than the probe's.

    `known` are the keys whose values such an option leaves no doubt about: given, or kept beside the checkpoint.
    """
    sampled = config.batch_config.U_rollouts is None
    found: list[str] = []
    remedies: list[str] = []
    for name, option in UNSUPPORTED.items():
        if name not in args.values or not (args.is_grpo or name in INHERITED):
            continue
        value = args.values[name]
        idle = (option.only_sampled and not sampled) or (
            option.only_with_kl and config.probe_rework.kl_coef == 0
        )
        if idle or value in option.neutral or any(key in known for key in option.unless):
            continue
        found.append(f"{name} = {value!r:.60}, which {option.what}")
        remedies += [f"give {key} in the configuration" for key in option.unless]
    if (
        args.is_grpo
        and sampled
        and config.probe_rework.mask_truncated_completions
        and config.generation.stop_strings
    ):
        found.append(
            "mask_truncated_completions with stop strings, after which a response counts as cut off there"
        )
        remedies.append("take U from a file (batch_config.U_rollouts)")
    cap, length = generation_kwargs(args).get("max_new_tokens"), args.values.get("max_completion_length")
    if config.probe_rework.loss == "dr_grpo" and args.is_grpo and cap not in (None, length):
        found.append(
            f"generation_kwargs with max_new_tokens = {cap!r:.60}, where dr_grpo divides by {length!r:.60}"
        )
    changed = _changed_sampling(args) if args.is_grpo and sampled else {}
    if changed:
        listed = ", ".join(f"{name} = {value!r:.60}" for name, value in changed.items())
        found.append(f"{listed}, with which U would not be sampled from the policy itself")
        remedies.append("take U from a file (batch_config.U_rollouts)")
    if found:
        raise CheckpointError(
            f"{args.file}: expected an update that the probe can make, found {'; '.join(found)}; "
            f"{', '.join([*dict.fromkeys(remedies), f'or {SWITCH_OFF}'])}"
        )


def _changed_sampling(args: TrainingArgs) -> dict[str, Any]:
    """The options of sampling that the probe has no equivalent for, where they change something."""
    kwargs = generation_kwargs(args)
    own = {name: args.values.get(name) for name in SAMPLING}
    merged = {name: x for name, x in {**own, **kwargs}.items() if name not in (*READ, "stop_strings")}
    changed = changed_sampling(merged)
    temperature = kwargs.get("temperature")
    if temperature is not None and temperature != args.values.get("temperature"):
        changed["temperature"] = temperature  # TRL's log-probs keep the other one
    cap = kwargs.get("max_new_tokens") or args.values.get("max_completion_length")
    return {**changed, **changed_ends(kwargs, cap)}


def training_flags(args: TrainingArgs, config: ProbeConfig) -> tuple[str, ...]:
    """Marks for what only may matter."""
    if not args.is_grpo:
        return ()
    rework, sampled = config.probe_rework, config.batch_config.U_rollouts is None
    accumulated = whole_number(args, "gradient_accumulation_steps") or 1
    per_generation = whole_number(args, "steps_per_generation") or accumulated
    flags = []
    if sampled and several_updates(args):
        flags.append("rollouts_of_several_updates")
    # the probe's microbatches are those of one process, and of one generation
    over_processes = rework.top_entropy_quantile < 1 and processes(args) > 1
    if over_processes or (rework.loss in TOKEN_MEANS and per_generation < accumulated):
        flags.append("means_of_microbatches")
    own_means = rework.loss == "bnpo" or rework.entropy_coef != 0 or rework.top_entropy_quantile < 1
    if not sampled and (several_updates(args) or (own_means and accumulated > 1)):
        flags.append(ORDER_OF_ROWS)
    return tuple(flags)


def reward_flags(args: TrainingArgs) -> tuple[str, ...]:
    """Marks for what only may matter where advantages are computed from the rewards of a file, which are added up."""
    if not args.is_grpo:
        return ()
    weights = args.values.get("reward_weights")
    weighted = weights is not None and not all(weight == 1 for weight in _listed(weights))
    alone = args.values.get("multi_objective_aggregation") == "normalize_then_sum"
    return ("reward_weights",) if weighted or alone else ()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def unknown_options(args: TrainingArgs) -> tuple[str, ...]:
    """Options of GRPO's arguments that are not in the table."""
    if not args.is_grpo:
        return ()
    known = set(known_options())
    of_engines = {*READ, *NEUTRAL_SAMPLING, *ENDS, *WITHOUT_EFFECT}
    return (
        *(name for name in args.values if name not in known and not name.startswith("_")),
        *(f"generation_kwargs.{name}" for name in generation_kwargs(args) if name not in of_engines),
    )

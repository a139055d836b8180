"""Settings of the update from the training arguments beside a checkpoint.

What the configuration gives explicitly counts first, then what the file says, then the defaults. An option with which
the trainer's update is another one than the probe's is an error; one that only may matter marks the result.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from probe.config.batches import BatchConfig
from probe.config.schema import ProbeConfig
from probe.errors.exceptions import CheckpointError, ProbeError
from probe.from_checkpoint.judged import (
    INHERITED,
    generation_kwargs,
    refuse_unsupported,
    reward_flags,
    training_flags,
    unknown_options,
)
from probe.from_checkpoint.options import (
    OTHERWISE,
    PROMPTS_KEY,
    READ,
    STOP_STRINGS,
)
from probe.from_checkpoint.sizes import (
    SIZES_OF_AN_UPDATE,
    prompts_per_update,
    rows_per_update,
    several_updates,
)
from probe.from_checkpoint.sources import ADVANTAGE, ENTROPY_COEF, SettingSources, sources_of, with_values
from probe.from_checkpoint.values import Read
from probe.limits import LARGEST_COUNT
from probe.loading.checkpoint import TRAINING_ARGS, locate_checkpoint
from probe.loading.foreign import read_json_object
from probe.loading.training_args import SWITCH_OFF, TrainingArgs, read_training_args


def fill_settings(
    config: ProbeConfig, given: Collection[str], file: Path | None
) -> tuple[ProbeConfig, SettingSources]:
    """Fill in what a checkpoint's training arguments say and the configuration does not.

    Args:
        config: as configured.
        given: the keys that the configuration gives explicitly, as `section.key`.
        file: the checkpoint's `training_args.bin`, or None where it has none.

    Returns:
        The configuration that counts, and where its settings come from.

    Raises:
        CheckpointError: the file cannot be read, has an impossible value, or an option that the probe's update does
            not have.
    """
    if config.probe_rework.from_checkpoint == "off":
        return config, sources_of(config, given, {}, "not read (probe_rework.from_checkpoint: off)")
    if file is None:
        return config, sources_of(config, given, {}, f"no {TRAINING_ARGS} beside the checkpoint")
    args = read_training_args(file)
    said, problems = _said(args, config)
    known = set(given)
    adapted = _adaptive_entropy_coef(args)
    if adapted is not None:
        said[ENTROPY_COEF] = adapted
        known.add(ENTROPY_COEF)
    values = {key: value for key, value in said.items() if key not in given}
    from_file = config.batch_config.U_rollouts is not None
    advantage = values.pop(ADVANTAGE, None) if from_file else None
    for key, problem in problems.items():
        if key not in given:
            raise CheckpointError(f"{file}: {problem}; give {key} in the configuration, or {SWITCH_OFF}")
    filled = with_values(config, values, file)
    refuse_unsupported(args, filled, known)
    note = f"{file} ({args.kind})"
    if not args.is_grpo:
        note += ": not of TRL's GRPO, so its loss and batches are not read"
    if args.derived:
        note += ": an unknown class with the options of TRL's GRPOConfig, read as one derived from it"
    sources = sources_of(filled, given, values, note)
    sources = replace(
        sources,
        overruled={key: said[key] for key, x in sources.configuration.items() if said.get(key, x) != x},
        flags=training_flags(args, filled),
        advantage=advantage,
        reward_flags=reward_flags(args) if from_file else (),
        unknown=unknown_options(args),
        without_dropout=args.values.get("disable_dropout") is True,
        rows=rows_per_update(args) if several_updates(args) else None,
    )
    return filled, sources


def config_of_trainer(options: Mapping[str, Any]) -> ProbeConfig:
    """The settings of the update of a GRPO training that is running, from its arguments.

    Args:
        options: TRL's, by name.

    Raises:
        CheckpointError: an option makes its update another one than the probe's.
    """
    here = Path("the trainer's arguments")
    args = TrainingArgs(here, "GRPOConfig", True, options, None)
    config = ProbeConfig(batch_config=BatchConfig(U_rollouts="the trainer's own"))
    said, problems = _said(args, config)
    for problem in problems.values():
        raise CheckpointError(f"{here}: {problem}")
    filled = with_values(config, said, here)
    refuse_unsupported(args, filled, set())
    return filled


def filled_config(config: ProbeConfig, given: Collection[str]) -> ProbeConfig:
    """The configuration that counts for its checkpoint, of which only the training arguments are read.

    Where these, or the checkpoint itself, cannot be used it is the configuration as it is: probing says what is wrong.
    """
    try:
        file = locate_checkpoint(config.checkpoint).training_args_file
        return fill_settings(config, given, file)[0]
    except ProbeError:
        return config


# ---------------------------------------------------------------- what the file says


def _said(args: TrainingArgs, config: ProbeConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """The probe's keys with the file's values, and what is wrong with those that have none."""
    said: dict[str, Any] = {}
    problems: dict[str, str] = {}
    sampled = config.batch_config.U_rollouts is None
    options = _with_generation_kwargs(args)
    for name, read in {**READ, "stop_strings": STOP_STRINGS}.items():
        if name not in options or (read.only_sampled and not sampled):
            continue
        if not (args.is_grpo or name in INHERITED):
            continue
        _convert(name, read, options[name], said, problems)
    if args.is_grpo and sampled:
        prompts = prompts_per_update(args)
        if prompts is None:
            named = ", ".join(f"{name} = {args.values.get(name)!r:.60}" for name in SIZES_OF_AN_UPDATE)
            problems[PROMPTS_KEY] = (
                f"expected positive integers of at most {LARGEST_COUNT} as sizes of batches, found {named}"
            )
        else:
            said[PROMPTS_KEY] = prompts
    return said, problems


def _adaptive_entropy_coef(args: TrainingArgs) -> float | None:
    """The weight of the entropy bonus in the next update of a training that adapts it; None where it is not known.

    TRL keeps it beside the checkpoint, with the entropy of the last update: above its target there is no bonus.

    Raises:
        CheckpointError: the file with it is damaged.
    """
    file = args.file.parent / ENTROPY_STATE
    if args.values.get("use_adaptive_entropy") is not True or not file.is_file():
        return None
    state = read_json_object(file, "JSON as TRL writes it")
    found = [state.get("entropy_coef"), state.get("last_world_entropy"), args.values.get("entropy_target")]
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in found):
        raise CheckpointError(
            f"{file}: expected numbers entropy_coef and last_world_entropy, found {found[0]!r:.60} and "
            f"{found[1]!r:.60}; give probe_rework.entropy_coef in the configuration, or {SWITCH_OFF}"
        )
    coefficient, entropy, target = map(float, found)  # type: ignore[arg-type]
    return coefficient if entropy <= target else 0.0


def _with_generation_kwargs(args: TrainingArgs) -> dict[str, Any]:
    """The options, with those of `generation_kwargs` that have an equivalent in their place, as in TRL's sampling."""
    options = {**(OTHERWISE if args.is_grpo else {}), **args.values}
    if "vllm_importance_sampling_clip_max" not in options and "vllm_importance_sampling_cap" in options:
        options["vllm_importance_sampling_clip_max"] = options["vllm_importance_sampling_cap"]
    kwargs = generation_kwargs(args)
    for name in ("top_p", "top_k", "min_p"):
        if kwargs.get(name) is not None:
            options[name] = kwargs[name]
    if kwargs.get("max_new_tokens") is not None:
        options["max_completion_length"] = kwargs["max_new_tokens"]
    options.pop("stop_strings", None)
    if kwargs.get("stop_strings"):
        options["stop_strings"] = kwargs["stop_strings"]
    return options


def _convert(name: str, read: Read, value: Any, said: dict[str, Any], problems: dict[str, str]) -> None:
    """Put the value, or what is wrong with it, under the probe's key."""
    try:
        said[read.key] = read.convert(value)
    except ValueError as error:
        problems[read.key] = f"{name}: expected {error}, found {value!r:.60}"


# ---------------------------------------------------------------- what counts


ENTROPY_STATE = "entropy_ctrl_state.json"
"""TRL's file with the adapted weight of the entropy bonus."""

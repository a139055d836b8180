"""Settings of the update from the training arguments beside a checkpoint.

What the configuration gives explicitly counts first, then what the file says, then the defaults. An option with which
the trainer's update is another one than the probe's is an error; one that only may matter marks the result.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from probe.config import ProbeConfig
from probe.errors import CheckpointError, ConfigError, ProbeError
from probe.estimators.losses import LOSS_OPTIONS, TOKEN_MEANS
from probe.limits import LARGEST_COUNT
from probe.loading.checkpoint import TRAINING_ARGS, locate_checkpoint
from probe.loading.foreign import read_json_object
from probe.loading.training_args import SWITCH_OFF, TrainingArgs, read_training_args
from probe.training_options import (
    ENDS,
    NEUTRAL_SAMPLING,
    OTHERWISE,
    PROMPTS_KEY,
    READ,
    SAMPLING,
    STOP_STRINGS,
    UNSUPPORTED,
    WITHOUT_EFFECT,
    Read,
    changed_ends,
    changed_sampling,
    known_options,
)

logger = logging.getLogger(__name__)

INHERITED = ("max_grad_norm", "optim", "neftune_noise_alpha")
"""What counts in arguments of another trainer than GRPO's: its loss and its batches are not those of the probe."""
ADVANTAGE = READ["scale_rewards"].key
ONLY_SAMPLED = (
    *("batch_config.G", PROMPTS_KEY, "batch_config.reward_weights"),
    "probe_rework.multi_objective_aggregation",
)
ONLY_FROM_FILES = (
    "probe_rework.off_policy_mask_threshold",
    *(f"probe_rework.{name}" for name in LOSS_OPTIONS if name.startswith("vllm_")),
)
"""Keys without a part in the update where U comes from a file, and where it is sampled from the policy itself."""
SIZES_OF_AN_UPDATE = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")
KEYS = tuple(dict.fromkeys([*(read.key for read in READ.values()), PROMPTS_KEY, STOP_STRINGS.key]))
"""The keys of the configuration that a file can fill."""


@dataclass(frozen=True)
class SettingSources:
    """Where the settings of the update come from; values by key (`probe_rework.loss`).

    Settings of other losses than the update's, and of a U that is not sampled, have no part in it: they are listed
    nowhere but in `filled`.

    Attributes:
        note: the file and what it is, or why there is none.
        checkpoint: from the training arguments beside the checkpoint.
        configuration: given explicitly.
        default: neither.
        overruled: what the file says where the configuration says something else, which counts.
        flags: reasons why results may be biased, for `bias_flags`.
        unknown: options in the file that this version does not know.
        advantage: what the file says of advantages where U comes from a file, whose own count first: `auto` stays until
            that file turns out to have rewards alone, see `from_rewards`.
        reward_flags: those of rewards in that case.
        filled: everything that the file has filled in.
        without_dropout: whether the training switched dropout off.
        rows: responses that one update of the training is made from, where several share a generation.
    """

    note: str
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    configuration: Mapping[str, Any] = field(default_factory=dict)
    default: Mapping[str, Any] = field(default_factory=dict)
    overruled: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    filled: Mapping[str, Any] = field(default_factory=dict)
    advantage: str | None = None
    reward_flags: tuple[str, ...] = ()
    without_dropout: bool = False
    rows: int | None = None

    def from_rewards(self, config: ProbeConfig) -> tuple[ProbeConfig, SettingSources]:
        """Configuration and sources where the file that U comes from has rewards, and no advantages."""
        flags = tuple(dict.fromkeys((*self.flags, *self.reward_flags)))
        if self.advantage is None:
            return config, replace(self, flags=flags)
        found = {ADVANTAGE: self.advantage}
        sources = replace(
            self,
            checkpoint={**self.checkpoint, **found},
            default={key: value for key, value in self.default.items() if key != ADVANTAGE},
            filled={**self.filled, **found},
            flags=flags,
        )
        rework: Any = replace(config.probe_rework, advantage=self.advantage)  # type: ignore[arg-type]
        return replace(config, probe_rework=rework), sources

    def as_mapping(self) -> dict[str, Any]:
        """As plain types, for the result."""
        names = ("note", "checkpoint", "configuration", "default", "overruled")
        found = {name: copy.deepcopy(getattr(self, name)) for name in names}
        return {**found, "unknown": list(self.unknown)}

    def applied_to(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration as mappings, with what the checkpoint has filled in."""
        filled = copy.deepcopy(dict(mapping))
        for key, value in self.filled.items():
            section, name = key.split(".")
            filled.setdefault(section, {})[name] = copy.deepcopy(value)
        return filled


def given_keys(config: Mapping[str, Any], sections: Iterable[str]) -> frozenset[str]:
    """The keys that a configuration gives, as `section.key`.

    >>> sorted(given_keys({"probe_rework": {"loss": "grpo", "delta": None}, "trainer": None}, ["probe_rework"]))
    ['probe_rework.delta', 'probe_rework.loss']
    """
    found = ((name, config.get(name)) for name in sections)
    return frozenset(
        f"{name}.{key}" for name, section in found if isinstance(section, Mapping) for key in section
    )


def changed_keys(config: ProbeConfig) -> frozenset[str]:
    """The keys whose values are not the defaults: what counts as given where nothing else is known."""
    own, defaults = asdict(config), asdict(ProbeConfig())
    return frozenset(
        f"{section}.{key}"
        for section, keys in own.items()
        for key, value in keys.items()
        if value != defaults[section][key]
    )


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
        return config, _sources(config, given, {}, "not read (probe_rework.from_checkpoint: off)")
    if file is None:
        return config, _sources(config, given, {}, f"no {TRAINING_ARGS} beside the checkpoint")
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
    filled = _replaced(config, values, file)
    _refuse_unsupported(args, filled, known)
    note = f"{file} ({args.kind})"
    if not args.is_grpo:
        note += ": not of TRL's GRPO, so its loss and batches are not read"
    if args.derived:
        note += ": an unknown class with the options of TRL's GRPOConfig, read as one derived from it"
    sources = _sources(filled, given, values, note)
    sources = replace(
        sources,
        overruled={key: said[key] for key, x in sources.configuration.items() if said.get(key, x) != x},
        flags=_flags(args, filled),
        advantage=advantage,
        reward_flags=_reward_flags(args) if from_file else (),
        unknown=_unknown(args),
        without_dropout=args.values.get("disable_dropout") is True,
        rows=_rows_per_update(args) if _several_updates(args) else None,
    )
    return filled, sources


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
        prompts = _prompts_per_update(args)
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
    kwargs = _generation_kwargs(args)
    for name in ("top_p", "top_k", "min_p"):
        if kwargs.get(name) is not None:
            options[name] = kwargs[name]
    if kwargs.get("max_new_tokens") is not None:
        options["max_completion_length"] = kwargs["max_new_tokens"]
    options.pop("stop_strings", None)
    if kwargs.get("stop_strings"):
        options["stop_strings"] = kwargs["stop_strings"]
    return options


def _generation_kwargs(args: TrainingArgs) -> dict[str, Any]:
    kwargs = args.values.get("generation_kwargs")
    return dict(kwargs) if isinstance(kwargs, dict) else {}


def _convert(name: str, read: Read, value: Any, said: dict[str, Any], problems: dict[str, str]) -> None:
    """Put the value, or what is wrong with it, under the probe's key."""
    try:
        said[read.key] = read.convert(value)
    except ValueError as error:
        problems[read.key] = f"{name}: expected {error}, found {value!r:.60}"


def _processes(args: TrainingArgs) -> int:
    """How many processes the training had: TRL's batch of a generation says so, else the state of its processes."""
    whole = _size(args, "generation_batch_size")
    part = (_size(args, "per_device_train_batch_size") or 0) * (_size(args, "steps_per_generation") or 0)
    if whole and part and whole % part == 0:
        return whole // part
    return args.processes or 1


def _size(args: TrainingArgs, name: str) -> int | None:
    """A positive integer of the options, or None."""
    value = args.values.get(name)
    return value if type(value) is int and 1 <= value <= LARGEST_COUNT else None


def _several_updates(args: TrainingArgs) -> bool:
    """Whether several updates are made from the rollouts of one generation."""
    if not args.is_grpo:
        return False
    accumulated = _size(args, "gradient_accumulation_steps") or 1
    per_generation = _size(args, "steps_per_generation") or accumulated
    return per_generation * (_size(args, "num_iterations") or 1) > accumulated


def _rows_per_update(args: TrainingArgs) -> int | None:
    """Responses per optimizer step, of all processes."""
    per_device, accumulated, _ = (_size(args, name) for name in SIZES_OF_AN_UPDATE)
    return None if per_device is None or accumulated is None else per_device * accumulated * _processes(args)


def _prompts_per_update(args: TrainingArgs) -> int | None:
    """Prompts per optimizer step, None where the sizes do not say."""
    rows, group = _rows_per_update(args), _size(args, "num_generations")
    if rows is None or group is None or _processes(args) > LARGEST_COUNT:
        return None
    return max(round(rows / group), 1)


# ---------------------------------------------------------------- what counts


def _replaced(config: ProbeConfig, values: Mapping[str, Any], file: Path) -> ProbeConfig:
    """The configuration with some values replaced."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    for section, keys in sections.items():
        try:
            config = replace(config, **{section: replace(getattr(config, section), **keys)})
        except ConfigError as error:
            raise CheckpointError(
                f"{file}: {error}; or give that key in the configuration, which then counts; or {SWITCH_OFF}"
            ) from error
    return config


def _value(config: ProbeConfig, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _sources(
    config: ProbeConfig, given: Collection[str], values: Mapping[str, Any], note: str
) -> SettingSources:
    """The settings that have a part in this update, by where they come from."""
    loss, sampled = config.probe_rework.loss, config.batch_config.U_rollouts is None
    shown = [
        key
        for key in KEYS
        if not any(key.startswith(f"probe_rework.{name}_") and loss != name for name in ("sapo", "vespo"))
        and (sampled or key not in ONLY_SAMPLED)
        and not (sampled and key in ONLY_FROM_FILES)
    ]
    here = {key: _value(config, key) for key in shown}
    return SettingSources(
        note=note,
        checkpoint={key: value for key, value in here.items() if key in values},
        configuration={key: value for key, value in here.items() if key in given},
        default={key: value for key, value in here.items() if key not in given and key not in values},
        filled=dict(values),
    )


def _refuse_unsupported(args: TrainingArgs, config: ProbeConfig, known: Collection[str]) -> None:
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
    cap, length = _generation_kwargs(args).get("max_new_tokens"), args.values.get("max_completion_length")
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
    kwargs = _generation_kwargs(args)
    own = {name: args.values.get(name) for name in SAMPLING}
    merged = {name: x for name, x in {**own, **kwargs}.items() if name not in (*READ, "stop_strings")}
    changed = changed_sampling(merged)
    temperature = kwargs.get("temperature")
    if temperature is not None and temperature != args.values.get("temperature"):
        changed["temperature"] = temperature  # TRL's log-probs keep the other one
    cap = kwargs.get("max_new_tokens") or args.values.get("max_completion_length")
    return {**changed, **changed_ends(kwargs, cap)}


def _flags(args: TrainingArgs, config: ProbeConfig) -> tuple[str, ...]:
    """Marks for what only may matter."""
    if not args.is_grpo:
        return ()
    rework, sampled = config.probe_rework, config.batch_config.U_rollouts is None
    accumulated = _size(args, "gradient_accumulation_steps") or 1
    per_generation = _size(args, "steps_per_generation") or accumulated
    flags = []
    if sampled and _several_updates(args):
        flags.append("rollouts_of_several_updates")
    # the probe's microbatches are those of one process, and of one generation
    over_processes = rework.top_entropy_quantile < 1 and _processes(args) > 1
    if over_processes or (rework.loss in TOKEN_MEANS and per_generation < accumulated):
        flags.append("means_of_microbatches")
    own_means = rework.loss == "bnpo" or rework.entropy_coef != 0 or rework.top_entropy_quantile < 1
    if not sampled and (_several_updates(args) or (own_means and accumulated > 1)):
        flags.append(ORDER_OF_ROWS)
    return tuple(flags)


ENTROPY_COEF = "probe_rework.entropy_coef"
ENTROPY_STATE = "entropy_ctrl_state.json"
"""TRL's file with the adapted weight of the entropy bonus."""
ORDER_OF_ROWS = "order_of_rows"
"""Flag of a file whose rows need not be those of one update in the order of its microbatches, as a recorder's are."""


def _reward_flags(args: TrainingArgs) -> tuple[str, ...]:
    """Marks for what only may matter where advantages are computed from the rewards of a file, which are added up."""
    if not args.is_grpo:
        return ()
    weights = args.values.get("reward_weights")
    weighted = weights is not None and not all(weight == 1 for weight in _listed(weights))
    alone = args.values.get("multi_objective_aggregation") == "normalize_then_sum"
    return ("reward_weights",) if weighted or alone else ()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _unknown(args: TrainingArgs) -> tuple[str, ...]:
    """Options of GRPO's arguments that are not in the table."""
    if not args.is_grpo:
        return ()
    known = set(known_options())
    of_engines = {*READ, *NEUTRAL_SAMPLING, *ENDS, *WITHOUT_EFFECT}
    return (
        *(name for name in args.values if name not in known and not name.startswith("_")),
        *(f"generation_kwargs.{name}" for name in _generation_kwargs(args) if name not in of_engines),
    )


def log_sources(sources: SettingSources) -> None:
    """Say what was read from a checkpoint's training arguments, and what of it does not count."""
    if sources.checkpoint:
        logger.info("%d settings of the update from %s", len(sources.checkpoint), sources.note)
    for key, value in sources.overruled.items():
        own = sources.configuration[key]
        logger.info("%s: %s in the configuration counts, the checkpoint was trained with %s", key, own, value)
    if sources.unknown:
        logger.warning(
            "options of the training that this version does not know, and that may matter: %s",
            ", ".join(sources.unknown),
        )

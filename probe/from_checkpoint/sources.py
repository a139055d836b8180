"""Where the settings of the update come from."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from probe.config.schema import ProbeConfig
from probe.errors.exceptions import CheckpointError, ConfigError
from probe.estimators.loss_settings import LOSS_OPTIONS
from probe.from_checkpoint.options import PROMPTS_KEY, READ, STOP_STRINGS
from probe.loading.training_args import SWITCH_OFF

logger = logging.getLogger(__name__)

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


def with_values(config: ProbeConfig, values: Mapping[str, Any], file: Path) -> ProbeConfig:
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


def sources_of(
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


ENTROPY_COEF = "probe_rework.entropy_coef"
ORDER_OF_ROWS = "order_of_rows"
"""Flag of a file whose rows need not be those of one update in the order of its microbatches, as a recorder's are."""


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

"""The settings of the drop-in probe, the same in a plain loop, in Lightning and in transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from probe.config.batches import GenerationConfig
from probe.config.numbers import check_numbers
from probe.errors.exceptions import ConfigError, nearest
from probe.forecast.arrival import FARTHEST

UNBOUNDED = ("every", "at_least_every", "horizon", "window", "average_over")
"""Numbers of steps and probes, of which nothing is made so many times; the horizon has a bound of its own."""
SMALLEST_E = 16
"""Fewest responses that E is made smaller to, to keep the budget."""


@dataclass(frozen=True)
class WatchSettings:
    """How often and how accurately a training run is probed, and when it warns."""

    every: int | None = None
    """Probe the first optimizer step and every `every`-th after it; None chooses it from `budget`."""
    budget: float = 0.05
    """With `every: None`: largest share of the training time, the probe's own left out, that probes may take."""
    at_least_every: int | None = 25
    """With `every: None`: probe at least one step in so many, whatever the budget; None keeps to the budget."""
    B_E: int = 64
    """Responses in E, one per prompt drawn with replacement. Standard errors shrink like its square root. With
    `every: None` it is halved, down to 16, before probes become rarer than one in ten steps."""
    target_se: float | None = None
    """Standard error of deltaH_true_tok, nats per token, for which probes choose `B_E` themselves from the second one
    on: from 16 to 16 times the setting `B_E`, which is the first probe's. None keeps `B_E`."""
    max_new_tokens: int = 256
    """Responses of E are cut off after this many tokens; give the trainer's limit."""
    temperature: float = 1.0
    """The probed policy is softmax(logits / temperature); give the trainer's."""
    stop_strings: tuple[str, ...] = ()
    """A response ends with the token that completes one of these, or with EOS."""
    generation_batch_size: int = 64
    """Sequences generated at a time."""
    microbatch_size: int | Literal["auto"] = "auto"
    """Sequences that go through the model at a time; `auto`: as many as 2048 tokens hold."""
    head_chunk_tokens: int = 256
    """Tokens whose logits are held at a time."""
    derivative: Literal["auto", "jvp", "finite_difference"] = "auto"
    """How deltaH1 is differentiated: one forward-mode pass, or differences of forwards; `auto` takes the first where
    the model allows it."""
    shares: bool = True
    """Also say how much of deltaH1 is momentum's and weight decay's: one more forward-mode pass for each."""
    attribution: bool = False
    """Also say what classes of the training's own tokens add to deltaH1, where its batch is known (TRL's GRPOTrainer;
    elsewhere give `update`): a backward over E, and two or three forwards of that batch."""
    control_variates: bool = True
    """Let every probe learn from the earlier ones, which takes about half of the variance off."""
    noise_floor: Literal["auto", "on", "off"] = "auto"
    """Measure what rounding makes of a change of 0, by two scorings; `auto` does so where forwards are in 16 bits."""
    snapshot_device: str | None = None
    """Where the copy of the trainable parameters is kept during the step; None is where they are."""
    collapse_entropy: float | None = None
    """Entropy in nats per token that counts as collapse; None takes `collapse_fraction` of the first probe's."""
    collapse_fraction: float = 0.1
    """See `collapse_entropy`."""
    explosion_factor: float | None = 3.0
    """So many times the first probe's entropy counts as explosion; None watches for collapse alone."""
    entropy_band: tuple[float, ...] | None = None
    """Lowest and highest entropy, nats per token, between which training is to stay; takes the place of the
    three above."""
    horizon: int = 50
    """Warn when collapse or explosion is likely within this many optimizer steps, at most 3,000."""
    window: int = 60
    """Probes that the forecast is made from: the last so many, as far as they lie within four horizons."""
    average_over: int = 10
    """Probes over which the mean change per step is taken."""
    figures: bool = True
    """Draw the curves at every alarm, every tenth probe and the end, where the log takes pictures."""
    report_path: str | None = None
    """Write the training as one HTML page to this file, at every alarm and in the end; see `Watch.report`."""
    seed: int = 0
    """Of E's prompts and responses. Nothing is drawn from the training's own random streams."""
    strict: bool = False
    """Raise errors of the probe. By default one is logged with its traceback, and the probe switches itself off."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        hints = get_type_hints(type(self))
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), hints[field.name])
        check_numbers(self, "", UNBOUNDED)
        for key, good, expected in (
            ("every", self.every is None or self.every >= 1, "an integer of at least 1, or None"),
            ("budget", 0 < self.budget <= 1, "a share of at most 1, such as 0.05 for 5 %"),
            (
                "at_least_every",
                self.at_least_every is None or self.at_least_every >= 1,
                "an integer of at least 1, or None",
            ),
            ("B_E", self.B_E >= 2, "an integer of at least 2"),
            (
                "target_se",
                self.target_se is None or self.target_se > 0,
                "a number of nats per token above 0, or None",
            ),
            ("temperature", self.temperature > 0, "a finite number above 0"),
            ("stop_strings", all(self.stop_strings), "texts that are not empty"),
            ("generation_batch_size", self.generation_batch_size >= 1, "an integer of at least 1"),
            (
                "microbatch_size",
                self.microbatch_size == "auto" or self.microbatch_size >= 1,
                "an integer of at least 1, or auto",
            ),
            ("head_chunk_tokens", self.head_chunk_tokens >= 1, "an integer of at least 1"),
            (
                "collapse_entropy",
                self.collapse_entropy is None or self.collapse_entropy > 0,
                "a number of nats per token above 0, or None",
            ),
            ("collapse_fraction", 0 < self.collapse_fraction < 1, "a number between 0 and 1"),
            (
                "explosion_factor",
                self.explosion_factor is None or self.explosion_factor > 1,
                "a number above 1, or None",
            ),
            (
                "entropy_band",
                _is_band(self.entropy_band),
                "two numbers (low, high) with 0 < low < high, or None",
            ),
            (
                "horizon",
                1 <= self.horizon <= FARTHEST,
                f"an integer from 1 to {FARTHEST}, as far as a forecast looks (50 is the default)",
            ),
            ("window", self.window >= 3, "an integer of at least 3"),
            ("average_over", self.average_over >= 2, "an integer of at least 2"),
            ("seed", self.seed >= 0, "an integer of at least 0"),
        ):
            if not good:
                raise ConfigError(f"{key}: expected {expected}, found {getattr(self, key)!r}")
        self._check_snapshot_device()
        self.generation  # noqa: B018  (its own checks)

    def _check_snapshot_device(self) -> None:
        """Refuse what is no device, or one that is not there.

        Raises:
            ConfigError: it is.
        """
        if self.snapshot_device is None:
            return
        try:
            usable = torch.empty(1, device=self.snapshot_device).device.type != "meta"
        except Exception:  # an unknown name, a card that is not there, a torch without CUDA
            usable = False
        if not usable:
            raise ConfigError(
                "snapshot_device: expected a device that tensors can be kept on, such as 'cpu', or None, found "
                f"{self.snapshot_device!r}"
            )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> WatchSettings:
        """The settings of keyword arguments.

        Raises:
            ConfigError: one is unknown, of the wrong type or impossible.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                hint = nearest(name, known, f"there are {', '.join(known)}")
                raise ConfigError(f"{name}: expected a setting of the probe, found an unknown one{hint}")
        return cls(**values)

    @property
    def generation(self) -> GenerationConfig:
        """How E is sampled."""
        try:
            return GenerationConfig(
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                stop_strings=list(self.stop_strings),
                batch_size=self.generation_batch_size,
                continuous_batching=False,  # a training's model stays on the training's thread
            )
        except ConfigError as error:
            raise ConfigError(str(error).removeprefix("generation.")) from None


def _is_band(band: tuple[float, ...] | None) -> bool:
    return band is None or (len(band) == 2 and 0 < band[0] < band[1])


def _check_type(name: str, value: Any, hint: Any) -> None:
    """Refuse a value of another type than the field's.

    Raises:
        ConfigError: it is.
    """
    if not _accepts(hint, value):
        raise ConfigError(f"{name}: expected {_words(hint)}, found {value!r}")


def _accepts(hint: Any, value: Any) -> bool:
    """Whether a value belongs to one of the types that settings have; a truth value is not a number."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return value in parts
    if kind in (UnionType, Union):
        return any(_accepts(part, value) for part in parts)
    if kind is tuple:
        return isinstance(value, (tuple, list)) and all(_accepts(parts[0], x) for x in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _words(hint: Any) -> str:
    """A type in words."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return "one of " + ", ".join(map(repr, parts))
    if kind in (UnionType, Union):
        return " or ".join(map(_words, parts))
    if kind is tuple:
        return "a list of texts" if parts[0] is str else "a list of numbers"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a text", NoneType: "None"}
    return names[hint]

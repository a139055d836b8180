"""Interventions on an update: what people do to its tokens to hold the entropy, with the defaults that were published.

A new one is a function with a decorator that makes one `Plan` of another:

    @intervention("my_mask", "arXiv:0000.00000")
    def my_mask(plan, tokens, *, share: float = 0.1):
        \"\"\"What it does, in a sentence.\"\"\"
        return plan.without(tokens.top(tokens.entropy, round(share * int(tokens.mask.sum()))))

They are named with their options (`my_mask(share=0.2)`), and composed from left to right with `+`.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from probe.attribution.tokens import UpdateTokens
from probe.errors.exceptions import ConfigError, nearest
from probe.estimators.loss_settings import LossSettings
from probe.estimators.losses import (
    LossInputs,
    LossWeights,
    acting_tokens,
    loss_weight_parts,
    update_normaliser,
)


@dataclass(frozen=True)
class Plan:
    """An update that could be made of U.

    Attributes:
        settings: of its loss.
        inputs: what the loss is a function of: advantages, and the tokens that count.
        factor: what the policy-gradient term of every token is multiplied by, `(B, T)`, the loss's denominator held.
        extra: more weights of `l`, `(B, T)`, of terms that the loss has no name for.
        scale: what the loss but its entropy bonus, a mean over tokens, is multiplied by.
        learning_rate_factor: what the learning rate is multiplied by.
    """

    settings: LossSettings
    inputs: LossInputs
    factor: Tensor
    extra: Tensor
    scale: float = 1.0
    learning_rate_factor: float = 1.0

    @classmethod
    def of(cls, settings: LossSettings, inputs: LossInputs) -> Plan:
        """The update as it is."""
        zero = torch.zeros(inputs.mask.shape, dtype=torch.float64)
        return cls(settings, inputs, torch.ones_like(zero), zero)

    def without(self, tokens: Tensor) -> Plan:
        """Without the policy-gradient terms of some tokens, `(B, T)` bool; what the loss divides by stays."""
        return self.times(torch.where(tokens, 0.0, 1.0))

    def times(self, factor: Tensor) -> Plan:
        """With the terms of every token but KL penalty and entropy bonus multiplied, `(B, T)`."""
        return replace(self, factor=self.factor * factor.double(), extra=self.extra * factor.double())

    def masked(self, tokens: Tensor) -> Plan:
        """Without some tokens, `(B, T)` bool, as if they had not been sampled.

        What a loss divides by that is a mean over tokens shrinks with them; means over responses stay over as many.
        """
        mask, before = self.inputs.mask & ~tokens, self.acting
        recorded = self.inputs.loss_tokens
        if recorded is not None:
            recorded *= int((mask & before).sum()) / max(int(before.sum()), 1)
        inputs = replace(self.inputs, mask=mask, loss_tokens=recorded)
        # terms that were added before are averaged over fewer tokens too
        old, new = (update_normaliser(self.settings, one) for one in (self.inputs, inputs))
        extra = self.extra * torch.where(old > 0, new / old.clamp_min(1e-300), 0.0)
        return replace(self, inputs=inputs, extra=torch.where(mask, extra, 0.0))

    @property
    def acting(self) -> Tensor:
        """The tokens that have a part in its loss, `(B, T)` bool."""
        return acting_tokens(self.settings, self.inputs)

    def with_advantages(self, advantages: Tensor) -> Plan:
        """With other advantages, `(B,)`."""
        return replace(self, inputs=replace(self.inputs, advantages=advantages))

    def with_settings(self, **options: Any) -> Plan:
        """With other options of the loss."""
        return replace(self, settings=replace(self.settings, **options))

    @property
    def weights(self) -> LossWeights:
        """The derivatives of its loss."""
        parts = loss_weight_parts(self.settings, self.inputs)
        policy = self.factor * parts.policy + self.extra
        return LossWeights(self.scale * policy, kl=self.scale * parts.kl, bonus=parts.bonus)


Change = Callable[..., Plan]


@dataclass(frozen=True)
class Intervention:
    """An intervention.

    Attributes:
        name: by which it is asked for.
        source: where its formula and defaults stand.
        change: makes the plan.
        claim: the first line of its docstring.
        options: its options with their defaults.
        needs_rewards: whether it is made of the rewards of U.
        needs_clipping: whether it is about tokens' ratios that PPO's range clips.
    """

    name: str
    source: str
    change: Change
    claim: str
    options: dict[str, Any]
    needs_rewards: bool = False
    needs_clipping: bool = False

    def lacks(self, tokens: UpdateTokens, settings: LossSettings) -> str:
        """Why it cannot be made of this U and its loss; empty where it can."""
        if self.needs_rewards and tokens.rewards is None:
            return "expected rewards of U, found advantages alone"
        plain = (
            settings.loss not in ("cispo", "sapo", "vespo") and settings.importance_sampling_level == "token"
        )
        if self.needs_clipping and not (plain and settings.top_entropy_quantile == 1.0):
            return f"expected a loss that clips the ratios of tokens, found {settings.loss} with its options"
        return ""


INTERVENTIONS: dict[str, Intervention] = {}
"""By name, in the order of tables."""


def intervention(
    name: str, source: str, *, needs_rewards: bool = False, needs_clipping: bool = False
) -> Callable[[Change], Change]:
    """Register a function of a plan and `UpdateTokens`, and of options with defaults, as an intervention.

    Args:
        name: by which it is asked for.
        source: where its formula and defaults stand.
        needs_rewards: whether it is made of the rewards of U.
        needs_clipping: whether it is about tokens' ratios that PPO's range clips.

    Raises:
        ValueError: the name is taken, there is no docstring, or an option has no default.
    """

    def register(change: Change) -> Change:
        if name in INTERVENTIONS:
            raise ValueError(f"intervention: expected a new name, found {name!r}, which is taken")
        if not (change.__doc__ or "").strip():
            raise ValueError(
                f"intervention {name!r}: expected a docstring that says what it does, found none"
            )
        options = {
            key: one.default
            for key, one in inspect.signature(change).parameters.items()
            if one.kind is inspect.Parameter.KEYWORD_ONLY
        }
        if inspect.Parameter.empty in options.values():
            raise ValueError(f"intervention {name!r}: expected a default for every option, found one without")
        claim = (change.__doc__ or "").strip().splitlines()[0]
        INTERVENTIONS[name] = Intervention(
            name, source, change, claim, options, needs_rewards, needs_clipping
        )
        return change

    return register


@dataclass(frozen=True)
class Composed:
    """Interventions one after another, with their options.

    Attributes:
        text: as they are written, the same for the same ones.
        steps: each with the options that were given.
    """

    text: str
    steps: tuple[tuple[Intervention, dict[str, Any]], ...]

    def __call__(self, plan: Plan, tokens: UpdateTokens) -> Plan:
        """The plan with all of them."""
        for one, options in self.steps:
            # as the interventions before it have left them
            now = replace(tokens, advantages=plan.inputs.advantages.double(), mask=plan.acting)
            reason = one.lacks(now, plan.settings)
            if reason:
                raise ConfigError(f"whatif.interventions: {one.name}: {reason}")
            plan = one.change(plan, now, **options)
        return plan

    def check(self) -> None:
        """Refuse values of options that can be refused without an update.

        Raises:
            ConfigError: one is out of its range.
        """
        one = torch.ones(1, 1, dtype=torch.float64)
        mask, zero = one.bool(), torch.zeros(1, 1, dtype=torch.float64)
        whole = torch.ones(1, dtype=torch.float64)
        tokens = UpdateTokens(mask, -one, one, -one, whole, zero, torch.zeros(1, dtype=torch.int64), whole)
        plan = Plan.of(LossSettings(), LossInputs(mask, whole, -one, one, torch.zeros(1, dtype=torch.bool)))
        for step, options in self.steps:
            if step.name != "drop":  # whose classes are U's
                step.change(plan, tokens, **options)


def check_share(name: str, option: str, value: float) -> None:
    """Refuse what is no share of something, in [0, 1].

    Raises:
        ConfigError: it is not.
    """
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise ConfigError(f"whatif.interventions: expected {name}({option}=...) in [0, 1], found {value}")


_CALL = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\((.*)\))?\s*", re.DOTALL)


def parse_intervention(text: str) -> Composed:
    """Read `name(option=value, ...) + name ...`.

    Args:
        text: as above; values are numbers, strings, true, false or null.

    Raises:
        ConfigError: an unknown name or option, or a value of another type.

    >>> parse_intervention("stare(weight=1.1, target=1)+steer").text
    'stare(target=1.0)+steer(w_min=0.8)'
    """
    if not isinstance(text, str):
        raise ConfigError(f"whatif.interventions: expected names such as clip_cov, found {text!r}")
    steps = tuple(_step(part, text) for part in _parts(text))
    return Composed("+".join(_written(one, options) for one, options in steps), steps)


def _written(one: Intervention, options: dict[str, Any]) -> str:
    """The one way in which an intervention is written: options that are not the defaults, and one that is alone."""
    shown = {
        key: options.get(key, default)
        for key, default in one.options.items()
        if len(one.options) == 1 or options.get(key, default) != default
    }
    return one.name + (f"({', '.join(f'{key}={value}' for key, value in shown.items())})" if shown else "")


def _parts(text: str) -> list[str]:
    """What stands between plus signs outside of brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c == "(") - (c == ")")
        if c == "+" and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def _step(part: str, text: str) -> tuple[Intervention, dict[str, Any]]:
    """One intervention with its options."""
    found = _CALL.fullmatch(part)
    if found is None:
        raise ConfigError(
            f"whatif.interventions: expected name or name(option=value), found {part.strip()!r} in {text!r}"
        )
    name, inside = found[1], found[2] or ""
    if name not in INTERVENTIONS:
        raise ConfigError(
            f"whatif.interventions: expected one of {', '.join(INTERVENTIONS)}, found {name!r}"
            f"{nearest(name, INTERVENTIONS)}"
        )
    one = INTERVENTIONS[name]
    options = {}
    for given in filter(None, map(str.strip, inside.split(","))):
        key, equals, value = (x.strip() for x in given.partition("="))
        if not equals or key not in one.options:
            known = ", ".join(f"{k}={v!r}" for k, v in one.options.items()) or "none"
            raise ConfigError(f"whatif.interventions: expected options of {name} ({known}), found {given!r}")
        options[key] = _value(value, one.options[key], f"{name}({key}=...)")
    return one, options


def _value(text: str, default: Any, what: str) -> Any:
    """A value of the type of its default."""
    try:
        words: dict[str, Any] = {"true": True, "false": False, "null": None}
        value = words[text.lower()] if text.lower() in words else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text  # a bare word
    wanted = float if isinstance(default, float) or default is None else type(default)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    finite = not isinstance(value, float) or abs(value) < float("inf")
    if (
        (value is None and default is not None)
        or (value is not None and type(value) is not wanted)
        or not finite
    ):
        raise ConfigError(f"whatif.interventions: expected a {wanted.__name__} for {what}, found {text!r}")
    return value

"""Interventions on the settings of the loss and of the optimizer."""

from __future__ import annotations

from dataclasses import replace

from probe.attribution.interventions.registry import Plan, intervention
from probe.attribution.tokens import UpdateTokens
from probe.errors.exceptions import ConfigError


@intervention("entropy_bonus", "the textbook; verl's former default 0.001")
def entropy_bonus(plan: Plan, tokens: UpdateTokens, *, coef: float = 0.001) -> Plan:
    """Add `coef` to the weight of an entropy bonus in the loss, a mean over tokens."""
    return plan.with_settings(entropy_coef=plan.settings.entropy_coef + coef)


@intervention("clip_higher", "arXiv:2503.14476 (DAPO)", needs_clipping=True)
def clip_higher(plan: Plan, tokens: UpdateTokens, *, high: float = 0.28) -> Plan:
    """Another upper end of the PPO range; it changes nothing where the policy is the one that sampled."""
    if not high > 0:
        raise ConfigError(f"whatif.interventions: expected clip_higher(high=...) above 0, found {high}")
    return plan.with_settings(clip_high=high)


@intervention("learning_rate", "the optimizer's")
def learning_rate(plan: Plan, tokens: UpdateTokens, *, factor: float = 0.5) -> Plan:
    """Multiply the learning rate, and with it the whole step: momentum and decoupled decay too."""
    if not factor > 0:
        raise ConfigError(f"whatif.interventions: expected learning_rate(factor=...) above 0, found {factor}")
    return replace(plan, learning_rate_factor=plan.learning_rate_factor * factor)

"""The reference policy of a KL penalty: what the policy was when its training began."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from probe.errors.exceptions import ConfigError
from probe.loading.checkpoint import REFERENCE_ADAPTER
from probe.snapshot import put_back_by


def no_reference() -> ConfigError:
    """What is said where there is a KL penalty and nothing says what its reference policy is."""
    return ConfigError(
        "probe_rework.kl_coef: expected 0 for a full model (the reference policy is the base model without its "
        "adapter, or the adapter `ref`), found a larger one; give probe_rework.kl_coef: 0 for the update without it"
    )


@contextmanager
def as_reference(model: nn.Module) -> Iterator[None]:
    """Let an adapter's model be the reference policy for a while.

    That is the adapter `ref` where there is one (training started from a trained adapter), else the base model with its
    adapter switched off, as for TRL. Active adapter and `requires_grad` are put back, also after an exception.

    Args:
        model: a peft model.

    Raises:
        ConfigError: it is none, and nothing says what the reference is.
    """
    adapters: Any = getattr(model, "peft_config", None)
    if adapters is None:
        raise no_reference()
    policy: Any = model
    flags = {p: p.requires_grad for p in policy.parameters()}
    own = policy.active_adapter
    has_own = REFERENCE_ADAPTER in adapters

    def restore() -> None:
        if has_own:
            policy.set_adapter(own)
        for p, flag in flags.items():
            p.requires_grad_(flag)

    with put_back_by(restore):
        if has_own:
            policy.set_adapter(REFERENCE_ADAPTER)
        with nullcontext() if has_own else policy.disable_adapter():
            yield

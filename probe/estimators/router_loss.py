"""The load-balancing loss of a mixture of experts: the part of the update that no advantage has to do with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from probe.data.batch import RolloutBatch
from probe.errors.exceptions import ConfigError, NumericalError
from probe.scoring.policy import Policy
from probe.scoring.together import together
from probe.shards import is_sharded
from probe.snapshot import standing_in

ROWS = 8
"""Rows per microbatch where it is not said (`per_device_train_batch_size`): TRL's default."""


def router_coefficient(model: nn.Module, wanted: float | None) -> float:
    """The weight of the load-balancing loss in the update.

    Args:
        model: the policy.
        wanted: what is asked for; None takes the one of the model's own configuration, as TRL does.

    Returns:
        0 for a model that returns no router logits.

    Raises:
        ConfigError: a weight is asked for, and the model is no mixture of experts that can give the loss.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    gives = hasattr(config, "output_router_logits")
    if wanted and not gives:
        raise ConfigError(
            f"probe_rework.router_aux_loss_coef: expected 0 or null for {type(config).__name__}, which is no mixture "
            f"of experts that returns its router logits, found {wanted}"
        )
    own = getattr(config, "router_aux_loss_coef", 0.0) if wanted is None else wanted
    return float(own or 0.0) if gives else 0.0


def router_gradient(
    policy: Policy,
    batch: RolloutBatch,
    leave_out_truncated: bool = False,
    rows: int | None = None,
    order: Tensor | None = None,
) -> dict[str, Tensor]:
    """Gradient of the load-balancing loss of prompts and responses, by parameter name.

    The loss is the model's own `aux_loss`, without its weight. It is no sum over tokens (the share of the tokens that
    an expert gets times its mean probability), so that it depends on which rows go through the model together.

    Args:
        policy: the policy.
        batch: U.
        leave_out_truncated: the tokens of responses that were cut off have no part (`mask_truncated_completions`).
        rows: rows that are put together; the loss is the mean over these microbatches. None takes 8.
        order: `(B,)` int64, in which they are; None takes them as they stand.

    Raises:
        NumericalError: the model gives no `aux_loss`, or a gradient is not finite.
    """
    if is_sharded(policy.model):
        raise NumericalError(
            "probe_rework.router_aux_loss_coef: expected 0 where processes hold parts of the weights, found more: "
            "the load-balancing loss has no gradient there; set it to 0, or take trainer.strategy: ddp"
        )
    total = {name: torch.zeros_like(p) for name, p in policy.parameters.items()}
    size = rows or ROWS
    parts = (torch.arange(len(batch)) if order is None else order).split(size)
    with together(policy, "load-balancing loss"):
        _add_parts(policy, batch, parts, leave_out_truncated, total)
    policy.ranks.add_up("load-balancing loss", list(total.values()))
    for name, gradient in total.items():
        if not bool(torch.isfinite(gradient).all()):
            raise NumericalError(
                f"expected finite gradients of the load-balancing loss, found NaN or infinity in that of {name}"
            )
    return total


def _add_parts(
    policy: Policy,
    batch: RolloutBatch,
    parts: Sequence[Tensor],
    leave_out_truncated: bool,
    total: dict[str, Tensor],
) -> None:
    """Add the gradients of this rank's microbatches, each divided by the number of all."""
    parameters = policy.parameters
    for part in parts[policy.ranks.rank :: policy.ranks.size]:
        inputs = _inputs(batch, part.tolist(), leave_out_truncated, policy.device)
        with torch.enable_grad(), policy.autocast(), standing_in(policy.model, policy.values or {}):
            output = policy.model(**inputs, use_cache=False, output_router_logits=True)
            loss = getattr(output, "aux_loss", None)
            if not isinstance(loss, Tensor):
                raise NumericalError(
                    f"expected a load-balancing loss (aux_loss) from {type(policy.model).__name__}, found none; set "
                    "probe_rework.router_aux_loss_coef: 0"
                )
            if not loss.requires_grad:  # an adapter that no router is below
                continue
            found = torch.autograd.grad(loss / len(parts), list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                total[name] += gradient


def _inputs(
    batch: RolloutBatch, rows: list[int], leave_out_truncated: bool, device: torch.device
) -> dict[str, Tensor]:
    """Whole prompts and responses, right-padded."""
    texts, masks = [], []
    for i in rows:
        prompt, response = list(batch.prompt_ids[i]), batch.completion_ids[i][batch.mask[i]].tolist()
        counts = not (leave_out_truncated and bool(batch.truncated[i]))
        texts.append(torch.tensor([*prompt, *response]))
        masks.append(torch.tensor([1] * len(prompt) + [int(counts)] * len(response)))
    return {
        "input_ids": pad_sequence(texts, batch_first=True).to(device),
        "attention_mask": pad_sequence(masks, batch_first=True).to(device),
    }

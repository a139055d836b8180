"""Checks of a policy that was loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from probe.errors.exceptions import CheckpointError
from probe.loading.foreign import rewritten, some
from probe.loading.quantization import dequantized_weight, find_4bit_layers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_finite_weights(model: nn.Module) -> None:
    """Refuse weights that are not finite.

    Raises:
        CheckpointError: one is not.
    """
    bad = []
    count = 0
    for name, parameter in model.named_parameters():
        count += 1
        if parameter.is_floating_point():
            wrong = int((~torch.isfinite(parameter.detach())).sum())
            if wrong:
                bad.append(f"{name} ({wrong} of {parameter.numel()} values)")
    for name, layer in find_4bit_layers(model).items():
        wrong = int((~torch.isfinite(dequantized_weight(layer, torch.float32))).sum())
        if wrong:
            bad.append(f"{name}.weight ({wrong} values)")
    if bad:
        raise CheckpointError(
            f"non-finite weights in {len(bad)} of {count} parameters: {some(bad)}; the checkpoint is "
            "broken, take an earlier one"
        )


def check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings for.

    Raises:
        CheckpointError: it has.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"tokenizer {tokenizer.name_or_path}: expected at most the {rows} tokens the model has "
            f"embeddings for, found {len(tokenizer)}; name the model's own in checkpoint.tokenizer_path"
        )


@torch.no_grad()
def check_forward(model: Any) -> None:
    """Four tokens through the model: they must go through, be finite, and not depend on what follows."""
    embeddings = model.get_input_embeddings().weight
    last = embeddings.shape[0] - 1
    ids = torch.tensor([[0, last // 2, last, 0], [0, last // 2, last, last]], device=embeddings.device)
    remedy = "set checkpoint.dtype: float32, or another checkpoint.attn_implementation"
    with rewritten("a forward pass of the policy", remedy):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        logits = logits.detach().double().cpu()
    if not torch.isfinite(logits).all():
        raise CheckpointError(
            "a forward pass of the policy: expected finite logits, found "
            f"{int((~torch.isfinite(logits)).sum())} of {logits.numel()} that are not; {remedy}"
        )
    # The rows differ in the last token only; rounding differs between rows by far less than this.
    difference = (logits[0, :3] - logits[1, :3]).abs().max()
    if difference > 0.05 * logits.abs().max():
        raise CheckpointError(
            "a forward pass of the policy: expected a causal language model, found logits that change by "
            f"{difference:.3g} with a later token (a bidirectional or diffusion model)"
        )

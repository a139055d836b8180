"""The policy: a base model with a LoRA or QLoRA adapter, or a whole model, ready to be differentiated.

The model comes in evaluation mode (no dropout), its trainable weights in float32 or better, its 4-bit layers
with an exact forward, checked for finite weights and logits.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from probe.config.checkpoint import CheckpointConfig
from probe.errors.exceptions import CheckpointError
from probe.loading.adapters import attach_adapter, read_adapter_config, rebuilds_base
from probe.loading.base_model import load_base
from probe.loading.base_name import other_base, resolve_base
from probe.loading.checkpoint import CheckpointFiles
from probe.loading.checks import check_finite_weights, check_forward, check_vocabulary
from probe.loading.libraries import fork_torch_rng, quiet_libraries
from probe.loading.quantization import use_exact_4bit_layers
from probe.loading.tokenizer import load_tokenizer
from probe.parameters import trainable_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_policy_model(
    config: CheckpointConfig,
    files: CheckpointFiles,
    device: torch.device | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load the policy and its tokenizer. The torch random state is left as it was.

    An adapter's weights are trainable and its base is frozen, in `config.dtype`. Of a whole model every
    parameter is trainable. Trainable weights are float32, or float64 where `config.dtype` says so (the whole
    model then).

    Args:
        config: the `checkpoint` section.
        files: the checkpoint's parts, from `locate_checkpoint`.
        device: where the model goes, unless `config.device_map` distributes it.
        tokenizer: from `load_tokenizer`, where it is there already.

    Returns:
        The model (a `PreTrainedModel` or a `PeftModel`) in evaluation mode, and the tokenizer.

    Raises:
        CheckpointError: a part cannot be loaded or does not fit the others, the model is no causal language
            model, the tokenizer has no EOS token, or weights or logits are not finite.
    """
    device = torch.device(device)
    tokenizer = load_tokenizer(config, files) if tokenizer is None else tokenizer
    with quiet_libraries(), fork_torch_rng():
        if files.kind == "lora":
            adapter = read_adapter_config(files.model_dir)
            base, revision = resolve_base(config, files.model_dir, adapter)
            if config.dtype == "float64" and rebuilds_base(adapter):
                raise CheckpointError(
                    "checkpoint.dtype: expected float32, in which the base of an adapter with init_lora_weights "
                    f"{adapter['init_lora_weights']:.40} was changed, found float64"
                )
            if (names := other_base(config, files)) is not None:
                logger.warning("adapter %s: trained on %s, put on %s", files.model_dir, *names)
            model = load_base(config, base, revision, device)
            model = attach_adapter(model, files.model_dir, adapter, device, len(tokenizer))
        else:
            if config.load_in_4bit:
                raise CheckpointError(
                    "checkpoint.load_in_4bit: expected an adapter checkpoint, found a whole model, whose "
                    f"weights are all trainable, in {files.model_dir}; set it to false"
                )
            model = load_base(config, str(files.model_dir), None, device, trainable=True)
        use_exact_4bit_layers(model)
        _settle_precision(model, config)
        model.eval()
        check_finite_weights(model)
        check_vocabulary(model, tokenizer)
        check_forward(model)
    return model, tokenizer


def _settle_precision(model: nn.Module, config: CheckpointConfig) -> None:
    """Trainable weights in float32 or better: 16 bits round steps of a learning rate's size away."""
    if config.dtype == "float64":
        model.to(torch.float64)
        switch = getattr(model, "set_experts_implementation", None)
        if callable(switch):  # grouped products of experts have no kernel for it
            switch("eager")
        return
    low = [p for p in trainable_parameters(model).values() if p.dtype in (torch.bfloat16, torch.float16)]
    for parameter in low:
        parameter.data = parameter.data.float()
    if low:
        logger.info("%d trainable weights are kept in float32 instead of 16 bits", len(low))


def training_dropout(model: nn.Module) -> float:
    """The largest dropout probability of a model in training mode; 0 where there is none.

    Args:
        model: a transformers model, possibly wrapped: its dropout layers count, adapters' included, and the attention's
            own, which is no layer.
    """
    layers = [m.p for m in model.modules() if isinstance(m, (nn.Dropout, nn.Dropout1d, nn.AlphaDropout))]
    attention = [getattr(m, "attention_dropout", 0.0) for m in model.modules()]
    found = [p for p in (*layers, *attention) if isinstance(p, float) and p > 0]
    return max(found, default=0.0)

"""Loading a checkpoint: its files, the policy with its tokenizer, the optimizer at its saved state."""

from __future__ import annotations

from probe.loading.checkpoint import CheckpointFiles, locate_checkpoint
from probe.loading.model import (
    BACKBONES,
    load_policy_model,
    load_tokenizer,
    other_base,
    quiet_libraries,
    trainable_parameters,
    training_dropout,
)
from probe.loading.optimizer import LoadedOptimizer, load_optimizer
from probe.loading.quantization import use_exact_4bit_layers

__all__ = [
    "BACKBONES",
    "CheckpointFiles",
    "LoadedOptimizer",
    "load_optimizer",
    "load_policy_model",
    "load_tokenizer",
    "locate_checkpoint",
    "other_base",
    "quiet_libraries",
    "trainable_parameters",
    "training_dropout",
    "use_exact_4bit_layers",
]

"""Loading a checkpoint: its files, the policy with its tokenizer, the optimizer at its saved state."""

from __future__ import annotations

from probe.loading.base_name import BACKBONES, other_base
from probe.loading.checkpoint import CheckpointFiles, locate_checkpoint
from probe.loading.libraries import quiet_libraries
from probe.loading.optimizer import LoadedOptimizer, load_optimizer
from probe.loading.policy import load_policy_model, training_dropout
from probe.loading.quantization import use_exact_4bit_layers
from probe.loading.tokenizer import load_tokenizer
from probe.parameters import trainable_parameters

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

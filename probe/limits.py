"""Limits on what comes from elsewhere: small files can take all time and memory there is."""

from __future__ import annotations

CONFIG_BYTES = 2**20
"""Largest YAML file that is parsed."""
CONFIG_DEPTH = 32
"""Deepest nesting of a YAML file: parsers recurse, and crash the process on 100,000 brackets."""
CONFIG_ALIASES = 16
"""Most uses of anchors in a YAML file: each can double what the file stands for."""
TRAINING_ARGS_BYTES = 2**24
"""Largest training_args.bin that is read; the real ones have a few thousand bytes."""
TRAINING_ARGS_VALUES = 2**17
"""Most values in one: lists that stand in each other many times are more than any memory."""

"""Limits on what comes from elsewhere: small files can take all time and memory there is."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

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

SETTINGS_BYTES = 2**22
"""Largest JSON file of settings (adapter_config.json, config.json), and largest chat template."""
TABLE_BYTES = 2**29
"""Largest file that holds a table: a vocabulary, the logs in trainer_state.json, the index of a model's weights."""
FOLDER_ENTRIES = 100_000
"""Most entries of a checkpoint's folder."""
LARGEST_SETTING = 2**40
"""Largest whole number in a model's or adapter's settings: sizes and lengths, and no more."""
MODEL_LAYERS = 10_000
"""Most layers of a model whose weights do not tell how many it has."""
MODEL_EXPERTS = 4096
"""Most experts of a layer."""
ADAPTER_ENTRIES = 256
"""Most names in a list of an adapter's settings, unless the model has more modules: each is compared with each."""
PATTERN_SECONDS = 10.0
"""Longest time that the patterns of an adapter's settings may take to go through a model's names."""
TEMPLATE_SECONDS = 10.0
"""Longest time that a chat template may take for one prompt."""
TOKENIZER_SECONDS = 10.0
"""Longest time that a tokenizer may take for a few short texts."""
PICKLE_BYTES = 2**25
"""Largest table of contents of a file that torch.save wrote; the tensors themselves do not count."""
PICKLE_DEPTH = 64
"""Deepest nesting in that table: hashing and freeing recurse."""
PICKLE_TUPLE = 10_000
"""Most values that a tuple in it may stand for: one that holds another twice, again and again, has no end."""
OPTIMIZER_BYTES_PER_PARAMETER = 64
"""Most bytes that a file with an optimizer may have for each parameter of the model, frozen ones included."""
OPTIMIZER_BYTES = 2**28
"""What it may have besides."""

LARGEST_COUNT = 10**7
"""Largest number of responses, prompts, tokens or sequences that a configuration may ask for."""
LARGEST_SEED = 2**63 - 1
"""Largest seed, and largest of the whole numbers that nothing is made so many times of."""


@contextmanager
def time_limit(seconds: float, error: Exception) -> Iterator[None]:
    """Raise `error` where the work inside takes longer than `seconds`.

    Python code and regular expressions can be ended like this, and only in the main thread of a system with signals;
    elsewhere nothing is limited. A timer of the caller's own goes on afterwards.

    Args:
        seconds: how long the work may take.
        error: what to raise then.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def end(number: int, frame: object) -> None:
        raise error

    started = time.monotonic()
    own_handler = signal.signal(signal.SIGALRM, end)
    own_seconds, own_interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, own_handler)
        if own_seconds:
            left = max(own_seconds - (time.monotonic() - started), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, left, own_interval)

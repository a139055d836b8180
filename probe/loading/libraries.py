"""What libraries do beside loading, kept away from the user."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch

from probe.imports import errors_only

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the messages of transformers, peft and bitsandbytes down; their Python warnings are logged.

    Verbosity, progress bars and warning filters are as before afterwards.
    """
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    recorded: list[warnings.WarningMessage] = []
    try:
        with errors_only("bitsandbytes"), warnings.catch_warnings(record=True) as recorded:
            warnings.simplefilter("always")
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
        for category, message in dict.fromkeys((entry.category, str(entry.message)) for entry in recorded):
            # A library's plans for its next version are no news to the user.
            notice = issubclass(category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning))
            logger.log(logging.DEBUG if notice else logging.INFO, "while loading: %s", message)


@contextlib.contextmanager
def fork_torch_rng() -> Iterator[None]:
    """Loading draws random numbers for weights that are then overwritten; they must not move the seed."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices):
        yield

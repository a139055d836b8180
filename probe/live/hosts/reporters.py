"""What transformers' Trainer reports to that the probe can write to itself, under names of its own.

transformers puts `train/` before every name that goes through its callbacks, where the probe's numbers are lost among
the trainer's, and passes on numbers alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import Trainer

from probe.report.boards import Board, TensorBoardWriter, TrackedRun

TRANSFORMERS_STEP = "train/global_step"
"""Under which transformers logs the step to Weights & Biases and trackio."""


@dataclass(frozen=True)
class Reporter:
    """A callback that reports, and what it reports to.

    Attributes:
        callback: of transformers.
        board: that it writes to.
    """

    callback: Any
    board: Board


def reporters(trainer: Trainer) -> list[Reporter]:
    """TensorBoard, Weights & Biases and trackio, as far as the trainer reports to them and they are open."""
    found: list[Reporter] = []
    for callback in trainer.callback_handler.callbacks:
        writer = getattr(callback, "tb_writer", None)
        if callable(getattr(writer, "add_scalar", None)):
            found.append(Reporter(callback, TensorBoardWriter(writer)))
        for name in ("_wandb", "_trackio"):
            library = getattr(callback, name, None)
            if library is not None and getattr(callback, "_initialized", False):
                found.append(Reporter(callback, TrackedRun(library, TRANSFORMERS_STEP)))
    return found


@contextmanager
def passed_over(trainer: Trainer, left_out: Iterable[Any]) -> Iterator[None]:
    """The trainer's other callbacks alone hear of what happens in the block."""
    handler = trainer.callback_handler
    whole, own = list(handler.callbacks), [id(one) for one in left_out]
    handler.callbacks = [one for one in whole if id(one) not in own]
    try:
        yield
    finally:
        handler.callbacks = whole + [one for one in handler.callbacks if one not in whole]

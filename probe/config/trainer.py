"""Devices, precision, callbacks and loggers: the section `trainer`, by the names of Lightning's Trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

Callback = TypeVar("Callback")
"""The base class of callbacks."""
Log = TypeVar("Log")
"""The base class of loggers."""

Precision = Literal["32-true", "bf16-mixed"]
"""Fabric's name of the precision of forward passes. Trainable weights, moments and steps stay as loaded."""


@dataclass(eq=False)
class TrainerConfig(Generic[Callback, Log]):
    """Devices, precision, and who is called besides the built-in callbacks."""

    accelerator: str = "auto"
    """`cpu`, `gpu` or `auto`."""
    devices: list[int] | str | int = 1
    """How many devices, or which."""
    num_nodes: int = 1
    """Number of machines."""
    strategy: str = "auto"
    """How processes work together: `auto` and `ddp` hold the whole policy each, `fsdp` a part of every weight."""
    precision: Precision = "32-true"
    """Precision of forward passes."""
    callbacks: list[Callback] | Callback | None = None
    """Further callbacks, called after the built-in ones."""
    logger: Log | list[Log] | bool | None = True
    """A Lightning logger or several (`lightning.pytorch.loggers.CSVLogger`); true is a TensorBoardLogger in
    `detailed_logging.output_directory`, with a folder for each run that is called after checkpoint and time; false is
    none."""

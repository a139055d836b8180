"""What a result rests on beside batches and numbers: the checkpoint, its settings, and what biases them."""

from __future__ import annotations

from dataclasses import dataclass

from probe.from_checkpoint.sources import SettingSources


@dataclass(frozen=True)
class Provenance:
    """What was probed, and how.

    Attributes:
        sources: where the settings of the update come from.
        checkpoint_path: the checkpoint; None where there is none.
        checkpoint_name: its short name (`step_60`), for file names and tables.
        training_step: of the checkpoint; None where nothing says.
        other_base: the base model that the adapter was trained on and the one it is put on, where these differ.
        dropout: largest dropout probability of the policy in training, which the probe's update is without; 0 for none.
        half_precision: whether forwards compute in 16 bits.
        schedule_at_zero: whether the learning rate is that of an earlier step, as the schedule is at 0.
        preconditioned: whether the direction that is predicted is not the step that is measured
            (`step: preconditioned`).
        per_token: whether the measurement is reported per token too.
    """

    sources: SettingSources
    checkpoint_path: str | None
    checkpoint_name: str
    training_step: int | None
    other_base: tuple[str, str] | None
    dropout: float
    half_precision: bool
    schedule_at_zero: bool
    preconditioned: bool
    per_token: bool

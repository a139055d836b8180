"""What is planned, as it is configured."""

from __future__ import annotations

from dataclasses import dataclass

from probe.config.numbers import check_numbers
from probe.errors.exceptions import require


@dataclass(frozen=True)
class PlanConfig:
    """The pilot of `entropy-probe plan`, and how sure its plan is to be. `--power` is short for `--plan.power`."""

    pilot_B_E: int = 64
    """Prompts of the pilot's E, in place of batch_config.B_E."""
    pilot_B_U: int | None = None
    """Prompts in the pilot's U, in place of batch_config.B_U. By default U is that of the run: another one makes
    another update, and its change of entropy says little about that of the run."""
    power: float = 0.8
    """Probability with which a run of the recommended size resolves the change."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_numbers(self, "plan.")
        require(self.pilot_B_E >= 2, "plan.pilot_B_E", "an integer of at least 2", self.pilot_B_E)
        require(
            self.pilot_B_U is None or self.pilot_B_U >= 1,
            "plan.pilot_B_U",
            "an integer of at least 1, or null for batch_config.B_U",
            self.pilot_B_U,
        )
        require(0.5 <= self.power < 1, "plan.power", "a probability from 0.5 to below 1", self.power)

"""Which tokens did it."""

from __future__ import annotations

from dataclasses import dataclass

from probe.config.numbers import check_numbers
from probe.errors.exceptions import require


@dataclass(frozen=True)
class AttributionConfig:
    """The attribution of deltaH1 to the tokens of U (`entropy-probe attribute` and `whatif` switch it on)."""

    enabled: bool = False
    """Run phase 4: what every token of U adds to deltaH1 and to the expected reward."""
    reward: bool = True
    """Attribute the change of the expected reward too, on rewards of E: those of its file, or of
    `batch_config.reward`."""
    blocks: int = 16
    """Parts of E (of whole prompts) whose spread gives the errors; each costs a forward of U for every objective."""
    states: int = 32
    """States of U, drawn at random, whose entropy change is split into the own token's doing, the rest of the
    response's, the group's and the other prompts' (coupling); each costs a pass over U. 0 leaves it out."""
    responses: int = 16
    """Responses of U, drawn at random, for whose whole entropy the same is done, and responses of E, whose rows with
    the responses of U are the influence matrix. 0 leaves both out."""
    league: bool = True
    """Rank the predictors of the literature against the exact contributions."""
    top: int = 20
    """Tokens of largest contribution that a result lists on either side."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_numbers(self, "attribution.")
        require(self.blocks >= 2, "attribution.blocks", "an integer of at least 2", self.blocks)
        for key in ("states", "responses", "top"):
            value = getattr(self, key)
            require(value >= 0, f"attribution.{key}", "an integer of at least 0", value)

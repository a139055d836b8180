"""The predictors that a league table ranks.

A new one is a function of `UpdateTokens` with a decorator:

    @predictor("my_score", "arXiv:0000.00000")
    def my_score(tokens):
        \"\"\"What it claims, in a sentence.\"\"\"
        return -tokens.A * tokens.entropy

It gives, `(B, T)`, the entropy change that it expects of each token's policy-gradient term, up to a positive factor:
positive where the token raises the entropy. One that has no sign (`signed=False`) is ranked against sizes. What the
loss makes of the advantage (what it divides by, the ratio, clipping) is put on by the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from probe.attribution.tokens import UpdateTokens

Score = Callable[[UpdateTokens], Tensor]


@dataclass(frozen=True)
class Predictor:
    """A predictor.

    Attributes:
        name: in tables.
        source: where its formula stands.
        score: gives it.
        claim: the first line of its docstring.
        signed: whether its sign means something.
    """

    name: str
    source: str
    score: Score
    claim: str
    signed: bool = True


PREDICTORS: dict[str, Predictor] = {}
"""By name, in the order of tables."""


def predictor(name: str, source: str, *, signed: bool = True) -> Callable[[Score], Score]:
    """Register a function as a predictor.

    Args:
        name: in tables.
        source: where its formula stands.
        signed: whether its sign means something.

    Raises:
        ValueError: the name is taken, or the function has no docstring.
    """

    def register(score: Score) -> Score:
        if name in PREDICTORS:
            raise ValueError(f"predictor: expected a new name, found {name!r}, which is taken")
        if not (score.__doc__ or "").strip():
            raise ValueError(f"predictor {name!r}: expected a docstring that says what it claims, found none")
        claim = (score.__doc__ or "").strip().splitlines()[0]
        PREDICTORS[name] = Predictor(name, source, score, claim, signed)
        return score

    return register

"""Whether a file of E holds the update's own responses: an E must not judge the step that it was made by."""

from __future__ import annotations

import math
from collections.abc import Hashable
from pathlib import Path

from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.errors import DataError
from probe.rollouts.tables import LOGS, rollout_file

CHANCE = 1e-4
"""Responses that agree with the update's at their places are its own where chance does so less often than this."""


def check_different_files(E_rollouts: str, U_rollouts: str, update: int | None) -> None:
    """Refuse one file for both batches, before anything is loaded. A log of a run has parts of its own for both.

    Raises:
        DataError: E and U would be the same rows.
    """
    E, U = (rollout_file(Path(path).expanduser(), update) for path in (E_rollouts, U_rollouts))
    if E.exists() and U.exists() and E.samefile(U) and not E.name.endswith(LOGS):
        raise DataError(
            f"batch_config.E_rollouts: expected responses that the update is not made from, found {E}, the file of "
            "batch_config.U_rollouts; leave it out to sample E, or give a file of other responses"
        )


def shared_responses(E: RolloutBatch, U: RolloutBatch, logprob: Tensor) -> int:
    """Number of responses of E that are the update's own; 0 unless both are from files.

    Responses are the same ones where prompt, group and place in the group are, and the tokens. Files may give the same
    names to other rows, and short responses agree by chance: of `K` places that both have, chance lets the `M` that
    agree do so with a probability of at most `C(K, M) prod p(y)`, and only below `CHANCE` they count.

    Args:
        E: the evaluation batch.
        U: the update batch.
        logprob: log-prob of each response of E under the policy, `(B_E,)`, nats.
    """
    if not E.places or not U.places:
        return 0
    own = dict(zip(_keys(U), _tokens(U), strict=True))
    candidates = [(i, own[key]) for i, key in enumerate(_keys(E)) if key in own]
    responses = _tokens(E)
    agreeing = [i for i, tokens in candidates if responses[i] == tokens]
    K, M = len(candidates), len(agreeing)
    choices = math.lgamma(K + 1) - math.lgamma(M + 1) - math.lgamma(K - M + 1)
    return M if choices + float(logprob[agreeing].sum()) < math.log(CHANCE) else 0


def _keys(batch: RolloutBatch) -> list[tuple[Hashable, ...]]:
    """Prompt, group and place of each response."""
    return [(ids, *place) for ids, place in zip(batch.prompt_ids, batch.places, strict=True)]


def _tokens(batch: RolloutBatch) -> list[list[int]]:
    """The tokens of each response."""
    return [row[own].tolist() for row, own in zip(batch.completion_ids, batch.mask, strict=True)]

"""Whether a file of E holds the update's own responses: an E must not judge the step that it was made by."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable
from pathlib import Path

from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.errors import DataError
from probe.rollouts.tables import LOGS, rollout_file

CHANCE = 1e-6
"""Groups that agree with the update's are its own where chance makes them agree less often than this."""


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

    A group of E is one of U's where prompt and name of the group are the same and the responses agree at all places
    that both have, or where E's, two or more, are those of U's in another order. Files may give one name to different
    groups, and short responses agree by chance: of `K` groups that both have, chance lets the `M` that agree do so with
    a probability of at most `C(K, M) prod p(y)` (`p(y)` times the group's size, in another order), and only below
    `CHANCE` they count. `p(y)` is the policy's, or the share of E's other responses to the prompt that are the same,
    where that is larger. A single response is never enough, and texts that do not lead back to their tokens count for
    nothing.

    Args:
        E: the evaluation batch.
        U: the update batch.
        logprob: log-prob of each response of E under the policy, `(B_E,)`, nats.
    """
    if not E.places or not U.places:
        return 0
    named = all(label is not None for label, _ in (*E.places, *U.places))
    of_E, of_U = _groups(E, named), _groups(U, named)
    common = [key for key in of_E if key in of_U]
    tokens_E, tokens_U = _tokens(E), _tokens(U)
    often = _log_shares(E, tokens_E)
    agreeing = 0
    found: list[int] = []
    log_chance = 0.0
    for key in common:
        rows, others = of_E[key], of_U[key]
        places = rows.keys() & others.keys()
        if places and all(tokens_E[rows[place]] == tokens_U[others[place]] for place in places):
            same, orders = [rows[place] for place in places], 1
        else:
            left = Counter(tokens_E[i] for i in rows.values()) - Counter(tokens_U[i] for i in others.values())
            if left or len(rows) < 2:
                continue
            same, orders = list(rows.values()), len(others)
        agreeing += 1
        same = [i for i in same if not E.doubts or "text" not in E.doubts[i]]
        found += same
        log_chance += sum(min(max(float(logprob[i]), often[i]) + math.log(orders), 0.0) for i in same)
    K, M = len(common), agreeing
    log_chance += math.lgamma(K + 1) - math.lgamma(M + 1) - math.lgamma(K - M + 1)
    return len(found) if len(found) > 1 and log_chance < math.log(CHANCE) else 0


def _log_shares(E: RolloutBatch, tokens: list[tuple[int, ...]]) -> list[float]:
    """Of each response the logarithm of the share of the others to its prompt that are the same."""
    prompts = Counter(E.prompt_ids)
    responses = Counter(zip(E.prompt_ids, tokens, strict=True))
    shares = [
        (responses[prompt, own] - 1) / max(prompts[prompt] - 1, 1)
        for prompt, own in zip(E.prompt_ids, tokens, strict=True)
    ]
    return [math.log(share) if share > 0 else -math.inf for share in shares]


def _groups(batch: RolloutBatch, named: bool) -> dict[tuple[Hashable, ...], dict[int, int]]:
    """Of each prompt and group the response at each place, by its index in the batch.

    Where not both files have names, all rows of a prompt are one group.
    """
    found: dict[tuple[Hashable, ...], dict[int, int]] = {}
    for i, (ids, (label, place)) in enumerate(zip(batch.prompt_ids, batch.places, strict=True)):
        rows = found.setdefault((ids, label if named else None), {})
        rows[place if named else len(rows)] = i
    return found


def _tokens(batch: RolloutBatch) -> list[tuple[int, ...]]:
    """The tokens of each response."""
    return [tuple(row[own].tolist()) for row, own in zip(batch.completion_ids, batch.mask, strict=True)]

"""Whether a file of E holds the update's own responses: an E must not judge the step that it was made by."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable
from pathlib import Path

from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.errors.exceptions import DataError
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

    Groups are compared where prompt and name are the same: the responses that agree at the same places, or at any.
    Files may give one name to different groups, and short responses agree by chance. Of `n` responses of E's group
    chance lets the `m` that agree do so with a probability of about `2 C(n, m) prod p(y)` (where the places differ two
    at least, and as many times as they can be matched with U's), of `K` groups that both have the `M` with any with
    `C(K, M)` times the product of those, and only below `CHANCE` they count. `p(y)` is the policy's, or the share of
    E's other responses to the prompt that are the same, where that is larger. A single response is never enough, and
    texts that do not lead back to their tokens count for nothing.

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
        # at the same places, or else anywhere: the larger part of the two groups that is the same
        here = [rows[p] for p in rows.keys() & others.keys() if tokens_E[rows[p]] == tokens_U[others[p]]]
        anywhere = _matched(rows.values(), tokens_E, Counter(tokens_U[i] for i in others.values()))
        log_of = []
        for agreed, placed in ((here, True), (anywhere, False)):
            own = [i for i in agreed if not E.doubts or "text" not in E.doubts[i]]
            if not own or (len(own) < 2 and not placed):
                continue
            # chance picks which of E's rows agree, and with which of U's where they may stand anywhere
            ways = _log_choose(len(rows), len(own))
            if not placed:
                ways += math.lgamma(len(others) + 1) - math.lgamma(len(others) - len(own) + 1)
            log_of.append((ways + sum(max(float(logprob[i]), often[i]) for i in own), own))
        if not log_of:
            continue
        least, same = min(log_of, key=lambda pair: pair[0])
        least += math.log(2)  # the better of two ways
        if least >= 0:  # as likely as not
            continue
        agreeing += 1
        found += same
        log_chance += least
    K, M = len(common), agreeing
    log_chance += _log_choose(K, M)
    return len(found) if len(found) > 1 and log_chance < math.log(CHANCE) else 0


def _matched(rows: Iterable[int], tokens: list[tuple[int, ...]], left: Counter[tuple[int, ...]]) -> list[int]:
    """The responses of E that have one of their own among U's, each of which counts once."""
    found = []
    for i in rows:
        if left[tokens[i]] > 0:
            left[tokens[i]] -= 1
            found.append(i)
    return found


def _log_choose(n: int, k: int) -> float:
    """The logarithm of the number of ways to choose `k` of `n`."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


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

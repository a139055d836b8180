"""Which way responses are drawn: `generate`, or continuous batching where that is faster."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from probe.errors.exceptions import ConfigError
from probe.rollouts.continuous import by_continuous_batching, refusal
from probe.rollouts.decoding import Decoding, Response, by_generate
from probe.rollouts.generation import gap_limit

logger = logging.getLogger(__name__)

TRIAL_BATCHES = 4
"""Both ways are tried, on one batch each, where there are so many batches."""
TRIAL_SECONDS = 20.0
"""They are tried where `generate` would need longer than this for what is left, going by its first batch."""
FASTER = 1.25
"""Continuous batching is taken where it draws so many times as many tokens per second."""
CHECKED = 4
"""Responses, and tokens of each, that both ways are compared on."""


def draw_responses(decoding: Decoding, order: Sequence[int], alike: bool, report: Callable[[], None]) -> None:
    """Draw every response, the way that `generation.continuous_batching` says.

    Nothing of a trial is lost: what it draws are responses of the batch.

    Args:
        decoding: what is drawn.
        order: numbers of its responses, longest prompts first.
        alike: only prompts of one length may be in a batch.
        report: called as responses end.

    Raises:
        ConfigError: continuous batching is asked for, and the model does not do it.
        RolloutError: a logit is not finite.
    """
    wanted = decoding.settings.continuous_batching
    if wanted is True:
        reason = refusal(decoding) or _disagreement(decoding, order)
        if reason is not None:
            raise ConfigError(
                f"generation.continuous_batching: expected a run that transformers' continuous batching can do, found "
                f"that {reason}; set it to auto or false"
            )
        by_continuous_batching(decoding, order, report)
        return
    rest = order
    if wanted == "auto" and len(order) >= TRIAL_BATCHES * decoding.settings.batch_size and not alike:
        rest = _trial(decoding, order, report)
    by_generate(decoding, rest, alike, report)


def _trial(decoding: Decoding, order: Sequence[int], report: Callable[[], None]) -> Sequence[int]:
    """Draw some or all responses, and say which are left for `generate`."""
    if refusal(decoding) is not None:
        return order
    size = decoding.settings.batch_size
    first, second, rest = order[:size], order[size : 2 * size], order[2 * size :]
    start = time.perf_counter()
    by_generate(decoding, first, False, report)
    seconds = time.perf_counter() - start
    if seconds * (len(order) / size - 1) < TRIAL_SECONDS or _disagreement(decoding, order) is not None:
        return [*second, *rest]
    rates = [_tokens(decoding, first) / seconds]
    start = time.perf_counter()
    if not _continued(decoding, second, report):
        return [*(i for i in second if not decoding.responses[i].over), *rest]
    rates.append(_tokens(decoding, second) / (time.perf_counter() - start))
    faster = rates[1] > FASTER * rates[0]
    logger.info(
        "sampling: %s (a trial drew %.3g tokens per second by generate, %.3g by continuous batching)",
        "continuous batching" if faster else "generate",
        *rates,
    )
    if not faster:
        return rest
    _continued(decoding, rest, report)
    return [i for i in rest if not decoding.responses[i].over]


def _continued(decoding: Decoding, entries: Sequence[int], report: Callable[[], None]) -> bool:
    """Draw by continuous batching, as far as it goes: whether it has drawn all."""
    try:
        by_continuous_batching(decoding, entries, report)
    except (
        Exception
    ) as error:  # what it has finished stays, and `generate` has errors of its own where these are due
        logger.warning("sampling: generate from here on (continuous batching stopped: %s)", error)
        return False
    return True


def _tokens(decoding: Decoding, entries: Sequence[int]) -> int:
    """Tokens of these responses."""
    return sum(len(decoding.responses[i].ids) for i in entries)


def _disagreement(decoding: Decoding, order: Sequence[int]) -> str | None:
    """Why continuous batching does not draw from the policy that `generate` draws from; None where it does.

    It brings its own attention, which need not have all that a model's has (soft-capping, sinks, a window).
    """
    plain, continuous = (_few(decoding, order) for _ in range(2))
    entries = range(len(plain.responses))
    by_generate(plain, entries, True, lambda: None)
    try:
        by_continuous_batching(continuous, entries, lambda: None)
    except Exception as error:  # whatever it is, this model is not one for it
        return f"it fails on this model ({error})"
    differences = [
        x - y
        for a, b in zip(plain.responses, continuous.responses, strict=True)
        for x, y in zip(_common_entropies(a, b), _common_entropies(b, a), strict=False)
    ]
    gap = math.sqrt(sum(d * d for d in differences) / len(differences))
    limit = gap_limit(decoding.policy)
    return (
        None
        if gap <= limit
        else f"its entropies differ from generate's by {gap:.2g} nats (at most {limit} expected)"
    )


def _few(decoding: Decoding, order: Sequence[int]) -> Decoding:
    """A few tokens of a few new responses, to the longest and to the shortest prompts."""
    indices = [*order[: CHECKED // 2], *order[-CHECKED // 2 :]]
    settings = replace(decoding.settings, max_new_tokens=min(CHECKED, decoding.settings.max_new_tokens))
    return replace(
        decoding, settings=settings, responses=[Response(decoding.responses[i].prompt) for i in indices]
    )


def _common_entropies(response: Response, other: Response) -> list[float]:
    """The response's entropies as long as both have been through the same tokens."""
    same = 0
    while same < min(len(response.ids), len(other.ids)) and response.ids[same] == other.ids[same]:
        same += 1
    return response.entropies[: same + 1]

"""How much goes through the model at a time and on how many threads, chosen by a short trial on the run's own batch.

Neither changes a number by more than rounding. Both change the time by factors: a model is starved by small
microbatches, and threads that wait for each other while another job keeps the cores busy take many times as long.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

import torch

from probe.data.batch import RolloutBatch
from probe.distributed.ranks import ALONE
from probe.scoring.free_memory import bound_by_free_memory
from probe.scoring.policy import DEFAULT_TOKENS, Policy
from probe.scoring.score import score_tokens
from probe.scoring.together import together
from probe.shards import is_sharded
from probe.snapshot import operator_threads

logger = logging.getLogger(__name__)

THREAD_TOKENS = 256
"""Tokens that threads are tried on, three times."""
FASTER = 0.9
"""More threads than one are taken where they need less than this share of its time."""
BUDGETS = (1024, 2048, 4096, 8192)
"""Tokens at a time that are tried."""
TRIAL_SHARE = 0.02
"""Budgets are tried where that costs at most this share of one scoring of E."""
RISE = 1.05
"""The next budget is tried where this one has brought so many times as many tokens per second."""


@dataclass(frozen=True)
class Tuned:
    """What was chosen.

    Attributes:
        tokens: `memory_config.tokens_per_microbatch`.
        threads: `memory_config.threads`.
    """

    tokens: int
    threads: int


def tuned(policy: Policy, batch: RolloutBatch, threads: int | None = None) -> Tuned:
    """Try out and choose.

    Args:
        policy: its `tokens_per_microbatch` is kept where it has one, or counts sequences.
        batch: E.
        threads: where the number is given.

    Returns:
        What the first rank has found; all try at the same time, as they will run.
    """
    ranks = policy.ranks
    if is_sharded(policy.model):  # every forward is one of all ranks
        return _tuned(policy, batch, threads, ranks.size)
    with together(policy, "trial"):
        own = _tuned(replace(policy, ranks=ALONE), batch, threads, ranks.size)
    return ranks.from_first("what a trial has found", lambda: own)


def _tuned(policy: Policy, batch: RolloutBatch, threads: int | None, processes: int) -> Tuned:
    """What this rank finds by itself; `processes` share the memory."""
    if threads is None:
        threads = _threads(policy, batch)
    tokens = policy.tokens_per_microbatch
    if tokens is None:
        tokens = DEFAULT_TOKENS
        with operator_threads(threads):
            if policy.microbatch_size is None and _positions(batch) * TRIAL_SHARE >= sum(BUDGETS):
                tokens = _budget(policy, batch)
    known = policy.device.type == "cpu" and not is_sharded(policy.model)  # what a gradient keeps
    if known and policy.microbatch_size is None and bool(batch.mask.any()):
        few, chosen = (replace(policy, tokens_per_microbatch=n) for n in (THREAD_TOKENS, tokens))
        with operator_threads(threads):
            longest = batch.subset(torch.tensor(few.split(batch)[0]))
            bound_by_free_memory(chosen, longest, processes)
    return Tuned(tokens, threads)


def _positions(batch: RolloutBatch) -> int:
    """Tokens of prompts and responses."""
    return int(batch.lengths.sum()) + sum(len(ids) for ids in batch.prompt_ids)


def _threads(policy: Policy, batch: RolloutBatch) -> int:
    """As many as there are, or one where that is faster."""
    most = policy.ranks.from_first("threads", torch.get_num_threads)
    if most == 1 or policy.device.type != "cpu" or not bool(batch.mask.any()):
        return most
    small = replace(policy, microbatch_size=None, tokens_per_microbatch=THREAD_TOKENS)
    # the shortest, of which there are the most at a time
    few = batch.subset(torch.tensor(small.split(batch)[-1]))
    with operator_threads(1):
        score_tokens(small, few)  # what happens once
        one = _seconds(small, few)
    many = _seconds(small, few)
    chosen = most if many < FASTER * one else 1
    logger.info("threads: %d (a trial took %.3g s with 1, %.3g s with %d)", chosen, one, many, most)
    return chosen


def _budget(policy: Policy, batch: RolloutBatch) -> int:
    """The tokens at a time from which on more of them bring little."""
    best, best_rate = BUDGETS[0], 0.0
    for tokens in BUDGETS:
        at = replace(policy, tokens_per_microbatch=tokens)
        microbatches = at.split(batch)
        few = batch.subset(torch.tensor(microbatches[len(microbatches) // 2]))
        seconds = _seconds(at, few)
        if "forward" in policy.traffic.room:
            break
        rate = _positions(few) / seconds
        if rate > best_rate * RISE:
            best, best_rate = tokens, rate
        else:
            break
    logger.info("tokens_per_microbatch: %d (a trial scored %.3g tokens per second)", best, best_rate)
    return best


def _seconds(policy: Policy, batch: RolloutBatch) -> float:
    """How long a scoring takes; the first rank's clock is that of all that share it."""
    start = time.perf_counter()
    score_tokens(policy, batch)
    if policy.device.type == "cuda":
        torch.cuda.synchronize(policy.device)
    return policy.ranks.from_first("seconds", lambda: time.perf_counter() - start)

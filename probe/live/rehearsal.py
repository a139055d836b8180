"""What is tried when the probe is attached: a few tokens, and the passes of the longest responses that can occur.

What does not work, or needs more memory than there is, should show at the start and not at step 900.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from probe.data.batch import RolloutBatch
from probe.distributed.ranks import ALONE
from probe.live.settings import WatchSettings
from probe.live.source import Source
from probe.phases.passes import Way, choose_way, longest_pass
from probe.rollouts.draw import stream_seed
from probe.rollouts.generation import encode_prompts
from probe.rollouts.sampling import check_sampling, sample_rollouts
from probe.scoring.microbatch import at_a_time
from probe.scoring.policy import Policy
from probe.scoring.score import score_tokens
from probe.scoring.together import together
from probe.shards import is_sharded

REHEARSAL_TOKENS = 16
"""Tokens of the responses that are really sampled."""


def rehearsed_way(policy: Policy, source: Source, settings: WatchSettings) -> Way:
    """How this model can be differentiated; sampling and the passes of a probe are tried on the way.

    Args:
        policy: at the weights it has now.
        source: of E.
        settings: of the watch.

    Raises:
        MemoryExhaustedError: there is no memory for the longest responses that can occur.
        NumericalError: forward mode is asked for and cannot be had.
    """
    ranks = policy.ranks
    if is_sharded(policy.model):  # every forward is one of all ranks
        with ranks.together("rehearsal"):
            return _rehearsed(policy, source, settings)
    with together(policy, "rehearsal"):  # each tries on its own device what all will do
        own = _rehearsed(replace(policy, ranks=ALONE), source, settings)
    ways = ranks.gathered("ways", own)
    return next((way for way in ways if way.mode != "jvp"), ways[0])


def _rehearsed(policy: Policy, source: Source, settings: WatchSettings) -> Way:
    """The way that this rank has found."""
    tokenizer, prompts = source.tokenizer, source.prompts
    encoded = encode_prompts(tokenizer, prompts)
    longest = max(range(len(prompts)), key=lambda i: len(encoded[i]))
    few = replace(settings.generation, max_new_tokens=min(settings.max_new_tokens, REHEARSAL_TOKENS))
    seed = stream_seed(settings.seed, "rehearsal")
    E, seen = sample_rollouts(policy, tokenizer, [prompts[longest], prompts[0]], few, seed)
    check_sampling(policy, seen, score_tokens(policy, E))
    way = choose_way(policy, E, settings.derivative, otherwise="finite_difference")
    # where `target_se` chooses the size of E it may grow, and a microbatch is full
    size = at_a_time(len(encoded[longest]) + settings.max_new_tokens - 1, *policy.limits("forward"))
    assert size is not None  # `limits` has one at least
    rows = policy.ranks.size * (size if settings.target_se else min(size, settings.B_E))
    batch = longest_responses(encoded[longest], rows, settings.max_new_tokens)
    policy = replace(policy, share_prompts=False)  # those of E may all be different, which takes more memory
    return longest_pass(policy, batch, way, binding=settings.derivative == "jvp")


def longest_responses(prompt: Sequence[int], rows: int, new: int) -> RolloutBatch:
    """Responses that nobody has sampled, of the length at which sampling is cut off: memory does not depend on tokens.

    Args:
        prompt: token ids, from which those of the responses are taken too.
        rows: how many responses.
        new: tokens of each.

    >>> longest_responses([5, 6], 2, 3).completion_ids.tolist()
    [[5, 6, 5], [5, 6, 5]]
    """
    tokens = torch.tensor(prompt).repeat(-(-new // len(prompt)))[:new]
    return RolloutBatch(
        prompts=("",) * rows,
        completions=("",) * rows,
        prompt_ids=(tuple(prompt),) * rows,
        completion_ids=tokens.repeat(rows, 1),
        mask=torch.ones(rows, new, dtype=torch.bool),
        truncated=torch.ones(rows, dtype=torch.bool),
        group=torch.arange(rows),
    )

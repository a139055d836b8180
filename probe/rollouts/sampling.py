"""Sampling responses from the policy that is scored (exactly in float32; a half-precision model's logits are rounded).

transformers runs the decoding loop (caches, padding, stopping), by `generate` or by continuous batching; the token is
chosen here, by inverting the cumulative distribution of `softmax(logits / temperature)` at a uniform number that
belongs to the sequence and the step. So the draw does not depend on how sequences are batched, no hidden `top_k` or
repetition penalty can enter, and the global random state is neither read nor advanced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probe.config.batches import GenerationConfig
from probe.data.batch import PromptExample, RolloutBatch
from probe.distributed.lockstep import lockstep
from probe.distributed.ranks import Ranks
from probe.errors.exceptions import RanksApartError, RolloutError
from probe.errors.remedies import Remedy
from probe.finite import require_finite_weights
from probe.parameters import without_adapters
from probe.rollouts.decoders import draw_responses
from probe.rollouts.decoding import Decoding, Response
from probe.rollouts.generation import encode_prompts, gap_limit, own_generation_config, padding_matters
from probe.scoring.collector import Progress
from probe.scoring.policy import Policy
from probe.scoring.room import check_prompts
from probe.scoring.scores import TokenScores


@dataclass(frozen=True)
class SampledTokens:
    """What sampling itself saw, for the check that sampling equals scoring.

    Attributes:
        logprob: log-prob of each sampled token at the time, `(B, T)` float64, 0 outside the mask.
        entropy: entropy of the distribution it was drawn from, `(B, T)` float64.
        continuous: responses that continuous batching has drawn; the others are from `generate`.
    """

    logprob: Tensor
    entropy: Tensor
    continuous: int = 0


def sample_rollouts(
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[PromptExample],
    settings: GenerationConfig,
    seed: int,
    group: Tensor | None = None,
    progress: Progress | None = None,
) -> tuple[RolloutBatch, SampledTokens]:
    """Draw one response per entry of `prompts` (repeat a prompt to draw several).

    The response of entry `i` is a function of the prompt, the weights, `seed` and `i` alone, up to the rounding of
    the logits: the batch size changes a token only where a uniform number falls within rounding of a boundary.
    The sampled EOS belongs to the response; nothing after it does.

    Args:
        policy: the policy.
        tokenizer: its tokenizer, with an EOS token.
        prompts: `B` entries.
        settings: temperature, cap on tokens, stop strings and batch size.
        seed: of the uniform numbers, one independent stream per entry.
        group: `(B,)` group of each entry; by default every entry is its own.
        progress: called as responses end.

    Returns:
        The batch, and the scores seen while sampling.

    Raises:
        ValueError: `policy.temperature` differs from the settings' (sampling would not equal scoring).
        DataError: no prompts, or a prompt without tokens, or with tokens that the model has no row for.
        RolloutError: a response may become longer than the model has positions for, or there is no EOS.
        NumericalError: a weight is NaN or infinite.
    """
    require_finite_weights(policy.model)
    if settings.temperature != policy.temperature:
        raise ValueError(f"expected one temperature, found {settings.temperature} and {policy.temperature}")
    prompt_ids = encode_prompts(tokenizer, prompts)
    check_prompts(policy.model, prompt_ids, settings.max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompt_ids[i]))
    alike = padding_matters(policy, tokenizer, [prompt_ids[order[0]], prompt_ids[order[-1]]], settings)
    responses, ranks = [Response(ids) for ids in prompt_ids], policy.ranks

    def report() -> None:
        done = sum(r.over for r in responses) * ranks.size  # the others are taken to be as far
        if progress is not None and (ranks.size == 1 or done < len(responses)):
            progress(done, len(responses))

    own = _own_entries(order, settings.batch_size, ranks)
    with (
        ranks.together("sampling"),
        lockstep(policy.model, ranks, autocast=policy.autocast, called=without_adapters(policy.model)),
        own_generation_config(policy.model, tokenizer, settings) as eos_ids,
    ):
        if own:
            decoding = Decoding(policy, tokenizer, settings, seed, eos_ids, responses)
            draw_responses(decoding, own, alike, report)
    drawn = {
        i: r
        for found in ranks.gathered("responses", {i: responses[i] for i in own})
        for i, r in found.items()
    }
    if sorted(drawn) != list(range(len(responses))) or any(drawn[i].prompt != prompt_ids[i] for i in drawn):
        raise RanksApartError(
            "expected every rank to draw its own responses to the same prompts, found others"
        )
    responses = [drawn[i] for i in range(len(responses))]
    if progress is not None and ranks.size > 1:
        progress(len(responses), len(responses))
    return _assemble(tokenizer, prompts, responses, settings, group)


def _own_entries(order: Sequence[int], batch_size: int, ranks: Ranks) -> list[int]:
    """The entries that this rank draws: whole batches in turn, smaller ones where there are too few."""
    size = min(batch_size, -(-len(order) // ranks.size))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return [i for batch in batches[ranks.rank :: ranks.size] for i in batch]


def check_sampling(policy: Policy, seen: SampledTokens, scores: TokenScores) -> float:
    """Root mean square difference of log-probs while sampling and when scored, nats per token.

    Args:
        policy: the policy, for its precision.
        seen: what `sample_rollouts` saw.
        scores: scores of the same batch.

    Raises:
        RolloutError: it is too large for rounding: the sampler and the scorer see different policies.
    """
    difference = (seen.logprob - scores.logprob)[scores.mask]
    gap, limit = float(difference.square().mean().sqrt()), gap_limit(policy)
    if not gap <= limit:
        raise RolloutError(
            f"expected sampling and scoring to see the same policy, found log-probs that differ by {gap:.2g} nats "
            f"per token (root mean square, at most {limit} expected); the model's cached decoding changes its output "
            "(try ",
            Remedy.ATTENTION,
            ": eager)",
        )
    return gap


def _assemble(
    tokenizer: Any,
    prompts: Sequence[PromptExample],
    responses: Sequence[Response],
    settings: GenerationConfig,
    group: Tensor | None,
) -> tuple[RolloutBatch, SampledTokens]:
    """Pad the responses into a batch."""
    B, T = len(responses), max(len(r.ids) for r in responses)
    completion_ids = torch.zeros(B, T, dtype=torch.int64)
    mask = torch.zeros(B, T, dtype=torch.bool)
    logprob, entropy = torch.zeros(B, T, dtype=torch.float64), torch.zeros(B, T, dtype=torch.float64)
    for i, response in enumerate(responses):
        n = len(response.ids)
        completion_ids[i, :n], mask[i, :n] = torch.tensor(response.ids), True
        logprob[i, :n] = torch.tensor(response.logprobs, dtype=torch.float64)
        entropy[i, :n] = torch.tensor(response.entropies, dtype=torch.float64)
    batch = RolloutBatch(
        prompts=tuple(p.text for p in prompts),
        completions=tuple(tokenizer.batch_decode([r.ids for r in responses], skip_special_tokens=True)),
        prompt_ids=tuple(r.prompt for r in responses),
        completion_ids=completion_ids,
        mask=mask,
        truncated=torch.tensor([r.truncated for r in responses]),
        group=torch.arange(B) if group is None else group,
        rows=tuple(p.row for p in prompts),
        bias_flags=("truncated_support",) if settings.truncates_support else (),
    )
    return batch, SampledTokens(logprob, entropy, sum(r.continuous for r in responses))

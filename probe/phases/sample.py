"""Phase 0: E and U, with rewards and advantages, and E's scores."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probe.config.batches import BatchConfig
from probe.config.schema import ProbeConfig
from probe.data.batch import PromptExample, RolloutBatch
from probe.data.named import default_reward, named_dataset
from probe.data.prompts import load_prompts
from probe.data.reward_calls import compute_rewards, resolve_rewards
from probe.data.rewards import RewardFunction
from probe.errors.exceptions import ConfigError, DataError, RolloutError
from probe.estimators.advantages import combined_advantages, group_advantages
from probe.estimators.on_policy import on_policy_z
from probe.from_checkpoint.sources import SettingSources
from probe.phases.controls import ControlSource, control_source
from probe.rollouts.draw import draw_prompts, stream_seed
from probe.rollouts.generation import end_ids
from probe.rollouts.read import read_rollouts
from probe.rollouts.sampling import SampledTokens, check_sampling, sample_rollouts
from probe.rollouts.shared import check_different_files, shared_responses
from probe.rollouts.tables import Part
from probe.scoring.collector import MakeProgress, Progress, no_progress
from probe.scoring.policy import Policy
from probe.scoring.room import check_batch
from probe.scoring.score import score_tokens
from probe.scoring.scores import TokenScores
from probe.scoring.tuning import tuned
from probe.snapshot import operator_threads

logger = logging.getLogger(__name__)

Prompts = tuple[Sequence[PromptExample], Sequence[PromptExample]]
"""What E and U are sampled from; empty where a rollout file gives the batch."""


@dataclass(frozen=True)
class BatchSource:
    """What E and U are made from.

    Attributes:
        policy: at the checkpoint's weights.
        tokenizer: the policy's.
        config: the configuration that counts.
        sources: where the settings of the update come from.
        prompts: drawn for E and U.
        seed: master seed.
        next_update: the number of the update after the checkpoint's; None where it is not known.
        checkpoint: its path.
    """

    policy: Policy
    tokenizer: Any
    config: ProbeConfig
    sources: SettingSources
    prompts: Prompts
    seed: int
    next_update: int | None
    checkpoint: str | None


@dataclass(frozen=True)
class Sample:
    """E and U.

    Attributes:
        E: the evaluation batch.
        U: the update batch, with rewards and advantages.
        E_scores: scores of E at the checkpoint's weights.
        E_seen: what sampling itself saw of E; None where E comes from a file.
        U_seen: the same of U.
        controls: what control variates are made from.
        shared: responses of E, from a file, that are the update's own.
        sampling_gap: root mean square difference of log-probs while sampling and scored, nats per token; None where E
            was not sampled.
        on_policy_z: see `probe.estimators.on_policy`.
        config: the configuration, with what U's file has settled about its advantages.
        sources: where its settings come from.
        sampling_threads: threads of torch's operators that E was sampled on: those of the configuration, or else of the
            process. Never those of a trial, whose choice is the clock's: threads round differently, and a sampled
            token can depend on it.
        threads: threads that the passes run on.
        processes: that sampling and passes are shared out to.
    """

    E: RolloutBatch
    U: RolloutBatch
    E_scores: TokenScores
    E_seen: SampledTokens | None
    U_seen: SampledTokens | None
    controls: ControlSource
    shared: int
    sampling_gap: float | None
    on_policy_z: float
    config: ProbeConfig
    sources: SettingSources
    sampling_threads: int
    threads: int
    processes: int = 1

    @property
    def drawn_continuously(self) -> int | None:
        """Responses of E and U that continuous batching has drawn; None where nothing was sampled."""
        seen = [s for s in (self.E_seen, self.U_seen) if s is not None]
        return sum(s.continuous for s in seen) if seen else None


def sample(source: BatchSource, progress: MakeProgress = no_progress) -> Sample:
    """Draw E and U with rewards and advantages, and score E.

    Args:
        source: what they are made from.
        progress: makes a progress callback from the name of a pass.

    Raises:
        DataError: prompts, rewards or rollout files cannot be used.
        RolloutError: all responses are empty, or sampling does not match scoring.
        NumericalError: a score is not finite.
    """
    policy, batch = source.policy, source.config.batch_config
    E, E_seen = _evaluation_batch(source, progress)
    U, U_seen = _update_responses(source, progress)
    U, source = with_advantages(source, U)
    for drawn in (E, U):  # before the features of U's tokens are looked up
        check_batch(policy.model, drawn)
    file = batch.E_rollouts
    draw = f"seed {source.seed}" if file is None else f"file {Path(file).resolve()}"
    controls = control_source(policy, E, U, source.config.probe_rework, source.checkpoint, draw)
    basis = None if controls.memory is None else controls.memory.basis
    source, threads = with_tuned_passes(source, E)
    policy = source.policy
    with operator_threads(threads):
        scores = score_tokens(policy, E, progress("score E"), basis)
    return Sample(
        E=E,
        U=U,
        E_scores=scores,
        E_seen=E_seen,
        U_seen=U_seen,
        controls=controls,
        shared=shared_responses(E, U, scores.sequence_logprob),
        sampling_gap=None if E_seen is None else check_sampling(policy, E_seen, scores),
        on_policy_z=on_policy_z(scores),
        config=source.config,
        sources=source.sources,
        sampling_threads=torch.get_num_threads(),
        threads=threads,
        processes=policy.ranks.size,
    )


def with_tuned_passes(source: BatchSource, E: RolloutBatch) -> tuple[BatchSource, int]:
    """The source with the budget of tokens that E is tried on for, and the threads that its passes are fastest on.

    What E and U are drawn with never depends on them.

    Args:
        source: policy and configuration.
        E: drawn.
    """
    memory = source.config.memory_config
    found = tuned(source.policy, E, memory.number_of_threads)
    by_tokens = memory.microbatch_size == "auto"
    memory = replace(
        memory, tokens_per_microbatch=found.tokens if by_tokens else memory.tokens_per_microbatch
    )
    policy = replace(source.policy, tokens_per_microbatch=memory.tokens_per_microbatch)
    return replace(source, policy=policy, config=replace(source.config, memory_config=memory)), found.threads


def chosen_rewards(batch: BatchConfig) -> tuple[RewardFunction, ...]:
    """The rewards of the update batch.

    Raises:
        ConfigError: there are more or fewer weights, or one cannot be imported.
    """
    rewards, weights = resolve_rewards(default_reward(batch)), batch.reward_weights
    if weights is not None and len(weights) != len(rewards):
        raise ConfigError(
            f"batch_config.reward_weights: expected one for each of {len(rewards)} rewards, found {len(weights)}"
        )
    return rewards


def drawn_prompts(batch: BatchConfig, tokenizer: Any, seed: int, next_update: int | None) -> Prompts:
    """The prompts to sample E and U from.

    `next_update` is the number of the update after the checkpoint's.

    Raises:
        DataError: there are too few, or they cannot be read.
    """
    if batch.E_rollouts is not None and batch.U_rollouts is not None:
        check_different_files(batch.E_rollouts, batch.U_rollouts, next_update)
    B_E = 0 if batch.E_rollouts is not None else batch.B_E
    B_U = 0 if batch.U_rollouts is not None else batch.B_U
    if B_E == 0 and B_U == 0:
        return [], []
    examples = load_prompts(batch, tokenizer)
    E_index, U_index = draw_prompts(len(examples), B_E, B_U, batch.disjoint, seed)
    return [examples[i] for i in E_index], [examples[i] for i in U_index]


def _evaluation_batch(
    source: BatchSource, progress: MakeProgress
) -> tuple[RolloutBatch, SampledTokens | None]:
    """E, and what sampling saw of it."""
    batch = source.config.batch_config
    if batch.E_rollouts is None:
        return sample_evaluation(source, "E", progress("sample E"))
    E = _read(source, batch.E_rollouts, "E")
    logger.info("E: %d responses from %s; B_E does not apply", len(E), E.source)
    return E, None


def sample_evaluation(
    source: BatchSource, stream: str, progress: Progress | None = None
) -> tuple[RolloutBatch, SampledTokens]:
    """Sample an evaluation batch from the policy.

    Args:
        source: the policy, and E's prompts.
        stream: name of the random stream, each of which gives an independent draw.
        progress: called after each batch.
    """
    return _sample(source, stream, source.prompts[0], source.config.batch_config.G_E, progress)


def _sample(
    source: BatchSource,
    stream: str,
    prompts: Sequence[PromptExample],
    times: int,
    progress: Progress | None,
) -> tuple[RolloutBatch, SampledTokens]:
    """Responses to every prompt, `times` each, from a random stream of their own."""
    repeated = [prompt for prompt in prompts for _ in range(times)]
    group: Tensor = torch.arange(len(prompts)).repeat_interleave(times)
    seed = stream_seed(source.seed, stream)
    return sample_rollouts(
        source.policy, source.tokenizer, repeated, source.config.generation, seed, group, progress
    )


def _update_responses(
    source: BatchSource, progress: MakeProgress
) -> tuple[RolloutBatch, SampledTokens | None]:
    """The responses of U, and what sampling saw of them."""
    batch = source.config.batch_config
    if batch.U_rollouts is None:
        return _sample(source, "U", source.prompts[1], batch.G, progress("sample U"))
    U = _read(source, batch.U_rollouts, "U")
    groups = len(U.group.unique())
    logger.info("U: %d groups, %d responses from %s; B_U and G do not apply", groups, len(U), U.source)
    rows = source.sources.rows
    if rows is not None and len(U) > rows and U.loss_tokens is None:
        raise DataError(
            f"batch_config.U_rollouts: expected the {rows} responses of one update (several are made from one "
            f"generation), found {len(U)} in {U.source}, which does not tell them apart; record them with "
            "RolloutRecorderCallback, or set probe_rework.from_checkpoint: off to take all"
        )
    return U, None


def with_advantages(source: BatchSource, U: RolloutBatch) -> tuple[RolloutBatch, BatchSource]:
    """U with rewards and advantages, and the source with what its file has settled about these.

    Args:
        source: rewards, weights and the kind of advantage.
        U: from a file, perhaps with either; or sampled, with neither.

    Raises:
        DataError: U comes from a file without rewards, and none are configured.
    """
    batch = source.config.batch_config
    if batch.U_rollouts is None:
        return _rewarded(source, U), source
    if U.advantages is not None and source.config.probe_rework.advantage == "auto":
        return U, source  # what the trainer made the update with
    if U.rewards is None and batch.reward is None:
        advice = "" if U.advantages is None else ", or leave probe_rework.advantage at auto"
        raise DataError(
            f"batch_config.U_rollouts: expected a column with rewards in {batch.U_rollouts}, found none; name "
            f"it with batch_config.reward_columns, or set batch_config.reward to compute them{advice}"
        )
    config, sources = source.sources.from_rewards(source.config)
    source = replace(source, config=config, sources=sources)
    if U.rewards is None:
        return _rewarded(source, U), source
    advantages = group_advantages(U.rewards, U.group, config.probe_rework.advantage_kind)
    return replace(U, advantages=advantages), source


def _rewarded(source: BatchSource, U: RolloutBatch) -> RolloutBatch:
    """U with what the reward functions of the configuration give it."""
    batch, rework = source.config.batch_config, source.config.probe_rework
    # once: a reward may call another machine, keep a state or draw random numbers
    given = source.policy.ranks.from_first("rewards", lambda: compute_rewards(chosen_rewards(batch), U))
    rewards, advantages = combined_advantages(
        given,
        batch.reward_weights,
        U.group,
        rework.advantage_kind,
        rework.multi_objective_aggregation,
    )
    return replace(U, rewards=rewards, advantages=advantages)


def evaluation_rewards(source: BatchSource, E: RolloutBatch) -> tuple[Tensor | None, str]:
    """The rewards of E, `(B,)` with NaN where none applies: those of its file, or of the configuration's functions.

    Args:
        source: reward functions and weights.
        E: the evaluation batch.

    Returns:
        The rewards, or None and why there are none.

    Raises:
        DataError: a reward cannot be computed, or is infinite.
    """
    batch = source.config.batch_config
    if E.rewards is not None:
        return E.rewards, ""
    if batch.E_rollouts is not None and batch.reward is None:
        return None, f"{batch.E_rollouts} has no rewards, and batch_config.reward names none"
    if batch.reward is None and not named_dataset(batch).reward:
        return (
            None,
            f"batch_config.reward names none, and data set {batch.dataset_name!r} has none of its own",
        )
    given = source.policy.ranks.from_first("rewards of E", lambda: compute_rewards(chosen_rewards(batch), E))
    # only their weighted sum is wanted, for which groups are nothing
    rewards, _ = combined_advantages(given, batch.reward_weights, E.group, "dr_grpo", "sum_then_normalize")
    return rewards, ""


def _read(source: BatchSource, path: str, part: Part) -> RolloutBatch:
    """A batch from a file; errors name its key."""
    policy, generation = source.policy, source.config.generation
    try:
        return read_rollouts(
            path,
            source.tokenizer,
            source.config.batch_config,
            generation.max_new_tokens,
            policy.model.get_input_embeddings().weight.shape[0],  # type: ignore[operator]
            source.next_update,
            stop_strings=generation.stop_strings,
            eos_ids=end_ids(policy.model, source.tokenizer),
            part=part,
        )
    except (DataError, RolloutError) as error:
        if str(error).startswith("batch_config."):
            raise
        raise type(error)(f"batch_config.{part}_rollouts: {error}") from error

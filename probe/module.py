"""The LightningModule that holds the policy under the probe and runs the phases' model passes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from probe.config import ProbeConfig
from probe.data.batch import PromptExample, RolloutBatch
from probe.data.prompts import default_reward, load_prompts
from probe.data.rewards import RewardFunction, compute_rewards, resolve_reward
from probe.errors import ConfigError, DataError, RolloutError
from probe.estimators.advantages import count_zero_advantage_groups, group_advantages
from probe.estimators.derivative_check import derivative_check
from probe.estimators.entropy_gradient import EntropyGradient, entropy_gradient
from probe.estimators.losses import LossSettings
from probe.estimators.prediction import Prediction, first_order
from probe.estimators.snis import GroundTruth, snis
from probe.estimators.update import (
    Update,
    adam_closed_form,
    loss_gradient,
    optimizer_step,
    preconditioned_direction,
)
from probe.loading import (
    CheckpointFiles,
    LoadedOptimizer,
    load_optimizer,
    load_policy_model,
    load_tokenizer,
    locate_checkpoint,
)
from probe.rollouts.draw import draw_prompts
from probe.rollouts.files import read_rollouts
from probe.rollouts.sampling import SampledTokens, sample_rollouts
from probe.scoring.passes import Policy, Progress, score_tokens
from probe.scoring.scores import TokenScores
from probe.snapshot import parameters_at
from probe.state import ProbeState

logger = logging.getLogger(__name__)

MakeProgress = Callable[[str], Progress]
"""Given the name of a pass, the function to call with its progress."""

DEMO = "demo"
"""Value of `checkpoint.checkpoint_path` that names the built-in demo policy (a folder of that name is `./demo`)."""
ON_POLICY_LIMIT = 4.0
"""E is marked as not drawn from the probed policy when `on_policy_z` is larger than this."""
SAMPLING_GAP_LIMIT = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest root mean square difference, in nats per token, between log-probs while sampling and when scored."""


def _no_progress(what: str) -> Progress:
    return lambda done, total: None


class EntropyProbe(LightningModule):
    """A policy, its optimizer and the batches of a probe; each method is one phase.

    The methods leave parameters, optimizer and generators bitwise as they found them. `ProbeRunner` calls them in
    order; a notebook can call them one by one.
    """

    def __init__(self, config: ProbeConfig, seed: int = 42) -> None:
        """Nothing is loaded before `load`.

        Args:
            config: the sections of the configuration.
            seed: master seed of the batches, used where `probe_rework.master_seed` is null.
        """
        super().__init__()
        self.config = config
        self.seed = seed if config.probe_rework.master_seed is None else config.probe_rework.master_seed
        self.checkpoint = config.checkpoint
        self.files: CheckpointFiles | None = None
        self.model: nn.Module | None = None
        self.tokenizer: Any = None
        self.prompts: tuple[list[PromptExample], list[PromptExample]] = ([], [])
        self.optimizer: LoadedOptimizer | None = None
        self.autocast: Callable[[], AbstractContextManager[object]] = nullcontext

    # ---------------------------------------------------------------- loading

    def load(self, device: torch.device) -> None:
        """Load policy, tokenizer and optimizer state from the checkpoint; does nothing when they are there.

        Raises:
            ConfigError: no checkpoint is named.
            CheckpointError: the checkpoint is incomplete or unreadable.
            OptimizerStateError: the optimizer's state does not belong to the model.
        """
        if self.model is not None:
            return
        if self.checkpoint.checkpoint_path is None:
            raise ConfigError(
                "checkpoint.checkpoint_path: expected a checkpoint folder (or `demo`), found none; set it in the "
                "config or pass --checkpoint.checkpoint_path PATH"
            )
        if self.config.batch_config.U_rollouts is None:
            self._reward()  # a misspelt reward should not cost the loading of a model
        self.make_demo()
        files = locate_checkpoint(self.checkpoint)
        self.files = replace(files, name=DEMO) if self.config.checkpoint.checkpoint_path == DEMO else files
        self.tokenizer = load_tokenizer(self.checkpoint, self.files)
        self.prompts = self._draw_prompts()  # what is wrong with the data shows before the model is loaded
        model, _ = load_policy_model(self.checkpoint, self.files, device, self.tokenizer)
        self.optimizer = load_optimizer(
            model, self.files, self.checkpoint, learning_rate=self.config.probe_rework.learning_rate
        )
        self.model = model

    def make_demo(self) -> None:
        """Where the demo policy is asked for, take its folder, in which it is trained where the cache has none."""
        if self.checkpoint.checkpoint_path == DEMO:
            from probe.demo import ensure_demo_checkpoint  # trains a policy with this module's own parts

            self.checkpoint = replace(self.checkpoint, checkpoint_path=str(ensure_demo_checkpoint()))

    @property
    def policy(self) -> Policy:
        """The policy as the passes see it."""
        if self.model is None:
            raise RuntimeError("expected a loaded policy, found none; call load(device) first")
        memory = self.config.memory_config
        return Policy(
            model=self.model,
            temperature=self.config.generation.temperature,
            microbatch_size=memory.microbatch_size,
            head_chunk_tokens=memory.head_chunk_tokens,
            autocast=self.autocast,
        )

    @property
    def loaded_optimizer(self) -> LoadedOptimizer:
        """The optimizer with its state."""
        if self.optimizer is None:
            raise RuntimeError("expected a loaded optimizer, found none; call load(device) first")
        return self.optimizer

    # ---------------------------------------------------------------- phase 0

    def sample(self, state: ProbeState, progress: MakeProgress = _no_progress) -> None:
        """Draw E and U with rewards and advantages, and score E: fills `state.E`, `state.U`, `state.E_scores`.

        Raises:
            DataError: prompts, rewards or rollout files cannot be used.
            RolloutError: all responses are empty, or sampling does not match scoring.
            NumericalError: a score is not finite.
        """
        batch = self.config.batch_config
        E_prompts, U_prompts = self.prompts
        if batch.E_rollouts is not None:
            state.E = self._read(batch.E_rollouts)
            logger.info("E: %d responses from %s; B_E does not apply", len(state.E), state.E.source)
        else:
            state.E, state.seen["E"] = self._sample("E", E_prompts, None, progress("sample E"))
        state.U = self._update_batch(state, U_prompts, progress)
        state.E_scores = score_tokens(self.policy, state.E, progress("score E"))
        if "E" in state.seen:
            state.diagnostics["sampling_scoring_gap"] = self._check_sampling(state.seen["E"], state.E_scores)
        state.diagnostics["on_policy_z"] = on_policy_z(state.E_scores)

    def _draw_prompts(self) -> tuple[list[PromptExample], list[PromptExample]]:
        """The prompts to sample E and U from (empty where a rollout file gives the batch)."""
        batch = self.config.batch_config
        B_E = 0 if batch.E_rollouts is not None else batch.B_E
        B_U = 0 if batch.U_rollouts is not None else batch.B_U
        if B_E == 0 and B_U == 0:
            return [], []
        examples = load_prompts(batch, self.tokenizer)
        E_index, U_index = draw_prompts(len(examples), B_E, B_U, batch.disjoint, self.seed)
        return [examples[i] for i in E_index], [examples[i] for i in U_index]

    def _sample(
        self, name: str, prompts: list[PromptExample], group: Tensor | None, progress: Progress
    ) -> tuple[RolloutBatch, SampledTokens]:
        """Sample a response per prompt, from the batch's own random stream."""
        seed = stream_seed(self.seed, name)
        return sample_rollouts(
            self.policy, self.tokenizer, prompts, self.config.generation, seed, group, progress
        )

    def _reward(self) -> RewardFunction:
        """The reward of the update batch."""
        return resolve_reward(default_reward(self.config.batch_config))

    def _read(self, path: str) -> RolloutBatch:
        batch = self.config.batch_config
        vocabulary = self.policy.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        return read_rollouts(path, self.tokenizer, batch, self.config.generation.max_new_tokens, vocabulary)

    def _update_batch(
        self, state: ProbeState, prompts: list[PromptExample], progress: MakeProgress
    ) -> RolloutBatch:
        """U with rewards and advantages."""
        batch = self.config.batch_config
        if batch.U_rollouts is not None:
            U = self._read(batch.U_rollouts)
            groups = len(U.group.unique())
            logger.info(
                "U: %d groups, %d responses from %s; B_U and G do not apply", groups, len(U), U.source
            )
            rewards = U.rewards
            if rewards is None:
                raise DataError(
                    f"batch_config.U_rollouts: expected a column with rewards in {batch.U_rollouts}, found none; name "
                    "it with batch_config.reward_columns"
                )
        else:
            repeated = [prompt for prompt in prompts for _ in range(batch.G)]
            group = torch.arange(len(prompts)).repeat_interleave(batch.G)
            U, state.seen["U"] = self._sample("U", repeated, group, progress("sample U"))
            rewards = compute_rewards(self._reward(), U)
        advantages = group_advantages(rewards, U.group, self.config.probe_rework.advantage_kind)
        return replace(U, rewards=rewards, advantages=advantages)

    def _check_sampling(self, seen: SampledTokens, scores: TokenScores) -> float:
        """Root mean square difference of log-probs while sampling and when scored, nats per token.

        Raises:
            RolloutError: it is too large for rounding: the sampler and the scorer see different policies.
        """
        difference = (seen.logprob - scores.logprob)[scores.mask]
        gap = float(difference.square().mean().sqrt())
        dtypes = {p.dtype for p in self.policy.model.parameters()} & set(SAMPLING_GAP_LIMIT)
        limit = max(SAMPLING_GAP_LIMIT[d] for d in dtypes)
        with self.autocast():
            if torch.is_autocast_enabled(self.policy.device.type):
                limit = max(limit, SAMPLING_GAP_LIMIT[torch.bfloat16])
        if not gap <= limit:
            raise RolloutError(
                f"expected sampling and scoring to see the same policy, found log-probs that differ by {gap:.2g} nats "
                f"per token (root mean square, at most {limit} expected); the model's cached decoding or its padding "
                "changes its output (try checkpoint.attn_implementation: eager)"
            )
        return gap

    # ---------------------------------------------------------------- phases 1 to 3

    def entropy_gradient(self, state: ProbeState, progress: MakeProgress = _no_progress) -> EntropyGradient:
        """X on E.

        Raises:
            NumericalError: the gradients cannot be trusted (see `derivative_check`) or are not finite.
        """
        E, scores = _there(state.E, "E"), _there(state.E_scores, "E_scores")
        rework = self.config.probe_rework
        if rework.derivative_check:
            few = torch.nonzero(E.lengths > 0).flatten()[: self.config.memory_config.microbatch_size]
            check = derivative_check(self.policy, E.subset(few))
            state.diagnostics["derivative_check_error"] = check.relative_error
        return entropy_gradient(
            self.policy, E, scores, rework.weighting, rework.baseline, progress=progress("gradient on E")
        )

    def update(self, state: ProbeState, progress: MakeProgress = _no_progress) -> Update:
        """The loss's gradient on U and the optimizer's real step, taken on a snapshot."""
        U, policy = _there(state.U, "U"), self.policy
        rework = self.config.probe_rework
        reference = self._reference_logprobs(U, progress) if rework.kl_coef > 0 else None
        found = loss_gradient(policy, U, self.loss_settings, reference, progress("gradient on U"))
        if "U" in state.seen:
            self._check_sampling(state.seen["U"], found.scores)
        optimizer = self.loaded_optimizer
        step, new, norm, factor = optimizer_step(
            optimizer.optimizer,
            policy.parameters,
            found.gradient,
            rework.max_grad_norm,
            self.config.importance.snapshot_device,
        )
        state.diagnostics["zero_advantage_groups"] = count_zero_advantage_groups(U.advantages, U.group)
        return Update(
            step=step,
            new_parameters=new,
            gradient=found.gradient,
            gradient_norm=norm,
            clip_factor=factor,
            learning_rate=optimizer.learning_rate,
            loss_weights=found.weights,
            scores=found.scores,
        )

    @property
    def loss_settings(self) -> LossSettings:
        """The loss of the update."""
        rework = self.config.probe_rework
        return LossSettings(
            loss=rework.loss,
            max_new_tokens=self.config.generation.max_new_tokens,
            clip_low=rework.clip_range,
            clip_high=rework.clip_range if rework.clip_range_high is None else rework.clip_range_high,
            kl_coef=rework.kl_coef,
            entropy_coef=rework.entropy_coef,
        )

    def _reference_logprobs(self, U: RolloutBatch, progress: MakeProgress) -> Tensor:
        """Log-probs of U under the reference policy: the base model, its adapter switched off."""
        disable = getattr(self.model, "disable_adapter", None)
        if disable is None:
            raise ConfigError(
                "probe_rework.kl_coef: expected 0 for a full model (the reference policy is the base model without "
                f"its adapter), found {self.config.probe_rework.kl_coef}"
            )
        flags = {p: p.requires_grad for p in self.policy.model.parameters()}
        try:
            with disable():
                return score_tokens(self.policy, U, progress("score U under the reference")).logprob
        finally:
            for p, flag in flags.items():
                p.requires_grad_(flag)

    def prediction(self, state: ProbeState) -> Prediction:
        """DeltaH1 from X and the step that `probe_rework.step` asks for."""
        x, update = _there(state.entropy_gradient, "entropy_gradient"), _there(state.update, "update")
        kind, parameters = self.config.probe_rework.step, self.policy.parameters
        optimizer, step = self.loaded_optimizer.optimizer, update.step
        if kind == "closed_form":
            step = adam_closed_form(optimizer, parameters, update.gradient, update.clip_factor).total()
        elif kind == "preconditioned":
            direction = preconditioned_direction(optimizer, parameters, update.gradient)
            step = {name: update.learning_rate * y for name, y in direction.items()}
        return first_order(x, step, update.learning_rate)

    # ---------------------------------------------------------------- phase 5

    def ground_truth(self, state: ProbeState, progress: MakeProgress = _no_progress) -> GroundTruth:
        """DeltaH_true: E rescored at the weights the optimizer's step leads to, which are then put back."""
        E, scores, update = (
            _there(state.E, "E"),
            _there(state.E_scores, "E_scores"),
            _there(state.update, "update"),
        )
        policy = self.policy
        with parameters_at(policy.parameters, update.new_parameters):
            new = score_tokens(policy, E, progress("score E after the step"))
        return snis(scores, new, E.group)


def _there(value: Any, name: str) -> Any:
    """`value`, which an earlier phase must have produced."""
    if value is None:
        raise RuntimeError(f"expected {name} from an earlier phase, found none; run the phases in order")
    return value


def on_policy_z(scores: TokenScores) -> float:
    """How many standard errors the mean of `sum_t (l + h)` lies from 0, its exact mean on samples of the policy.

    Large for sequences that were not drawn from the policy that scored them. 0 where it cannot be estimated.
    """
    gap = scores.sequence_logprob + scores.sequence_entropy
    if len(gap) < 2:
        return 0.0
    se = float(gap.std() / len(gap) ** 0.5)
    return float(gap.mean()) / se if se > 0 else 0.0


def stream_seed(seed: int, name: str) -> int:
    """A seed for the random stream `name`, 63 bits."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1

"""The LightningModule that holds the policy under the probe and runs the phases' model passes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from probe.attribution.update_spread import preconditioned, prompt_contributions, spread
from probe.config.checkpoint import DEMO
from probe.config.given import changed_keys
from probe.config.schema import ProbeConfig
from probe.data.batch import PromptExample, RolloutBatch
from probe.data.named import default_reward
from probe.data.prompts import load_prompts
from probe.data.reward_calls import compute_rewards, resolve_rewards
from probe.data.rewards import RewardFunction
from probe.errors.exceptions import (
    CheckpointError,
    ConfigError,
    DataError,
    LogError,
    NumericalError,
    RolloutError,
)
from probe.estimators.adam import ClosedFormStep, adam_closed_form, preconditioned_direction
from probe.estimators.advantages import combined_advantages, count_zero_advantage_groups, group_advantages
from probe.estimators.control_variates import SMALLEST_SAMPLE, SMALLEST_TAUGHT, control_variates
from probe.estimators.curvature import nested_curvature, symmetric_curvature
from probe.estimators.derivative_check import DerivativeMismatchError, derivative_check
from probe.estimators.entropy_gradient import EntropyGradient, entropy_gradient
from probe.estimators.estimate import Estimate
from probe.estimators.forward_mode_check import forward_mode_check
from probe.estimators.ground_truth import GroundTruth, resampled_change
from probe.estimators.groups import index_groups, sum_per_group
from probe.estimators.loss_settings import LOSS_OPTIONS, TOKEN_MEANS, LossSettings
from probe.estimators.noise_floor import rescored_noise_floor
from probe.estimators.on_policy import on_policy_z
from probe.estimators.prediction import Prediction, first_order, from_tokens, token_first_order
from probe.estimators.rounding import Rounding, rounded_step
from probe.estimators.router_loss import router_coefficient
from probe.estimators.step_check import StepCheck, agreement_check, step_check, stopped_gradients
from probe.estimators.update import Update, loss_gradient, optimizer_step
from probe.estimators.weighting import Weighting
from probe.from_checkpoint.fill import fill_settings
from probe.from_checkpoint.sources import SettingSources, log_sources
from probe.loading import (
    CheckpointFiles,
    LoadedOptimizer,
    load_optimizer,
    load_policy_model,
    load_tokenizer,
    locate_checkpoint,
    other_base,
)
from probe.metrics import EntropyChange
from probe.parameters import norm
from probe.phases.fit_memory import FitMemory, read_fit_memory, write_fit_memory
from probe.phases.state import ProbeState
from probe.rollouts.draw import draw_prompts, stream_seed
from probe.rollouts.generation import end_ids
from probe.rollouts.read import read_rollouts
from probe.rollouts.sampling import SampledTokens, check_sampling, sample_rollouts
from probe.rollouts.shared import check_different_files, shared_responses
from probe.rollouts.tables import Part
from probe.scoring.collector import MakeProgress, Progress, no_progress
from probe.scoring.differences import DifferencePair, choose_scale, difference_pair
from probe.scoring.features import FeatureBasis, feature_basis
from probe.scoring.forward_mode import ForwardModeError, forward_tangents, second_order_tangents
from probe.scoring.microbatch import first_microbatch
from probe.scoring.policy import Policy
from probe.scoring.reference import as_reference, no_reference
from probe.scoring.room import check_batch
from probe.scoring.score import score_tokens
from probe.scoring.scores import TokenScores, TokenTangents
from probe.snapshot import parameters_at

logger = logging.getLogger(__name__)


AGREEMENT_LIMIT, HALF_AGREEMENT_LIMIT = 1e-2, 0.1
"""Largest relative difference of deltaH1 by forward mode and by backward, and the same in half precision."""


class EntropyProbe(LightningModule):
    """A policy, its optimizer and the batches of a probe; each method is one phase.

    The methods leave parameters, optimizer and generators bitwise as they found them. `ProbeRunner` calls them in
    order; a notebook can call them one by one.

    Attributes:
        configured: the configuration as it was given.
        given: the keys that it gives explicitly, as `section.key`.
        config: the configuration that counts: `configured`, and what stands beside the checkpoint once it is loaded.
        sources: where the settings of the update come from.
    """

    def __init__(self, config: ProbeConfig, seed: int = 42, given: Collection[str] | None = None) -> None:
        """Nothing is loaded before `load`.

        Args:
            config: the sections of the configuration.
            seed: master seed of the batches, used where `probe_rework.master_seed` is null.
            given: the keys that the configuration gives explicitly (`section.key`), which count before what stands
                beside the checkpoint; by default those whose values are not the schema's defaults.
        """
        super().__init__()
        self.configured = config
        self.given = changed_keys(config) if given is None else frozenset(given)
        self.config, self.sources = config, SettingSources("the checkpoint is not loaded")
        self.seed = seed if config.probe_rework.master_seed is None else config.probe_rework.master_seed
        self.checkpoint = config.checkpoint
        self.files: CheckpointFiles | None = None
        self.model: nn.Module | None = None
        self.tokenizer: Any = None
        self.prompts: tuple[list[PromptExample], list[PromptExample]] = ([], [])
        self.optimizer: LoadedOptimizer | None = None
        self.other_base: tuple[str, str] | None = None
        self.autocast: Callable[[], AbstractContextManager[object]] = nullcontext

    # ---------------------------------------------------------------- loading

    def load(self, device: torch.device) -> None:
        """Load policy, tokenizer and optimizer state from the checkpoint; does nothing when they are there.

        Raises:
            ConfigError: no checkpoint is named.
            CheckpointError: the checkpoint is incomplete or unreadable, or was trained with an option that the probe's
                update does not have.
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
            self._rewards()  # a misspelt reward should not cost the loading of a model
        self.make_demo()
        files = locate_checkpoint(self.checkpoint)
        self.files = replace(files, name=DEMO) if self.config.checkpoint.checkpoint_path == DEMO else files
        self._fill_settings()
        log_sources(self.sources)
        self._check_reference()
        self._check_rewards()
        self.tokenizer = load_tokenizer(self.checkpoint, self.files)
        self.prompts = self._draw_prompts()  # what is wrong with the data shows before the model is loaded
        model, _ = load_policy_model(self.checkpoint, self.files, device, self.tokenizer)
        self.optimizer = load_optimizer(
            model, self.files, self.checkpoint, learning_rate=self.config.probe_rework.learning_rate
        )
        self.other_base = other_base(self.checkpoint, self.files)
        self.model = model

    def _fill_settings(self) -> None:
        """Take what the checkpoint's training arguments say where the configuration does not."""
        file = None if self.files is None else self.files.training_args_file
        self.config, self.sources = fill_settings(self.configured, self.given, file)

    def _check_reference(self) -> None:
        """Refuse a KL penalty without a reference policy before anything is loaded.

        Raises:
            CheckpointError: the checkpoint was trained with one.
            ConfigError: the configuration asks for one.
        """
        if self.files is None or self.files.kind != "full" or self.config.probe_rework.kl_coef == 0:
            return
        if "probe_rework.kl_coef" in self.sources.filled:
            raise CheckpointError(f"{self.files.training_args_file}: {no_reference()}")
        raise no_reference()

    def _check_rewards(self) -> None:
        """Refuse weights that are not those of the rewards.

        Raises:
            CheckpointError: they are the training's.
            ConfigError: they are the configuration's.
        """
        if self.config.batch_config.U_rollouts is not None:
            return
        try:
            self._rewards()
        except ConfigError as error:
            key = "batch_config.reward_weights"
            if key not in self.sources.filled or self.files is None:
                raise
            raise CheckpointError(
                f"{self.files.training_args_file}: {error}; give {key} in the configuration (null: 1 each)"
            ) from error

    def reconfigure(self, config: ProbeConfig, seed: int, given: Collection[str] | None = None) -> None:
        """Take another configuration over; a loaded policy stays where checkpoint and learning rate are the same.

        Args:
            config: the sections of the configuration.
            seed: as for the constructor.
            given: the keys that it gives explicitly; by default as before.
        """
        same = (config.checkpoint, config.probe_rework.learning_rate) == (
            self.configured.checkpoint,
            self.configured.probe_rework.learning_rate,
        )
        self.config = self.configured = config
        self.given = self.given if given is None else frozenset(given)
        self.seed = seed if config.probe_rework.master_seed is None else config.probe_rework.master_seed
        if not same:
            self.checkpoint, self.files, self.model, self.optimizer = config.checkpoint, None, None, None
        elif self.model is not None:
            self._fill_settings()
            self.prompts = self._draw_prompts()

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

    def sample(self, state: ProbeState, progress: MakeProgress = no_progress) -> None:
        """Draw E and U with rewards and advantages, and score E: fills `state.E`, `state.U`, `state.E_scores`.

        Raises:
            DataError: prompts, rewards or rollout files cannot be used.
            RolloutError: all responses are empty, or sampling does not match scoring.
            NumericalError: a score is not finite.
        """
        batch = self.config.batch_config
        E_prompts, U_prompts = self.prompts
        if batch.E_rollouts is not None:
            state.E = self._read(batch.E_rollouts, "E")
            logger.info("E: %d responses from %s; B_E does not apply", len(state.E), state.E.source)
        else:
            repeated, group = _repeat(E_prompts, batch.G_E)
            state.E, state.seen["E"] = self._sample("E", repeated, group, progress("sample E"))
        state.U = self._update_batch(state, U_prompts, progress)
        for sampled in (state.E, state.U):  # before the features of U's tokens are looked up
            check_batch(self.policy.model, sampled)
        state.basis = self._feature_basis(state)
        state.E_scores = score_tokens(self.policy, state.E, progress("score E"), state.basis)
        state.shared = shared_responses(state.E, state.U, state.E_scores.sequence_logprob)
        if "E" in state.seen:
            state.diagnostics["sampling_scoring_gap"] = check_sampling(
                self.policy, state.seen["E"], state.E_scores
            )
        state.diagnostics["on_policy_z"] = on_policy_z(state.E_scores)

    def _draw_prompts(self) -> tuple[list[PromptExample], list[PromptExample]]:
        """The prompts to sample E and U from (empty where a rollout file gives the batch)."""
        batch = self.config.batch_config
        if batch.E_rollouts is not None and batch.U_rollouts is not None:
            check_different_files(batch.E_rollouts, batch.U_rollouts, self._next_update)
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

    def _rewards(self) -> tuple[RewardFunction, ...]:
        """The rewards of the update batch.

        Raises:
            ConfigError: there are more or fewer weights.
        """
        rewards, weights = (
            resolve_rewards(default_reward(self.config.batch_config)),
            self.config.batch_config.reward_weights,
        )
        if weights is not None and len(weights) != len(rewards):
            raise ConfigError(
                f"batch_config.reward_weights: expected one for each of {len(rewards)} rewards, found {len(weights)}"
            )
        return rewards

    @property
    def _next_update(self) -> int | None:
        """The number of the update after the checkpoint's, which is in its weights and moments; None if not known."""
        step = None if self.files is None else self.files.step
        return None if step is None else step + 1

    def _read(self, path: str, part: Part) -> RolloutBatch:
        """A batch from a file; errors name its key."""
        try:
            return self._read_file(path, part)
        except (DataError, RolloutError) as error:
            if str(error).startswith("batch_config."):
                raise
            raise type(error)(f"batch_config.{part}_rollouts: {error}") from error

    def _read_file(self, path: str, part: Part) -> RolloutBatch:
        """A batch from a file."""
        generation = self.config.generation
        vocabulary = self.policy.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        return read_rollouts(
            path,
            self.tokenizer,
            self.config.batch_config,
            generation.max_new_tokens,
            vocabulary,
            self._next_update,
            stop_strings=generation.stop_strings,
            eos_ids=end_ids(self.policy.model, self.tokenizer),
            part=part,
        )

    def _update_batch(
        self, state: ProbeState, prompts: list[PromptExample], progress: MakeProgress
    ) -> RolloutBatch:
        """U with rewards and advantages."""
        batch = self.config.batch_config
        if batch.U_rollouts is not None:
            U = self._read(batch.U_rollouts, "U")
            groups = len(U.group.unique())
            logger.info(
                "U: %d groups, %d responses from %s; B_U and G do not apply", groups, len(U), U.source
            )
            rows = self.sources.rows
            if rows is not None and len(U) > rows and U.loss_tokens is None:
                raise DataError(
                    f"batch_config.U_rollouts: expected the {rows} responses of one update (several are made from one "
                    f"generation), found {len(U)} in {U.source}, which does not tell them apart; record them with "
                    "RolloutRecorderCallback, or set probe_rework.from_checkpoint: off to take all"
                )
            rewards, kind = U.rewards, self.config.probe_rework.advantage
            if U.advantages is not None and kind == "auto":
                return U  # what the trainer made the update with
            if rewards is None and batch.reward is not None:
                self.config, self.sources = self.sources.from_rewards(self.config)
                return self._rewarded(U)
            if rewards is None:
                advice = "" if U.advantages is None else ", or leave probe_rework.advantage at auto"
                raise DataError(
                    f"batch_config.U_rollouts: expected a column with rewards in {batch.U_rollouts}, found none; name "
                    f"it with batch_config.reward_columns, or set batch_config.reward to compute them{advice}"
                )
            self.config, self.sources = self.sources.from_rewards(self.config)
        else:
            repeated, group = _repeat(prompts, batch.G)
            U, state.seen["U"] = self._sample("U", repeated, group, progress("sample U"))
            return self._rewarded(U)
        advantages = group_advantages(rewards, U.group, self.config.probe_rework.advantage_kind)
        return replace(U, rewards=rewards, advantages=advantages)

    def _rewarded(self, U: RolloutBatch) -> RolloutBatch:
        """U with what the reward functions of the configuration give it."""
        rework = self.config.probe_rework
        rewards, advantages = combined_advantages(
            compute_rewards(self._rewards(), U),
            self.config.batch_config.reward_weights,
            U.group,
            rework.advantage_kind,
            rework.multi_objective_aggregation,
        )
        return replace(U, rewards=rewards, advantages=advantages)

    def _feature_basis(self, state: ProbeState) -> FeatureBasis | None:
        """Features for the control variates, from the tokens of U; None where there are to be none."""
        E, U, rework = _there(state.E, "E"), _there(state.U, "U"), self.config.probe_rework
        wanted = rework.control_variates
        if wanted == "off" or not rework.compute_delta_h1 or rework.weighting != "causal":
            return None
        state.fit_memory = memory = self._fit_memory()
        taught = memory is not None and len(memory.earlier_than(E, self._draw_name())) > 0
        if wanted == "auto" and len(E.group.unique()) < (SMALLEST_TAUGHT if taught else SMALLEST_SAMPLE):
            return None
        if memory is not None:
            return memory.basis
        return feature_basis(self.policy.model, U)

    def _fit_memory(self) -> FitMemory | None:
        """What earlier batches taught, where a file is named and there."""
        path = self.config.probe_rework.control_variates_path
        return None if path is None else read_fit_memory(Path(path), self._policy_name())

    def _policy_name(self) -> str:
        """Identifies the policy in files that belong to it: its path, and the norm of its trainable weights."""
        return f"{self.checkpoint.checkpoint_path} ({norm(self.policy.parameters):.12g})"

    def _draw_name(self) -> str:
        """Where E comes from: batches of one draw share sequences."""
        file = self.config.batch_config.E_rollouts
        return f"seed {self.seed}" if file is None else f"file {Path(file).resolve()}"

    # ---------------------------------------------------------------- phases 1 to 3

    def entropy_gradient(
        self, state: ProbeState, progress: MakeProgress = no_progress
    ) -> EntropyGradient | None:
        """Choose how to differentiate, and X on E where it is needed: backward, and for the spread over U.

        Raises:
            NumericalError: the gradients cannot be trusted (see `derivative_check`), are not finite, or forward mode is
                asked for and cannot be had.
        """
        E, scores = _there(state.E, "E"), _there(state.E_scores, "E_scores")
        rework = self.config.probe_rework
        if not bool(scores.undecided.any()):
            state.derivative = "finite_difference", "the policy has no choice left, so that derivatives are 0"
            return None
        few = self._few(E, scores)
        try:
            if rework.derivative_check and rework.derivative_mode != "finite_difference":
                check = derivative_check(self.policy, few)
                state.diagnostics["derivative_check_error"] = check.relative_error
            state.derivative = mode, reason = self._derivative_mode(few)
        except DerivativeMismatchError as error:
            # forward mode only agrees with a backward that is wrong where the model's own code stops gradients
            if rework.derivative_mode != "auto" or not forward_mode_check(self.policy, few).usable:
                raise
            mode, reason = (
                "finite_difference",
                f"forward mode and backward agree, and both are wrong: {error}",
            )
            state.derivative = mode, reason
        logger.info("deltaH1 by %s: %s", mode, reason)
        if mode == "finite_difference" or (mode == "jvp" and not rework.update_spread):
            return None
        return entropy_gradient(
            self.policy, E, scores, rework.weighting, rework.baseline, progress=progress("gradient on E")
        )

    def _few(self, batch: RolloutBatch, scores: TokenScores | None = None) -> RolloutBatch:
        """The first microbatch of responses that are not empty; of those with a choice in them, as far as there are."""
        if scores is not None and bool(scores.undecided.any()):
            batch = batch.subset(scores.undecided.nonzero().flatten())
        return first_microbatch(batch, self.config.memory_config.microbatch_size)

    def _derivative_mode(self, few: RolloutBatch) -> tuple[str, str]:
        """The way to differentiate, and the reason.

        Raises:
            NumericalError: forward mode is asked for and cannot be had.
        """
        wanted = self.config.probe_rework.derivative_mode
        if wanted in ("reverse", "finite_difference"):
            return wanted, "as configured"
        check = forward_mode_check(self.policy, few)
        if check.usable:
            return "jvp", check.reason
        if wanted == "jvp":
            raise NumericalError(
                f"probe_rework.derivative_mode: expected a model that allows jvp, found that {check.reason}; use auto, "
                "reverse or finite_difference, or checkpoint.attn_implementation: eager"
            )
        return "reverse", check.reason

    def update(self, state: ProbeState, progress: MakeProgress = no_progress) -> Update:
        """The loss's gradient on U and the optimizer's real step, taken on a snapshot."""
        U, policy = _there(state.U, "U"), self.policy
        rework = self.config.probe_rework
        reference = self._reference_logprobs(U, progress) if rework.kl_coef > 0 else None
        order = None
        if (
            "U" in state.seen
        ):  # sampled prompt by prompt; trainers shuffle before they cut it into microbatches
            generator = torch.Generator().manual_seed(stream_seed(self.seed, "order of U"))
            order = torch.randperm(len(U), generator=generator)
        found = loss_gradient(policy, U, self.loss_settings, reference, progress("gradient on U"), order)
        if "U" in state.seen:
            check_sampling(policy, state.seen["U"], found.scores)
        step, new, norm, factor, rounding = self._take_step(found.gradient)
        state.diagnostics["zero_advantage_groups"] = count_zero_advantage_groups(U.advantages, U.group)
        return Update(
            step=step,
            new_parameters=new,
            gradient=found.gradient,
            gradient_norm=norm,
            clip_factor=factor,
            learning_rate=self.loaded_optimizer.learning_rate,
            loss_weights=found.weights,
            entropy_weights=found.entropy_weights,
            scores=found.scores,
            rounding=rounding,
        )

    def _take_step(
        self, gradient: Mapping[str, Tensor], lr_factor: float = 1.0
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], float, float, Rounding | None]:
        """The exact step, the weights that the training has after it, the gradient's norm, clipping, and rounding."""
        loaded, parameters = self.loaded_optimizer, self.policy.parameters
        step, new, norm, factor = optimizer_step(
            loaded.optimizer,
            parameters,
            gradient,
            self.config.probe_rework.max_grad_norm,
            self.config.importance.snapshot_device,
            lr_factor,
        )
        if not loaded.rounded:
            return step, new, norm, factor, None
        new, rounding = rounded_step(
            loaded.optimizer, parameters, gradient, loaded.rounded, new, factor, lr_factor, loaded.fused
        )
        return step, new, norm, factor, rounding

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
            router_aux_loss_coef=router_coefficient(self.policy.model, rework.router_aux_loss_coef),
            **{name: getattr(rework, name) for name in LOSS_OPTIONS},
        )

    def _reference_logprobs(self, U: RolloutBatch, progress: MakeProgress) -> Tensor:
        """Log-probs of U under the reference policy."""
        with as_reference(self.policy.model):
            return score_tokens(self.policy, U, progress("score U under the reference")).logprob

    def prediction(self, state: ProbeState, progress: MakeProgress = no_progress) -> Prediction:
        """DeltaH1 of the step that `probe_rework.step` asks for, with errors, curvature and its spread over U.

        Raises:
            NumericalError: two ways to the derivative disagree, or no difference step is usable.
        """
        E, scores, update = (
            _there(state.E, "E"),
            _there(state.E_scores, "E_scores"),
            _there(state.update, "update"),
        )
        mode, reason = _there(state.derivative, "derivative")
        rework, step = self.config.probe_rework, self._step(update)
        try:
            tangents, pair = self._tangents(state, step, mode, progress)
        except NumericalError as error:
            if mode != "reverse":
                raise
            return self._without_errors(state, step, f"{reason}; no error bars: {error}")
        checked: StepCheck | None = None
        if mode == "jvp" and rework.derivative_check:
            checked = step_check(self.policy, E, scores, step, tangents)
            if checked.contradicted and rework.derivative_mode == "auto":
                mode, reason = self._believe_forwards(state, checked)
                checked = None
                tangents, pair = self._tangents(state, step, mode, progress)
        by_name = {
            name: token_first_order(scores, tangents, E.group, name, rework.baseline)
            for name in get_args(Weighting)
        }
        found = from_tokens(by_name[rework.weighting], update.learning_rate)
        agreement = None
        if state.entropy_gradient is not None:
            backward = first_order(state.entropy_gradient, step, update.learning_rate)
            agreement = self._agreement(backward, found, mode)
            if mode == "reverse":
                if pair is not None and rework.derivative_check:
                    sizes = (
                        max(abs(found.pathwise), abs(found.score)),
                        max(abs(found.pathwise_tok), abs(found.score_tok)),
                    )
                    both = backward.deltaH1, backward.deltaH1_tok
                    checked = agreement_check(both, by_name[rework.weighting].total, sizes, pair.error)
                if checked is not None and checked.contradicted and rework.derivative_mode == "auto":
                    mode, reason = self._believe_forwards(state, checked)
                    agreement = checked = None
                else:
                    found = backward
        found = replace(
            found,
            estimates={name: parts.total for name, parts in by_name.items()},
            reported=rework.weighting,
            mode=mode,
            reason=reason,
            agreement=agreement,
            step_difference=None if checked is None else checked.difference,
            step_difference_error=None if checked is None else checked.error,
            difference_scale=None if pair is None else pair.scale,
            difference_error=None if pair is None else pair.error,
            sd_U=self._update_spread(state, mode, progress),
        )
        found = self._with_control_variates(state, found, tangents)
        return self._with_curvature(state, found, step, pair, progress)

    def _believe_forwards(self, state: ProbeState, checked: StepCheck) -> tuple[str, str]:
        """Go on with differences, which contradict the derivatives; X takes the same for a constant as these."""
        mode, reason = state.derivative = "finite_difference", stopped_gradients(checked)
        logger.warning("deltaH1 by %s: %s", mode, reason)
        state.entropy_gradient = None
        return mode, reason

    def _without_errors(self, state: ProbeState, step: Mapping[str, Tensor], reason: str) -> Prediction:
        """DeltaH1 by backward alone, where the arithmetic gives no derivatives per token."""
        logger.warning("deltaH1 by reverse: %s", reason)
        X, update = _there(state.entropy_gradient, "entropy_gradient"), _there(state.update, "update")
        found = first_order(X, step, update.learning_rate)
        return replace(found, reported=self.config.probe_rework.weighting, reason=reason)

    def _step(self, update: Update) -> Mapping[str, Tensor]:
        """The step that the prediction is for."""
        kind, parameters = self.config.probe_rework.step, self.policy.parameters
        optimizer = self.loaded_optimizer.optimizer
        if kind == "closed_form":
            return self._closed_form(update).total()
        if kind == "preconditioned":
            direction = preconditioned_direction(optimizer, parameters, update.gradient)
            return {name: update.learning_rate * y for name, y in direction.items()}
        return update.step

    def _closed_form(self, update: Update) -> ClosedFormStep:
        """The optimizer's step in its parts."""
        return adam_closed_form(
            self.loaded_optimizer.optimizer, self.policy.parameters, update.gradient, update.clip_factor
        )

    def _tangents(
        self, state: ProbeState, step: Mapping[str, Tensor], mode: str, progress: MakeProgress
    ) -> tuple[TokenTangents, DifferencePair | None]:
        """Derivatives of E's scores along the step, per token."""
        E, policy = _there(state.E, "E"), self.policy
        if mode == "jvp":
            return forward_tangents(policy, E, step, state.basis, progress("forward mode on E")), None
        pair = self._difference_pair(state, step, progress)
        return pair.tangents, pair

    def _difference_pair(
        self, state: ProbeState, step: Mapping[str, Tensor], progress: MakeProgress
    ) -> DifferencePair:
        """E scored on both sides; at scale 1 the upper point is the optimizer's own, and the ground truth's."""
        E, policy, update = _there(state.E, "E"), self.policy, _there(state.update, "update")
        scale, error = choose_scale(policy, self._few(E, state.E_scores), step)
        own = scale == 1.0 and self.config.probe_rework.step == "optimizer" and update.rounding is None
        upper = update.new_parameters if own else None
        pair = difference_pair(policy, E, step, scale, error, upper, state.basis, progress)
        if own:
            state.scores_new = pair.plus
        return pair

    def _agreement(self, backward: Prediction, tokens: Prediction, mode: str) -> float:
        """Relative difference of deltaH1 by backward and by derivatives per token.

        Relative to the larger of the parts that deltaH1 is the sum of, since these may nearly cancel.

        Raises:
            NumericalError: they disagree by more than the arithmetic allows.
        """
        size = max(abs(backward.pathwise), abs(backward.score), abs(backward.deltaH1), 1e-300)
        found = abs(backward.deltaH1 - tokens.deltaH1) / size
        limit = HALF_AGREEMENT_LIMIT if self.policy.half_precision else AGREEMENT_LIMIT
        if mode == "jvp" and not found <= limit:
            raise NumericalError(
                f"expected forward mode and backward to give one deltaH1, found {tokens.deltaH1:.6g} and "
                f"{backward.deltaH1:.6g} nats per response (relative difference {found:.2g}, at most {limit} "
                "expected); some layer drops derivatives (try probe_rework.derivative_mode: finite_difference)"
            )
        return found

    def _update_spread(
        self, state: ProbeState, mode: str, progress: MakeProgress
    ) -> tuple[float, float] | None:
        """Standard deviation of deltaH1 over update batches, both estimands; None where it cannot be had."""
        rework, update, U = self.config.probe_rework, _there(state.update, "update"), _there(state.U, "U")
        X = state.entropy_gradient
        adam = isinstance(self.loaded_optimizer.optimizer, torch.optim.Adam)
        if not rework.update_spread or X is None or not adam or rework.step == "preconditioned":
            return None
        linear = self._closed_form(update).gradient_map
        found = []
        for of in (X.sequence, X.token):
            u = preconditioned(linear, {name: of(name) for name in linear})
            if mode == "jvp":
                tangents = forward_tangents(self.policy, U, u, progress=progress("forward mode on U"))
                factor = 1.0
            else:  # the difference starts at a move as long as the step
                factor = norm(update.step) / max(norm(u), 1e-300)
                along = {name: factor * direction for name, direction in u.items()}
                try:
                    scale, _ = choose_scale(self.policy, self._few(U), along)
                except NumericalError as error:
                    logger.warning("deltaH1_sd_U is left out: %s", error)
                    return None
                tangents = difference_pair(self.policy, U, along, scale).tangents
            contributions = prompt_contributions(
                tangents, update.loss_weights, update.entropy_weights, U.group
            )
            found.append(spread(contributions / factor, self._group_tokens(U)))
        sequence, token = found
        return None if sequence is None or token is None else (sequence, token)

    def _group_tokens(self, U: RolloutBatch) -> Tensor | None:
        """Tokens per prompt of U where the loss is a mean over all tokens, else None."""
        if self.config.probe_rework.loss not in TOKEN_MEANS:
            return None
        return sum_per_group(U.lengths.double(), *index_groups(U.group))

    def _with_control_variates(
        self, state: ProbeState, found: Prediction, tangents: TokenTangents
    ) -> Prediction:
        """Subtract the control variates from deltaH1 (from its score part), and say whether they were used."""
        E, scores = _there(state.E, "E"), _there(state.E_scores, "E_scores")
        if state.basis is None:
            return replace(
                found, control_variates=f"off: {self._why_no_control_variates(len(E.group.unique()))}"
            )
        psi = state.basis.sampled(E)
        if len(E.group.unique()) < 2:
            raise ConfigError(
                "probe_rework.control_variates: expected at least two prompts in E (they are fitted on one and used on "
                "another), found one; use auto or off"
            )
        memory, draw = state.fit_memory, self._draw_name()
        earlier = [] if memory is None else memory.earlier_than(E, draw)
        fitted = control_variates(scores, tangents, psi, E.group, earlier)
        state.control_variates = Z = fitted.means(scores, E.group)
        path = self.config.probe_rework.control_variates_path
        if path is not None:
            memory = FitMemory(state.basis, self._policy_name()) if memory is None else memory
            memory.add(E, fitted.statistics, draw)
            try:
                write_fit_memory(Path(path), memory)
            except LogError as error:  # what was measured is not lost for that
                state.unwritten.append(error)
        batches = f" and {len(earlier)} earlier batches" if earlier else ""
        return found.with_control_variates(Z, f"on: fitted on other prompts{batches}")

    def _why_no_control_variates(self, prompts: int) -> str:
        """The reason, for the report."""
        rework = self.config.probe_rework
        if rework.control_variates == "off":
            return "probe_rework.control_variates"
        if rework.weighting != "causal":
            return f"weighting: {rework.weighting}"
        if prompts < SMALLEST_SAMPLE:
            return f"{prompts} prompts in E, they are used from {SMALLEST_SAMPLE} on"
        return "the output layer has no dense weight"

    def _with_curvature(
        self,
        state: ProbeState,
        found: Prediction,
        step: Mapping[str, Tensor],
        pair: DifferencePair | None,
        progress: MakeProgress,
    ) -> Prediction:
        """Add deltaH2 by the way that is asked for."""
        E, scores = _there(state.E, "E"), _there(state.E_scores, "E_scores")
        wanted = self.config.probe_rework.curvature
        if wanted == "off":
            return found
        if wanted == "jvp" or (wanted == "auto" and found.mode == "jvp"):
            try:
                first, second = second_order_tangents(self.policy, E, step, progress("curvature on E"))
                sequence, token = nested_curvature(scores, first, second, E.group)
                return replace(found, deltaH2=(sequence, token), curvature_mode="jvp")
            except ForwardModeError as error:
                if wanted == "jvp":
                    raise
                logger.info("deltaH2 by differences: %s", error)
        pair = pair if pair is not None else self._difference_pair(state, step, progress)
        sequence, token = symmetric_curvature(scores, pair, E.group)
        return replace(found, deltaH2=(sequence, token), curvature_mode="finite_difference")

    # ---------------------------------------------------------------- phase 5

    def ground_truth(self, state: ProbeState, progress: MakeProgress = no_progress) -> GroundTruth:
        """DeltaH_true: E rescored at the weights the optimizer's step leads to. The parameters are not touched.

        Raises:
            NumericalError: a weight or a score is not finite.
        """
        E, scores, update = (
            _there(state.E, "E"),
            _there(state.E_scores, "E_scores"),
            _there(state.update, "update"),
        )
        policy, importance = self.policy, self.config.importance
        new = state.scores_new
        if new is None:
            new = score_tokens(policy.at(update.new_parameters), E, progress("score E after the step"))
        metric = EntropyChange(
            "snis" if importance.is_mode == "snis" else "per_decision", importance.clip_log_weight
        )
        metric.update(scores, new, E.group)
        truth = metric.ground_truth()
        if state.control_variates is not None and self.config.probe_rework.step != "preconditioned":
            reported = importance.is_mode == "per_decision"
            truth = truth.with_control_variates(state.control_variates, reported)
        if importance.is_mode == "resample":
            truth = truth.with_estimate("resample", self._resample(state, progress), reported=True)
        if importance.noise_floor:
            if state.noise_floor is None:
                state.noise_floor = rescored_noise_floor(
                    policy, E, scores, update.step, stream_seed(self.seed, "sham step"), progress
                )
            truth = replace(truth, noise_floor=state.noise_floor)
        return truth

    def at_learning_rate(self, state: ProbeState, learning_rate: float) -> ProbeState:
        """What a run has produced, as it would be with another learning rate: same E, same U, same update direction.

        The step of the optimizers that the probe knows is exactly proportional to the learning rate, so that deltaH1 is
        multiplied by the factor and deltaH2 by its square. There is no ground truth yet: see `ground_truth`.

        Args:
            state: with an update.
            learning_rate: `eta > 0`.

        Raises:
            ConfigError: the learning rate is not positive.
        """
        if not learning_rate > 0:
            raise ConfigError(f"learning_rate: expected a number above 0, found {learning_rate}")
        update = _there(state.update, "update")
        factor = learning_rate / update.learning_rate
        # again, not scaled: a rounded step does not scale
        step, new, _, _, rounding = self._take_step(update.gradient, factor)
        Z = state.control_variates
        return replace(
            state,
            update=replace(
                update, step=step, new_parameters=new, learning_rate=learning_rate, rounding=rounding
            ),
            prediction=None if state.prediction is None else state.prediction.at(learning_rate),
            control_variates=None if Z is None else [z.scaled(factor) for z in Z],
            scores_new=None,
            noise_floor=None if self.policy.half_precision or factor < 1 else state.noise_floor,
            ground_truth=None,
            timing={},
            diagnostics=dict(state.diagnostics),
        )

    def _resample(self, state: ProbeState, progress: MakeProgress) -> tuple[Estimate, Estimate]:
        """The change from fresh responses of the updated policy to the same prompts."""
        E, scores, update = (
            _there(state.E, "E"),
            _there(state.E_scores, "E_scores"),
            _there(state.update, "update"),
        )
        if self.config.batch_config.E_rollouts is not None:
            raise ConfigError(
                "importance.is_mode: resample expects an E that is sampled here, found batch_config.E_rollouts; use "
                "per_decision or snis"
            )
        prompts, group = _repeat(self.prompts[0], self.config.batch_config.G_E)
        policy = self.policy
        with parameters_at(policy.parameters, update.new_parameters):
            fresh, _ = self._sample("E after the step", prompts, group, progress("sample E after the step"))
            new = score_tokens(policy, fresh, progress("score E after the step"))
        return resampled_change(scores, E.group, new, fresh.group)


def _there(value: Any, name: str) -> Any:
    """`value`, which an earlier phase must have produced."""
    if value is None:
        raise RuntimeError(f"expected {name} from an earlier phase, found none; run the phases in order")
    return value


def _repeat(prompts: list[PromptExample], times: int) -> tuple[list[PromptExample], Tensor]:
    """Every prompt `times` times, and the group of each entry."""
    repeated = [prompt for prompt in prompts for _ in range(times)]
    return repeated, torch.arange(len(prompts)).repeat_interleave(times)

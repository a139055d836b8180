"""The LightningModule that holds the policy under the probe, and the phases in their order."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from probe.config.checkpoint import DEMO, CheckpointConfig
from probe.config.given import changed_keys
from probe.config.schema import ProbeConfig
from probe.demo.cache import demo_is_cached, ensure_demo_checkpoint
from probe.distributed.ranks import ALONE
from probe.distributed.sharding import Setup, shard
from probe.errors.exceptions import CheckpointError, ConfigError
from probe.estimators.ground_truth import GroundTruth
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
    training_dropout,
)
from probe.phases.attribution import Attribution, attribution
from probe.phases.entropy_gradient import Derivative, entropy_gradient
from probe.phases.ground_truth import ground_truth
from probe.phases.prediction import Predicted, prediction
from probe.phases.sample import BatchSource, Prompts, Sample, chosen_rewards, drawn_prompts, sample
from probe.phases.state import ProbeState
from probe.phases.update import Update, update
from probe.phases.update_spread import has_update_spread
from probe.phases.what_if import WhatIf, check_interventions, what_if
from probe.results.provenance import Provenance
from probe.rollouts.draw import stream_seed
from probe.scoring.collector import MakeProgress, no_progress
from probe.scoring.policy import Policy
from probe.scoring.reference import no_reference
from probe.scoring.traffic import Traffic


class EntropyProbe(LightningModule):
    """A policy with its optimizer, and the phases of a probe in their order.

    A phase takes the results of earlier ones and returns one of its own; it leaves parameters, optimizer and generators
    bitwise as it found them. `ProbeRunner` calls them in order; a notebook can call them one by one.

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
        self.prompts: Prompts = ([], [])
        self.optimizer: LoadedOptimizer | None = None
        self.other_base: tuple[str, str] | None = None
        self.autocast: Callable[[], AbstractContextManager[object]] = nullcontext
        self.ranks = ALONE
        self.traffic = Traffic()

    # ---------------------------------------------------------------- loading

    def load(self, device: torch.device, setup: Setup | None = None) -> None:
        """Load policy, tokenizer and optimizer state from the checkpoint; does nothing when they are there.

        Args:
            device: of the policy.
            setup: shards the policy, loaded on each process's CPU first; None leaves it whole.

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
            chosen_rewards(self.config.batch_config)  # a misspelt one should not cost the loading of a model
        self.make_demo()
        files = locate_checkpoint(self.checkpoint)
        self.files = replace(files, name=DEMO) if self.config.checkpoint.checkpoint_path == DEMO else files
        _fill_settings(self)
        log_sources(self.sources)
        check_settings(self.config, self.sources, self.files)
        self.tokenizer = load_tokenizer(self.checkpoint, self.files)
        self.prompts = _drawn_prompts(self)  # what is wrong with the data shows before the model is loaded
        model, self.optimizer = _loaded(
            self.config, self.checkpoint, self.files, device, self.tokenizer, setup
        )
        self.other_base, self.model = other_base(self.checkpoint, self.files), model

    def reconfigure(self, config: ProbeConfig, seed: int, given: Collection[str] | None = None) -> None:
        """Take another configuration over; a loaded policy stays where checkpoint and learning rate are the same.

        Args:
            config: the sections of the configuration.
            seed: as for the constructor.
            given: the keys that it gives explicitly; by default as before.
        """
        before, rate = self.configured, config.probe_rework.learning_rate
        same = (config.checkpoint, rate) == (before.checkpoint, before.probe_rework.learning_rate)
        self.config = self.configured = config
        self.given = self.given if given is None else frozenset(given)
        self.seed = seed if config.probe_rework.master_seed is None else config.probe_rework.master_seed
        if not same:
            self.checkpoint, self.files, self.model, self.optimizer = config.checkpoint, None, None, None
        elif self.model is not None:
            _fill_settings(self)
            self.prompts = _drawn_prompts(self)

    def make_demo(self) -> bool:
        """Where the demo policy is asked for, take its folder, in which it is trained where the cache has none.

        Returns:
            Whether it was trained.
        """
        if self.checkpoint.checkpoint_path != DEMO:
            return False
        cached = demo_is_cached()
        self.checkpoint = replace(self.checkpoint, checkpoint_path=str(ensure_demo_checkpoint()))
        return not cached

    @property
    def policy(self) -> Policy:
        """The policy as the passes see it."""
        if self.model is None:
            raise RuntimeError("expected a loaded policy, found none; call load(device) first")
        memory = self.config.memory_config
        return Policy(
            model=self.model,
            temperature=self.config.generation.temperature,
            microbatch_size=None if memory.microbatch_size == "auto" else memory.microbatch_size,
            tokens_per_microbatch=memory.tokens_per_microbatch,
            head_chunk_tokens=memory.head_chunk_tokens,
            traffic=self.traffic,
            autocast=self.autocast,
            ranks=self.ranks,
        )

    @property
    def loaded_optimizer(self) -> LoadedOptimizer:
        """The optimizer with its state."""
        if self.optimizer is None:
            raise RuntimeError("expected a loaded optimizer, found none; call load(device) first")
        return self.optimizer

    @property
    def provenance(self) -> Provenance:
        """What a result of this policy rests on beside its batches."""
        return _provenance(self)

    # ---------------------------------------------------------------- the phases, in their order

    @property
    def batch_source(self) -> BatchSource:
        """What E and U are made from."""
        return _batch_source(self)

    def sample(self, progress: MakeProgress = no_progress) -> Sample:
        """Phase 0: E and U with rewards and advantages, E scored; see `probe.phases.sample`."""
        found = sample(self.batch_source, progress)
        self.config, self.sources = found.config, found.sources  # U's file may settle what its advantages are
        return found

    def entropy_gradient(self, sample: Sample, progress: MakeProgress = no_progress) -> Derivative:
        """Phase 1: how to differentiate, and X on E where it is needed; see `probe.phases.entropy_gradient`."""
        rework, whole = self.config.probe_rework, self.config.detailed_logging.per_sequence
        spread = has_update_spread(self.loaded_optimizer, rework) and not self.config.attribution.enabled
        return entropy_gradient(self.policy, sample, rework, progress, spread, whole)

    def update(self, sample: Sample, progress: MakeProgress = no_progress) -> Update:
        """Phase 2: the optimizer's step from U, taken on a snapshot; see `probe.phases.update`."""
        order = stream_seed(self.seed, "order of U")
        return update(self.policy, sample, self.loaded_optimizer, self.config, order, progress)

    def prediction(
        self, sample: Sample, derivative: Derivative, update: Update, progress: MakeProgress = no_progress
    ) -> Predicted:
        """Phase 3: deltaH1, and its spread over U; see `probe.phases.prediction`."""
        rework = self.config.probe_rework
        return prediction(self.policy, sample, derivative, update, self.loaded_optimizer, rework, progress)

    def attribution(
        self, sample: Sample, update: Update, predicted: Predicted, progress: MakeProgress = no_progress
    ) -> Attribution:
        """Phase 4: what every token of U adds to deltaH1; see `probe.phases.attribution`."""
        return attribution(self.batch_source, sample, update, self.loaded_optimizer, predicted, progress)

    def what_if(self, state: ProbeState, progress: MakeProgress = no_progress) -> WhatIf:
        """Interventions on the update that was attributed; see `probe.phases.what_if`."""
        sample, update, attributed = state.attributed
        return what_if(self.batch_source, sample, update, self.loaded_optimizer, attributed, progress)

    def ground_truth(
        self,
        sample: Sample,
        update: Update,
        predicted: Predicted | None = None,
        progress: MakeProgress = no_progress,
    ) -> GroundTruth:
        """Phase 5: deltaH_true; see `probe.phases.ground_truth`."""
        return ground_truth(self.batch_source, sample, update, predicted, progress=progress)


def _fill_settings(module: EntropyProbe) -> None:
    """Take what the checkpoint's training arguments say where the configuration does not."""
    file = None if module.files is None else module.files.training_args_file
    module.config, module.sources = fill_settings(module.configured, module.given, file)


def _drawn_prompts(module: EntropyProbe) -> Prompts:
    """What E and U are sampled from."""
    update = None if module.files is None else module.files.next_update
    return drawn_prompts(module.config.batch_config, module.tokenizer, module.seed, update)


def _batch_source(module: EntropyProbe) -> BatchSource:
    """See `EntropyProbe.batch_source`."""
    return BatchSource(
        policy=module.policy,
        tokenizer=module.tokenizer,
        config=module.config,
        sources=module.sources,
        prompts=module.prompts,
        seed=module.seed,
        next_update=module.files.next_update if module.files is not None else None,
        checkpoint=module.checkpoint.checkpoint_path,
    )


def _provenance(module: EntropyProbe) -> Provenance:
    """See `EntropyProbe.provenance`."""
    dropout = 0.0 if module.sources.without_dropout else training_dropout(module.policy.model)
    return Provenance(
        sources=module.sources,
        checkpoint_path=module.config.checkpoint.checkpoint_path,
        checkpoint_name="policy" if module.files is None else module.files.name,
        training_step=None if module.files is None else module.files.step,
        other_base=module.other_base,
        dropout=dropout,
        half_precision=module.policy.half_precision,
        schedule_at_zero=module.optimizer is not None and module.optimizer.schedule_at_zero,
        preconditioned=not module.config.probe_rework.predicts_a_step,
        per_token=module.config.importance.report_per_token,
    )


def _loaded(
    config: ProbeConfig,
    checkpoint: CheckpointConfig,
    files: CheckpointFiles,
    device: torch.device,
    tokenizer: Any,
    setup: Setup | None,
) -> tuple[nn.Module, LoadedOptimizer]:
    """The policy and its optimizer; both sharded where there is a `setup`."""
    place = device if setup is None else torch.device("cpu")
    model, _ = load_policy_model(checkpoint, files, place, tokenizer)
    optimizer = load_optimizer(model, files, checkpoint, learning_rate=config.probe_rework.learning_rate)
    return (model if setup is None else shard(model, optimizer.optimizer, setup)), optimizer


def check_settings(config: ProbeConfig, sources: SettingSources, files: CheckpointFiles) -> None:
    """Refuse, before a model is loaded, a KL penalty without a reference policy, and weights of other rewards.

    Raises:
        CheckpointError: the training's settings are such.
        ConfigError: those of the configuration are.
    """
    check_interventions(config.whatif)
    if files.kind == "full" and config.probe_rework.kl_coef != 0:
        if "probe_rework.kl_coef" in sources.filled:
            raise CheckpointError(f"{files.training_args_file}: {no_reference()}")
        raise no_reference()
    if config.batch_config.U_rollouts is not None:
        return
    try:
        chosen_rewards(config.batch_config)
    except ConfigError as error:
        key = "batch_config.reward_weights"
        if key not in sources.filled:
            raise
        raise CheckpointError(
            f"{files.training_args_file}: {error}; give {key} in the configuration (null: 1 each)"
        ) from error

"""GRPO on the demo's base model: a LoRA adapter and the optimizer state that one more step would start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from probe.config.batches import GenerationConfig
from probe.data.arithmetic import PROMPT_TEMPLATE, arithmetic_rows
from probe.data.batch import PromptExample, RolloutBatch
from probe.data.reward_calls import compute_rewards
from probe.data.rewards import exact_number
from probe.demo.recipe import DemoRecipe
from probe.estimators.advantages import group_advantages
from probe.estimators.loss_settings import LossSettings
from probe.estimators.update import loss_gradient
from probe.rollouts.sampling import SampledTokens, sample_rollouts
from probe.scoring.policy import Policy

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class DemoStatistics:
    """What the policy does on prompts of the test split, at temperature 1.

    Attributes:
        accuracy: fraction of right answers.
        entropy_per_response: mean of the summed token entropies, nats.
        entropy_sd: their standard deviation over responses, nats.
        entropy_per_token: nats.
        mean_length: tokens per response, EOS included.
        truncated_fraction: fraction of responses that the cap on tokens ended.
    """

    accuracy: float
    entropy_per_response: float
    entropy_sd: float
    entropy_per_token: float
    mean_length: float
    truncated_fraction: float


def add_adapter(model: Qwen2ForCausalLM, recipe: DemoRecipe) -> PeftModel:
    """A new LoRA adapter on all linear layers but the output layer; it changes nothing before it is trained."""
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=0.0,
        target_modules=LINEAR_LAYERS,
    )
    return get_peft_model(model, adapter).eval()


def train_grpo(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    recipe: DemoRecipe,
    seed: int,
    report: Callable[[float], None],
) -> torch.optim.AdamW:
    """Train the adapter in place, on-policy: one optimizer step per batch of fresh responses.

    Args:
        model: the base model with its adapter.
        tokenizer: its tokenizer.
        recipe: sizes and settings.
        seed: seed of the prompts and the responses.
        report: called with the mean reward after each step.

    Returns:
        The optimizer, with the moments after the last step.
    """
    policy = _policy(model, recipe)
    parameters = policy.parameters
    optimizer = torch.optim.AdamW(list(parameters.items()), lr=recipe.grpo_lr)  # with names in its state
    rows = arithmetic_rows("train", seed=seed)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    count = recipe.prompts_per_step
    for step in range(recipe.grpo_steps):
        chosen = [order[k % len(order)] for k in range(step * count, (step + 1) * count)]
        prompts = [example for i in chosen for example in [_example(rows[i], i)] * recipe.group_size]
        group = torch.arange(count).repeat_interleave(recipe.group_size)
        batch, _ = _sample(policy, tokenizer, prompts, recipe, _stream(seed, step), group)
        rewards = compute_rewards([exact_number], batch)[:, 0]
        batch = replace(batch, rewards=rewards, advantages=group_advantages(rewards, group, "grpo"))
        gradient = loss_gradient(policy, batch, LossSettings("grpo")).gradient
        for name, parameter in parameters.items():
            parameter.grad = gradient[name]
        torch.nn.utils.clip_grad_norm_(parameters.values(), recipe.max_grad_norm)
        optimizer.step()
        report(float(rewards.mean()))
    optimizer.zero_grad()
    return optimizer


def demo_statistics(
    model: PeftModel, tokenizer: PreTrainedTokenizerFast, recipe: DemoRecipe, seed: int
) -> DemoStatistics:
    """Sample one response to each of `recipe.evaluation_prompts` test questions and summarise them."""
    rows = arithmetic_rows("test", recipe.evaluation_prompts, seed)
    prompts = [_example(row, index) for index, row in enumerate(rows)]
    batch, sampled = _sample(_policy(model, recipe), tokenizer, prompts, recipe, _stream(seed, -1))
    entropy, lengths = sampled.entropy.sum(dim=1), batch.lengths.double()
    return DemoStatistics(
        accuracy=float(compute_rewards([exact_number], batch).mean()),
        entropy_per_response=float(entropy.mean()),
        entropy_sd=float(entropy.std()),
        entropy_per_token=float(entropy.sum() / lengths.sum()),
        mean_length=float(lengths.mean()),
        truncated_fraction=float(batch.truncated.double().mean()),
    )


def _policy(model: PeftModel, recipe: DemoRecipe) -> Policy:
    """The policy, with a GRPO batch in one pass: the model is small."""
    return Policy(model, microbatch_size=recipe.prompts_per_step * recipe.group_size, head_chunk_tokens=4096)


def _example(row: dict[str, str], index: int) -> PromptExample:
    """A row of the data set as a prompt."""
    return PromptExample(PROMPT_TEMPLATE.format(prompt=row["question"]), row, index)


def _sample(
    policy: Policy,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[PromptExample],
    recipe: DemoRecipe,
    seed: int,
    group: Tensor | None = None,
) -> tuple[RolloutBatch, SampledTokens]:
    """One response to each entry of `prompts`."""
    settings = GenerationConfig(max_new_tokens=recipe.max_new_tokens, batch_size=len(prompts))
    return sample_rollouts(policy, tokenizer, prompts, settings, seed, group)


def _stream(seed: int, step: int) -> int:
    """A seed for the responses of one step (-1: of the statistics), different for every pair of arguments."""
    return seed * 2**16 + step + 1

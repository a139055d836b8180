"""Everything that fixes the demo policy except its seed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoRecipe:
    """Sizes and settings of the demo policy; the defaults take about half a minute on one CPU core.

    Attributes:
        hidden_size: width of the network.
        intermediate_size: width of its feed-forward layers.
        layers: number of layers.
        heads: number of attention heads.
        corpus_size: question-answer pairs that it is pre-trained on.
        pretrain_steps: optimizer steps of pre-training; too few to always be right, so that GRPO has work to do.
        pretrain_batch: pairs per step.
        pretrain_lr: peak learning rate of pre-training.
        lora_rank: rank of the adapter.
        lora_alpha: its scale is `lora_alpha / lora_rank`.
        grpo_steps: optimizer steps of GRPO; it stops while entropy still falls, so that the next step changes it.
        prompts_per_step: prompts per GRPO step.
        group_size: responses per prompt.
        grpo_lr: constant learning rate of GRPO.
        max_grad_norm: gradient clipping in both trainings.
        max_new_tokens: cap on the length of a response; the longest solution in the corpus is shorter.
        derailing: share of the pre-training texts that break off and go on in random numbers, up to the cap: a policy
            that derails now and then, for studies of heavy tails.
        evaluation_prompts: prompts of the test split for the statistics.
    """

    hidden_size: int = 64
    intermediate_size: int = 160
    layers: int = 2
    heads: int = 2
    corpus_size: int = 8192
    pretrain_steps: int = 340
    pretrain_batch: int = 32
    pretrain_lr: float = 8e-3
    lora_rank: int = 8
    lora_alpha: int = 16
    grpo_steps: int = 20
    prompts_per_step: int = 16
    group_size: int = 8
    grpo_lr: float = 7e-4
    max_grad_norm: float = 1.0
    max_new_tokens: int = 32
    derailing: float = 0.0
    evaluation_prompts: int = 256

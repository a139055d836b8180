"""Pre-training of the demo's base model: next-token prediction of the corpus' completions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from probe.data.arithmetic import arithmetic_corpus
from probe.demo.recipe import DemoRecipe

IGNORED = -100
"""Label of a position that is not predicted, as in transformers."""


def new_model(recipe: DemoRecipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A model of Qwen2's architecture with random weights from torch's global generator, in float32 on the CPU."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        # Wide networks start at 0.02; a narrow one learns several times as fast from larger weights.
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device("cpu"):
        return Qwen2ForCausalLM(config).float()


def pretrain(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: DemoRecipe,
    seed: int,
    report: Callable[[float], None],
) -> None:
    """Train `model` in place with AdamW, the learning rate rising briefly and then falling to 0.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        recipe: sizes and settings.
        seed: seed of the corpus and of the order of its pairs.
        report: called with the loss (nats per completion token) after each step.
    """
    pairs = arithmetic_corpus(recipe.corpus_size, seed, recipe.derailing, recipe.max_new_tokens)
    input_ids, labels = encode_corpus(pairs, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.pretrain_lr, betas=(0.9, 0.98))
    warmup, steps = min(20, recipe.pretrain_steps), recipe.pretrain_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1.0 - step / steps)
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(labels), (recipe.pretrain_batch,), generator=generator)
        loss = completion_loss(model, input_ids[rows], labels[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        report(loss.item())
    model.eval()


def encode_corpus(pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Token ids and labels of prompt-completion pairs.

    Args:
        pairs: `N` pairs.
        tokenizer: the tokenizer.

    Returns:
        `(input_ids, labels)`, both `(N, L)`, padded on the right; each completion ends with EOS, and labels are
        `IGNORED` outside it.
    """
    # One by one: batches start threads, and tokenizers complains about those after a fork.
    encode = tokenizer.backend_tokenizer.encode
    prompts = [encode(prompt).ids for prompt, _ in pairs]
    completions = [[*encode(completion).ids, tokenizer.eos_token_id] for _, completion in pairs]
    widest = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    input_ids = torch.full((len(pairs), widest), tokenizer.pad_token_id)
    labels = torch.full((len(pairs), widest), IGNORED)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        input_ids[i, :end] = torch.tensor([*prompt, *completion])
        labels[i, len(prompt) : end] = input_ids[i, len(prompt) : end]
    return input_ids, labels


def completion_loss(model: Qwen2ForCausalLM, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the completion tokens of `(b, L)` sequences."""
    used = int((labels != IGNORED).any(dim=0).nonzero().max()) + 1  # the rest is padding in every row
    # Padding stands on the right, where causal attention does not look: no attention mask.
    logits = model(input_ids=input_ids[:, : used - 1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:used].flatten(), ignore_index=IGNORED)

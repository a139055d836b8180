"""A policy small enough to enumerate: a Qwen2 with four tokens in float64, and its exact entropy."""

from __future__ import annotations

import itertools

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2 import modeling_qwen2

from probe.data.batch import RolloutBatch
from probe.scoring import Policy

VOCAB, CAP, EOS, PROMPT = 4, 4, 3, (0, 1)


def float64_norm(self, hidden_states):
    """RMSNorm without the cast to float32 that the library's has even in a float64 model."""
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


def tiny_model(
    seed: int = 0, lora: bool = True, vocab: int = VOCAB, hidden: int = 8, layers: int = 1
) -> torch.nn.Module:
    """A float64 Qwen2 with random weights of a size that makes its distributions uneven."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=EOS,
            tie_word_embeddings=False,
        )
        model = Qwen2ForCausalLM(config).double()
        for p in model.parameters():
            p.data += 0.4 * torch.randn_like(p)
        if lora:
            model = get_peft_model(
                model,
                LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM"),
                autocast_adapter_dtype=False,
            ).double()
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.data = 0.3 * torch.randn_like(p)
    return model.eval()


def tiny_policy(monkeypatch, seed: int = 0, lora: bool = True, layers: int = 1, **settings) -> Policy:
    """A `Policy` around `tiny_model`, float64 throughout."""
    monkeypatch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", float64_norm)
    settings = {"temperature": 0.8, "microbatch_size": 64, "head_chunk_tokens": 50, **settings}
    return Policy(model=tiny_model(seed, lora, layers=layers), **settings)


def all_sequences(cap: int = CAP, vocab: int = VOCAB) -> RolloutBatch:
    """Every response of the capped process: those that end with EOS within the cap, and those that are cut off."""
    rows: list[tuple[int, ...]] = []
    others = [v for v in range(vocab) if v != EOS]
    for length in range(1, cap + 1):
        rows += [(*head, EOS) for head in itertools.product(others, repeat=length - 1)]
    rows += list(itertools.product(others, repeat=cap))
    return as_batch(rows, truncated=[row[-1] != EOS for row in rows])


def as_batch(rows: list[tuple[int, ...]], truncated: list[bool] | None = None) -> RolloutBatch:
    """A batch of these responses to the one prompt."""
    B, T = len(rows), max(len(row) for row in rows)
    ids, mask = torch.zeros(B, T, dtype=torch.int64), torch.zeros(B, T, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row, dtype=torch.int64), True
    return RolloutBatch(
        prompts=("",) * B,
        completions=("",) * B,
        prompt_ids=(PROMPT,) * B,
        completion_ids=ids,
        mask=mask,
        truncated=torch.tensor(truncated if truncated is not None else [False] * B),
        group=torch.arange(B),
    )


def ragged_batch(seed: int = 1, vocabulary: int = 40) -> RolloutBatch:
    """Prompts and responses of mixed length; token 0 (pad) and 2 (EOS) occur as ordinary tokens too."""
    g = torch.Generator().manual_seed(seed)
    prompts = [tuple(torch.randint(0, vocabulary, (n,), generator=g).tolist()) for n in (3, 9, 1, 6)]
    lengths = torch.tensor([5, 2, 7, 1])
    mask = torch.arange(7) < lengths.unsqueeze(1)
    return RolloutBatch(
        prompts=("",) * 4,
        completions=("",) * 4,
        prompt_ids=tuple(prompts),
        completion_ids=torch.randint(0, vocabulary, (4, 7), generator=g),
        mask=mask,
        truncated=torch.zeros(4, dtype=torch.bool),
        group=torch.arange(4),
    )


def naive_scores(policy: Policy, batch: RolloutBatch) -> tuple[Tensor, Tensor]:
    """`(l, h)`, `(B, T)`, one sequence at a time with full logits and autograd: the independent reference."""
    l_rows, h_rows = [], []
    for i in range(len(batch)):
        n = int(batch.mask[i].sum())
        ids = torch.tensor([*batch.prompt_ids[i], *batch.completion_ids[i, :n].tolist()])
        logits = policy.model(input_ids=ids.unsqueeze(0)).logits[0] / policy.temperature
        p = logits.softmax(-1)[len(batch.prompt_ids[i]) - 1 : -1]
        pad = torch.zeros(batch.mask.shape[1] - n, dtype=p.dtype)
        l_rows.append(torch.cat([p.log()[torch.arange(n), ids[-n:]], pad]))
        h_rows.append(torch.cat([-(p * p.log()).sum(-1), pad]))
    return torch.stack(l_rows), torch.stack(h_rows)


def exact_entropies(policy: Policy, batch: RolloutBatch) -> tuple[Tensor, Tensor, Tensor]:
    """`(H_seq, H_tok, probabilities)` of the enumerated process, differentiable."""
    l, h = naive_scores(policy, batch)
    probability = l.sum(1).exp()
    H_seq = (probability * h.sum(1)).sum()
    return H_seq, H_seq / (probability * batch.mask.sum(1)).sum(), probability

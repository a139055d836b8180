"""Tiny Qwen2 policies and their checkpoints, written the way that real training writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from probe.loading import quiet_libraries
from tests.support.helpers import char_tokenizer

VOCABULARY = 104
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SHARED_SHAPE = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
"""What configurations of other architectures have in common with `tiny_config`."""

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


def tiny_config(*, hidden: int = 32, layers: int = 2, tied: bool = True, **options: Any) -> Any:
    from transformers import Qwen2Config

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    return Qwen2Config(**{**settings, **options})


def tiny_model(seed: int = 0, **options: Any) -> Any:
    """A Qwen2 with random weights of a size at which logits differ; biases and norms are random too."""
    from transformers import Qwen2ForCausalLM

    with quiet_libraries(), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(tiny_config(**options))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_experts(*, moe: int = 16, head_dim: int = 8, **options: Any) -> Any:
    """A mixture of four experts, of which two are asked, of the shape of `tiny_model` and as random."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = {k: v for k, v in tiny_config(**options).to_dict().items() if k in SHARED_SHAPE}
    routed = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": moe, "head_dim": head_dim}
    with quiet_libraries(), torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **routed))
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
    return model


def save_base(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A base model with its tokenizer in `folder`."""
    with quiet_libraries():
        tiny_model(seed, **options).to(dtype).save_pretrained(folder)
        char_tokenizer().save_pretrained(folder)
    return folder


def add_lora(model: Any, *, r: int = 4, seed: int = 1, **options: Any) -> Any:
    """The model with a LoRA adapter on all linear layers whose B is not zero."""
    from peft import LoraConfig, get_peft_model

    settings = {"lora_dropout": 0.1, "target_modules": LINEAR_LAYERS, "task_type": "CAUSAL_LM"}
    with quiet_libraries(), torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, **{**settings, **options}))
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
    return policy


def load_base(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet_libraries():
        return AutoModelForCausalLM.from_pretrained(folder, **options)


def quantize_linear_layers(model: Any) -> list[Any]:
    """Put bitsandbytes' 4-bit layers in the place of the blocks' linear ones; quantised when the model is moved."""
    with quiet_libraries():
        bnb = pytest.importorskip("bitsandbytes")
    layers = []
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    small = bnb.nn.Linear4bit(
                        layer.in_features,
                        layer.out_features,
                        bias=layer.bias is not None,
                        compute_dtype=torch.float32,
                        quant_type="nf4",
                    )
                    small.load_state_dict(layer.state_dict())
                    setattr(parent, name, small)
                    layers.append(small)
    return layers


def set_gradients(named_parameters: Iterable[tuple[str, nn.Parameter]], seed: int = 0) -> None:
    """Random gradients that depend on the parameter's name only."""
    for name, parameter in sorted(named_parameters):
        generator = torch.Generator().manual_seed(seed + sum(name.encode()))
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        parameter.grad = (0.01 * gradient).to(parameter)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    """Steps with random gradients."""
    for step in range(steps):
        set_gradients(((n, p) for n, p in model.named_parameters() if p.requires_grad), seed=step)
        optimizer.step()
        optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters in one group, as most training loops build it."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.01)


def save_checkpoint(
    folder: Path,
    model: Any,
    optimizer: torch.optim.Optimizer | None,
    *,
    layout: Literal["nested", "flat"] = "nested",
    tokenizer: bool = True,
    trainer_state: dict | None = None,
) -> Path:
    """Write model, optimizer and tokenizer: `folder/model` and `folder/optimizer.pt`, or all in `folder`."""
    model_dir = folder / "model" if layout == "nested" else folder
    with quiet_libraries():
        model.save_pretrained(model_dir)
        if tokenizer:
            char_tokenizer().save_pretrained(model_dir)
    if optimizer is not None:
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    if trainer_state is not None:
        (folder / "trainer_state.json").write_text(json.dumps(trainer_state), encoding="utf-8")
    return folder


def lora_checkpoint(
    folder: Path, base: Path, *, optimizer: OptimizerFactory = adamw, steps: int = 3, **options: Any
) -> tuple[Path, Any, torch.optim.Optimizer]:
    """A LoRA checkpoint after a few steps, with the live model and optimizer that wrote it."""
    model = add_lora(load_base(base), lora_dropout=0.0)
    live = optimizer(model)
    take_steps(model, live, steps)
    return save_checkpoint(folder, model, live, **options), model, live


def trainer_checkpoint(folder: Path, model: Any, **options: Any) -> tuple[Path, Any, torch.optim.Optimizer]:
    """`checkpoint-2` as transformers' Trainer writes it, with the live model and optimizer."""
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(4, VOCABULARY, (12,), generator=generator).tolist() for _ in range(4)]
    settings: dict[str, Any] = {
        "max_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    with quiet_libraries(), torch.random.fork_rng():
        trainer = Trainer(
            model=model,
            args=TrainingArguments(output_dir=str(folder), **{**settings, **options}),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            processing_class=char_tokenizer(),
        )
        trainer.train()
    return folder / "checkpoint-2", model, trainer.optimizer.optimizer

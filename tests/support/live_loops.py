"""Training loops small enough to be run twice, with the probe and without, and everything of the host to compare."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from probe.live import Watch, watch
from tests.support.helpers import char_tokenizer
from tests.support.tiny_models import add_lora, tiny_model

PROMPTS = ["3+4=", "ab", "what?", "7"]
PLAIN = (bool, int, float, str, type(None))
IDS = {"_torchdynamo_wrapper_id"}
SMALL = {"hidden": 16, "layers": 1}
TIMES = {"seconds", "cost_share", "every"}
"""Numbers of a history that are not the same in every run."""


def numbers(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a probe has found, without what it has cost."""
    return [{k: v for k, v in entry.items() if k not in TIMES} for entry in history]


Step = Callable[["Loop", int], float]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def lora_model(**options: Any) -> Any:
    """A LoRA policy in training mode whose dropout draws random numbers."""
    return add_lora(tiny_model(**{**SMALL, **options})).train()


def full_model(**options: Any) -> Any:
    return tiny_model(**{**SMALL, "attention_dropout": 0.1, **options}).train()


def adamw(model: nn.Module, lr: float = 1e-2, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.1, **options)


def sgd(model: nn.Module, lr: float = 1e-2, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(trainable(model), lr=lr, **options)


def attach(model: Any, optimizer: Any, prompts: Any = None, tokenizer: Any = None, **settings: Any) -> Watch:
    """A watch that probes every step with a tiny E."""
    defaults = {"every": 1, "B_E": 3, "max_new_tokens": 3, "microbatch_size": 4, "strict": True}
    return watch(
        model,
        optimizer,
        PROMPTS if prompts is None else prompts,
        char_tokenizer() if tokenizer is None else tokenizer,
        **{**defaults, **settings},
    )


# ---------------------------------------------------------------- ways to take a step


def loss_of(loop: Loop, k: int, rows: slice = slice(None)) -> Tensor:
    """A loss that depends on the batch, on dropout, and on the global random streams of all three libraries."""
    generator = torch.Generator().manual_seed(k)
    ids = torch.randint(4, 100, (4, loop.length), generator=generator)[rows]
    loss = loop.model(input_ids=ids, labels=ids).loss
    return loss * (1.0 + 0.1 * random.random() + 0.1 * float(np.random.rand()))


def plain_step(loop: Loop, k: int) -> float:
    loss = loss_of(loop, k)
    loss.backward()
    nn.utils.clip_grad_norm_(trainable(loop.model), 1.0)
    for optimizer in loop.optimizers:
        optimizer.step()
    loop.zero_grad(k)
    return float(loss.detach())


def closure_step(loop: Loop, k: int) -> float:
    def closure() -> Tensor:
        loop.optimizers[0].zero_grad(set_to_none=False)
        loss = loss_of(loop, k)
        loss.backward()
        return loss

    return float(loop.optimizers[0].step(closure).detach())


def accumulating_step(loop: Loop, k: int) -> float:
    losses = []
    for half in (slice(0, 2), slice(2, 4)):
        loss = loss_of(loop, k, half) / 2
        loss.backward()
        losses.append(float(loss.detach()))
    loop.optimizers[0].step()
    loop.zero_grad(k)
    return sum(losses)


def autocast_step(loop: Loop, k: int) -> float:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(loop, k)
    if loop.scaler is None:
        loss.backward()
        loop.optimizers[0].step()
    else:
        loop.scaler.scale(loss).backward()
        loop.scaler.step(loop.optimizers[0])
        loop.scaler.update()
    loop.zero_grad(k)
    return float(loss.detach())


@dataclass
class Loop:
    """A model with its optimizers, and how a step is taken.

    Attributes:
        model: what the loop calls.
        optimizers: in the order of their steps.
        step: takes one.
        length: tokens of the training rows.
        scaler: a gradient scaler, or None.
        tokenizer: the host's.
        losses: of the steps so far.
        steps: of a whole run; the gradients of the last one are kept.
        fixed: whether training itself leaves all other objects of the model as they are.
    """

    model: Any
    optimizers: Sequence[torch.optim.Optimizer]
    step: Step = plain_step
    length: int = 8
    scaler: Any = None
    tokenizer: Any = field(default_factory=char_tokenizer)
    losses: list[float] = field(default_factory=list)
    steps: int = 6
    fixed: bool = True

    def zero_grad(self, k: int) -> None:
        if k < self.steps - 1:
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=k % 2 == 0)

    def run(self, steps: int | None = None) -> None:
        done = len(self.losses)
        for k in range(done, done + (self.steps - done if steps is None else steps)):
            self.losses.append(self.step(self, k))

    def everything(self) -> dict[str, Any]:
        """All of the host that the probe could have changed, copied."""
        modules = dict(self.model.named_modules())
        return {
            "losses": list(self.losses),
            "parameters": {n: p.detach().clone() for n, p in self.model.named_parameters()},
            "requires_grad": {n: p.requires_grad for n, p in self.model.named_parameters()},
            "grads": {
                n: None if p.grad is None else p.grad.clone() for n, p in self.model.named_parameters()
            },
            "optimizers": [copied(o.state_dict()) for o in self.optimizers],
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "modules": {n: module_state(m) for n, m in modules.items()},
            "generation_config": self.model.generation_config.to_dict(),
            "config": self.model.config.to_dict(),
            "tokenizer": tokenizer_state(self.tokenizer),
            "process": process_state(),
        }


def module_state(module: nn.Module) -> dict[str, Any]:
    """Flags, buffers, plain attributes, hooks and class of one module."""
    own = vars(module)
    return {
        "class": type(module).__qualname__,
        "names": sorted(own),
        "plain": {k: v for k, v in own.items() if isinstance(v, PLAIN) and k not in IDS},
        "tensors": {k: v.clone() for k, v in own.items() if isinstance(v, Tensor)},
        "buffers": {k: None if b is None else b.clone() for k, b in module._buffers.items()},
        "hooks": {k: len(v) for k, v in own.items() if k.endswith("_hooks") and isinstance(v, dict)},
    }


def tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    return {
        "backend": tokenizer.backend_tokenizer.to_str(),
        "padding": tokenizer.backend_tokenizer.padding,
        "truncation": tokenizer.backend_tokenizer.truncation,
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "pad": tokenizer.pad_token_id,
        "template": tokenizer.chat_template,
    }


def process_state() -> dict[str, Any]:
    """Random streams and the switches of torch."""
    return {
        "python": random.getstate(),
        "numpy": copied(np.random.get_state()),
        "torch": torch.get_rng_state(),
        "fp32": fp32_precisions(),
        "matmul": torch.get_float32_matmul_precision(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast_dtype": torch.get_autocast_dtype("cpu"),
        "autocast_cache": torch.is_autocast_cache_enabled(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "default_dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "sdp": [
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ],
    }


def fp32_precisions() -> list[str]:
    """Torch's newer switches of float32 products, where it has them."""
    found = [torch.backends, getattr(torch.backends.cuda, "matmul", None)]
    mkldnn = torch.backends.mkldnn
    found += [mkldnn, getattr(mkldnn, "matmul", None), getattr(mkldnn, "conv", None)]
    return [str(b.fp32_precision) for b in found if hasattr(b, "fp32_precision")]


def identities(loop: Loop) -> list[int]:
    """The objects that must stay the same ones."""
    model = loop.model
    found = [id(p) for p in model.parameters()] + [p.data_ptr() for p in model.parameters()]
    found += [id(b) for m in model.modules() for b in m._buffers.values()]
    found += [id(type(m)) for m in model.modules()]
    found += [id(v) for m in model.modules() for v in vars(m).values()]
    return [*found, id(model.generation_config), *(id(g) for o in loop.optimizers for g in o.param_groups)]


def copied(value: Any) -> Any:
    """A deep copy of containers, tensors and arrays."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return torch.tensor(value.astype(np.int64))
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [copied(v) for v in value]
    return value


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested states are not bitwise equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        equal = (
            one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(as_bits(one), as_bits(other))
        )
        return [] if equal else [where]
    if type(one) is not type(other):
        return [f"{where}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, dict):
        if list(map(str, one)) != list(map(str, other)):
            return [f"{where}: keys {sorted(map(str, set(one) ^ set(other)))}"]
        return [
            d for a, b in zip(one, other, strict=True) for d in differences(one[a], other[b], f"{where}.{a}")
        ]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)} entries"]
        return [
            d
            for k, (a, b) in enumerate(zip(one, other, strict=True))
            for d in differences(a, b, f"{where}[{k}]")
        ]
    return [] if one == other or (one != one and other != other) else [f"{where}: {one!r} and {other!r}"]


def as_bits(x: Tensor) -> Tensor:
    """Bytes, so that NaN equals itself and -0 is not 0."""
    return x.detach().contiguous().cpu().reshape(-1).view(torch.uint8) if x.numel() else x


@contextlib.contextmanager
def seeded(seed: int = 7) -> Iterator[None]:
    """Global random streams at a known place, and back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def host_after(
    build: Callable[[], Loop], probed: bool, **settings: Any
) -> tuple[dict[str, Any], Watch | None]:
    """Everything of the host after a whole run, and the watch."""
    with seeded():
        loop = build()
        before = identities(loop)
        found = None
        if probed:
            found = attach(loop.model, list(loop.optimizers), tokenizer=loop.tokenizer, **settings)
            assert not loop.fixed or identities(loop) == before
        loop.run()
        if probed and loop.fixed:
            assert not [a for a, b in zip(identities(loop), before, strict=True) if a != b]
        return loop.everything(), found


def small_loop(**options: Any) -> Loop:
    model = lora_model()
    return Loop(model, [adamw(model)], **options)


def two_optimizers() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    model = lora_model()
    A = [p for n, p in model.named_parameters() if "lora_A" in n]
    B = [p for n, p in model.named_parameters() if "lora_B" in n]
    return model, [torch.optim.AdamW(A, lr=1e-2), torch.optim.AdamW(B, lr=1e-2)]


def gradients(model: nn.Module, k: int) -> None:
    ids = torch.randint(4, 100, (2, 6), generator=torch.Generator().manual_seed(k))
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()


def moved(values: dict[str, torch.Tensor], model: nn.Module) -> float:
    return math.sqrt(sum(float((p.detach() - values[n]).double().square().sum()) for n, p in named(model)))


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]

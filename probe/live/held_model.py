"""What a model is before a probe: its modules and its tensors, by every path, and how they are put back."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from probe.loading.quantization import find_4bit_layers, use_exact_4bit_layers
from probe.shards import is_shard, part

SMALL_BUFFER = 2**20
"""Buffers of up to this many bytes are copied and put back; of larger ones a change is an error."""
_CONTENTS = ("_parameters", "_buffers", "_modules")
"""Attributes of a module whose entries are put back one by one."""


class HeldModules:
    """The modules of a model: class, attributes, and which objects stand in them."""

    def __init__(self, model: nn.Module) -> None:
        """Only read."""
        self._model = model
        self._modules = [(module, module.__class__, dict(vars(module))) for module in model.modules()]
        self._contents = [
            (vars(module)[name], dict(vars(module)[name]))
            for module, _, _ in self._modules
            for name in _CONTENTS
        ]

    def prepare(self) -> None:
        """Evaluation mode, with the forward and the 4-bit layers that do what is written in them."""
        for module in self._model.modules():
            own = vars(module)
            if "_original_forward" in own and "forward" in own:
                # accelerate's mixed precision: autocast would round what is to be resolved
                module.forward = own["_original_forward"]
        if find_4bit_layers(self._model):
            # bitsandbytes' own forward may repack the weights for good in evaluation mode
            use_exact_4bit_layers(self._model)
        # one by one: `model.eval()` would call every module's `train`, and some do work there that nothing undoes
        for module in self._model.modules():
            module.training = False

    def restore(self) -> None:
        """As they were, the very same objects."""
        for module, own_class, saved in self._modules:
            if module.__class__ is not own_class:
                module.__class__ = own_class
            _put_back_entries(vars(module), saved)
        # only now: the containers of the modules are those of before again
        for container, entries in self._contents:
            _put_back_entries(container, entries)


class HeldTensors:
    """The parameters of a model, their gradients and hooks, and its buffers.

    Attributes:
        problems: what was written to and could not be put back.
    """

    def __init__(self, model: nn.Module) -> None:
        """Only read."""
        self.problems: list[str] = []
        rewritten = _rewritten_in_place(model)
        self._parameters = [
            (
                name,
                p,
                _fingerprint(p) if id(p) in rewritten else _version(p),
                part(p).data_ptr(),
                p.requires_grad,
                p.grad,
                _version(p.grad),
            )
            for name, p in model.named_parameters()
        ]
        self._hooks = [
            (p, p._backward_hooks) for p in model.parameters() if p.requires_grad and p._backward_hooks
        ]
        self._buffers: list[tuple[str, Tensor, Tensor | int]] = []
        for name, buffer in model.named_buffers():
            small = buffer.numel() * buffer.element_size() <= SMALL_BUFFER
            self._buffers.append((name, buffer, buffer.clone() if small else _version(buffer)))

    def prepare(self) -> None:
        """Without training's own hooks: the probe's gradients are none of their business."""
        for p, _ in self._hooks:
            p._backward_hooks = None

    def restore(self) -> None:
        """As they were; what was written to a parameter, a gradient or a large buffer is a problem."""
        for name, p, version, where, trained, grad, grad_version in self._parameters:
            if p.requires_grad != trained:
                p.requires_grad_(trained)
            if p.grad is not grad:
                p.grad = grad
            now = _version(p) if isinstance(version, int) else _fingerprint(p)
            if now != version or part(p).data_ptr() != where:
                self.problems.append(f"parameter {name} written to")
            if _version(grad) != grad_version:
                self.problems.append(f"the gradient of {name} written to")
        for p, hooks in self._hooks:
            if p._backward_hooks is not hooks:
                p._backward_hooks = hooks
        for name, buffer, saved in self._buffers:
            if isinstance(saved, int):
                if _version(buffer) != saved:
                    self.problems.append(f"buffer {name} changed")
            elif not _same_bits(buffer, saved):
                with torch.no_grad():
                    buffer.copy_(saved)


def _put_back_entries(own: MutableMapping[str, Any], saved: MutableMapping[str, Any]) -> None:
    """Give a mapping the very objects that it held, in their order."""
    if list(own) == list(saved) and all(own[name] is value for name, value in saved.items()):
        return
    for name in own.keys() - saved.keys():
        del own[name]
    for name, value in saved.items():
        if own.get(name, own) is not value:
            own[name] = value
    if list(own) != list(saved):
        for name, value in saved.items():
            own.pop(name, None)
            own[name] = value


def _version(p: Tensor | None) -> int:
    """How often a tensor was written to; 0 for those that do not count."""
    return 0 if p is None or p.is_inference() else p._version


def _rewritten_in_place(model: nn.Module) -> set[int]:
    """Parameters that are written to and put back, so that their values are compared.

    Peft's adapters of parameters (`target_parameters`) register them anew, as they are, in each forward; and parts of
    sharded parameters are moved by passes at other values.
    """
    wrappers = [module for module in model.modules() if type(module).__name__ == "ParamWrapper"]
    own = {id(p) for p in model.parameters() if is_shard(p) and p.requires_grad}
    return own | {id(p) for one in wrappers for p in one.get_base_layer().parameters(recurse=False)}  # type: ignore[operator]


def _fingerprint(p: Tensor) -> tuple[int, int]:
    """Two sums over the bits of a tensor, modulo `2 ** 64`: the same before and after for the same values."""
    data = part(p.detach()).contiguous().view(-1)
    size = data.element_size()
    bits = data.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).long()
    place = torch.arange(1, len(bits) + 1, device=bits.device)
    return int(bits.sum()), int((bits * place).sum())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and type are equal, NaN equal to itself."""
    return bool(torch.equal(one, other)) or bool(
        torch.equal(torch.isnan(one), torch.isnan(other))
        and torch.equal(one.nan_to_num(), other.nan_to_num())
    )

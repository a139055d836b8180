"""Temporary state: whatever is changed inside these context managers is bitwise restored, also after an exception."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Put the global random states of Python, NumPy, torch and CUDA back, whatever happens in between."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch every module to evaluation mode (no dropout), and each one back to what it was."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's operators on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Switch TF32 and other reduced-precision float32 products off."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def parameters_at(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give `parameters` other values; the old ones are kept where the new ones are (`snapshot_device`)."""
    missing = sorted(set(parameters) ^ set(values))
    if missing:
        raise ValueError(f"expected one value per parameter, found a difference in {missing[:10]}")
    old = {name: _copy(p, values[name].device) for name, p in parameters.items()}
    try:
        _assign(parameters, values)
        yield
    finally:
        _assign(parameters, old)


@contextmanager
def preserved(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    device: torch.device | str = "cpu",
) -> Iterator[None]:
    """Keep a deep snapshot of the parameters, their `.grad` and the optimizer's state, and put it back at the end.

    The state's tensors are cloned, not only the dictionaries around them: an optimizer writes into its moments in
    place. On the way back, values are copied into the tensors that were there, so that references to them hold.
    """
    values = {name: _copy(p, device) for name, p in parameters.items()}
    grads = {name: p.grad for name, p in parameters.items()}
    grad_values = {name: None if g is None else _copy(g, device) for name, g in grads.items()}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    groups = [
        {k: _copy(v, device) if isinstance(v, Tensor) else v for k, v in group.items()} for group in groups
    ]
    state = {p: dict(entries) for p, entries in optimizer.state.items()}
    state_values = {
        p: {k: _copy(v, device) for k, v in entries.items() if isinstance(v, Tensor)}
        for p, entries in state.items()
    }
    try:
        yield
    finally:
        _assign(parameters, values)
        for name, p in parameters.items():
            old, kept = grads[name], grad_values[name]
            if old is not None and kept is not None:
                _write(old, kept)
            p.grad = old
        _restore_optimizer(optimizer, groups, state, state_values)


def _restore_optimizer(
    optimizer: torch.optim.Optimizer,
    groups: list[dict[str, Any]],
    state: dict[Any, dict[str, Any]],
    state_values: dict[Any, dict[str, Tensor]],
) -> None:
    """Put hyper-parameters and state back, dropping what was added meanwhile."""
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key in set(group) - set(saved) - {"params"}:
            del group[key]
        for key, value in saved.items():
            if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                _write(group[key], value)
            else:
                group[key] = value
    for p in [p for p in optimizer.state if p not in state]:
        del optimizer.state[p]
    for p, entries in state.items():
        for key, kept in state_values[p].items():
            _write(entries[key], kept)
        optimizer.state[p].clear()
        optimizer.state[p].update(entries)


def _copy(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy on `device` that shares nothing with `tensor`."""
    return tensor.detach().to(device, copy=True)


def _write(target: Tensor, value: Tensor) -> None:
    """Copy `value` into `target`'s storage."""
    with torch.no_grad():
        target.copy_(value)


def _assign(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copy `values` into the parameters."""
    for name, p in parameters.items():
        _write(p, values[name])

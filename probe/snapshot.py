"""Temporary state: whatever is changed inside these context managers is bitwise restored, also after an exception."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from probe.shards import is_shard


@contextmanager
def put_back_by(restore: Callable[[], object]) -> Iterator[None]:
    """Call `restore` in the end, wherever an interrupt strikes on the way: what was cut off is done again.

    Args:
        restore: puts things back; doing it twice is doing it once.
    """
    done = False

    def once() -> None:
        nonlocal done
        if not done:
            restore()
            done = True

    # nested, so that an interrupt on the way into one `finally` is followed by the next
    try:
        try:
            try:
                yield
            finally:
                once()
        finally:
            once()
    finally:
        once()


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Put the global random states of Python, NumPy, torch and CUDA back, whatever happens in between."""
    with put_back_by(held_rng()):
        yield


def held_rng() -> Callable[[], None]:
    """What puts the global random states of Python, NumPy, torch and CUDA back to what they are now."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return restore


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch every module to evaluation mode (no dropout), and each one back to what it was.

    The flags are set one by one: `model.eval()` would call every module's `train`, and some do work there that nothing
    undoes (merging an adapter into its weight).
    """
    flags = {module: module.training for module in model.modules()}

    def restore() -> None:
        for module, training in flags.items():
            module.training = training

    with put_back_by(restore):
        for module in flags:
            module.training = False
        yield


def one_thread() -> AbstractContextManager[None]:
    """Run torch's operators on one thread."""
    return operator_threads(1)


@contextmanager
def operator_threads(count: int | None) -> Iterator[None]:
    """Run torch's operators on so many threads; None for as many as now."""
    threads = torch.get_num_threads()
    if count is None or count == threads:
        yield
        return
    with put_back_by(lambda: torch.set_num_threads(threads)):
        torch.set_num_threads(count)
        yield


@contextmanager
def exact_float32() -> Iterator[None]:
    """Switch TF32 and other reduced-precision float32 products off."""
    use_exact, restore = float32_precision()
    with put_back_by(restore):
        use_exact()
        yield


def float32_precision() -> tuple[Callable[[], None], Callable[[], None]]:
    """What makes float32 products exact, and what puts their precision back to what it is now.

    Torch has two ways to set it, and refuses to read the old one where the new one was used (`fp32_precision` of a
    backend, from torch 2.9 on). Setting the old one overwrites the new ones, so these are put back one by one.
    """
    known = (getattr(torch.backends.cuda, "matmul", None), getattr(torch.backends.mkldnn, "matmul", None))
    backends: list[Any] = [backend for backend in known if hasattr(backend, "fp32_precision")]
    own = [backend.fp32_precision for backend in backends]
    old: str | None
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:
        old = None

    def use_exact() -> None:
        if old is not None:
            torch.set_float32_matmul_precision("highest")
            return
        for backend in backends:
            backend.fp32_precision = "ieee"

    def restore() -> None:
        if old is not None:
            torch.set_float32_matmul_precision(old)
        for backend, value in zip(backends, own, strict=True):
            if backend.fp32_precision != value:
                backend.fp32_precision = value

    return use_exact, restore


@contextmanager
def standing_in(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module compute with other tensors in the place of some of its parameters or buffers.

    The tensors themselves are not written to; dual numbers and the tensors of `torch.func` transforms may stand in.
    Every place that holds one of them is found by identity and visited once, whatever number of names lead to it. So
    tied weights move together, and a module that is reachable by two paths gets its own parameters back, the same
    objects (`torch.func.functional_call` leaves it the stand-in of the first path).

    Args:
        module: any module.
        values: by a name of `named_parameters` or `named_buffers`.

    Raises:
        ValueError: a name is neither.
    """
    with replaced(stand_ins(module, values)):
        yield


_ABSENT = object()
Places = Sequence[tuple[dict[str, Any], str, Any]]
"""Entries of mappings and what they are to hold: `(mapping, key, value)`."""


def stand_ins(module: nn.Module, values: Mapping[str, Tensor]) -> Places:
    """Where `standing_in` puts which values; for passes that use the same ones many times.

    Shards have no place: a sharded module's parameters are moved themselves (`probe.distributed.lockstep`).

    Args:
        module: any module.
        values: by a name of `named_parameters` or `named_buffers`.

    Raises:
        ValueError: a name is neither.
    """
    if not values:  # most passes: there is no need to go through the module
        return []
    own = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    unknown = sorted(set(values) - set(own))
    if unknown:
        raise ValueError(f"expected values for parameters or buffers of the module, found {unknown[:10]}")
    wanted = {id(own[name]): value for name, value in values.items() if not is_shard(value)}
    # plain attributes too: some modules keep a tied weight as one
    return [
        (holder, key, wanted[id(tensor)])
        for part in module.modules()
        for holder in (part._parameters, part._buffers, vars(part))
        for key, tensor in holder.items()
        if isinstance(tensor, Tensor) and id(tensor) in wanted
    ]


@contextmanager
def replaced(places: Places) -> Iterator[None]:
    """Give entries of mappings other values, and then the very objects that they held, or none where there was none."""
    held = [(holder, key, holder.get(key, _ABSENT)) for holder, key, _ in places]

    def restore() -> None:
        for holder, key, value in held:
            if value is _ABSENT:
                holder.pop(key, None)
            else:
                holder[key] = value

    with put_back_by(restore):
        for holder, key, value in places:
            holder[key] = value
        yield


@contextmanager
def attributes_replaced(places: Sequence[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Give plain attributes of modules other values, and then the very objects that they held.

    Args:
        places: `(module, name, value)`; the module has an attribute of that name of its own.
    """
    with replaced([(vars(module), name, value) for module, name, value in places]):
        yield


@contextmanager
def parameters_at(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give `parameters` other values; the old ones are kept where the new ones are (`snapshot_device`)."""
    missing = sorted(set(parameters) ^ set(values))
    if missing:
        raise ValueError(f"expected one value per parameter, found a difference in {missing[:10]}")
    old = {name: _copy(p, values[name].device) for name, p in parameters.items()}
    with put_back_by(lambda: _assign(parameters, old)):
        _assign(parameters, values)
        yield


@contextmanager
def preserved(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    device: torch.device | str = "cpu",
) -> Iterator[None]:
    """Keep a deep snapshot of parameters, their `.grad` and the optimizer's groups and state; put it back at the end.

    Parameters that only the optimizer knows belong to the snapshot too: a step moves them where they have a `.grad`.
    The state's tensors are cloned, however deep they lie, not only the containers around them: an optimizer writes
    into its moments in place. On the way back, values are written into the tensors and containers that were there, so
    that references to them hold.
    """
    everything: dict[int, Tensor] = {id(p): p for p in parameters.values()}
    everything |= {id(p): p for group in optimizer.param_groups for p in group["params"]}
    values = [(p, _copy(p, device), _Saved(p.grad, device)) for p in everything.values()]
    groups = [_Saved({k: v for k, v in g.items() if k != "params"}, device) for g in optimizer.param_groups]
    state = {key: (entries, _Saved(entries, device)) for key, entries in optimizer.state.items()}

    def restore() -> None:
        for p, value, grad in values:
            _write(p, value)
            p.grad = grad.restore()
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            kept = saved.restore()
            for added in set(group) - set(kept) - {"params"}:
                del group[added]
            group.update(kept)
        for key in [key for key in optimizer.state if key not in state]:
            del optimizer.state[key]
        for key, (entries, saved) in state.items():
            saved.restore()
            optimizer.state[key] = entries

    with put_back_by(restore):
        yield


class _Saved:
    """A value with deep copies of the tensors in it, and how to put it back into the same objects."""

    def __init__(self, value: Any, device: torch.device | str) -> None:
        self._value = value
        self._content: Any = None
        if isinstance(value, Tensor):
            self._content = _copy(value, device)
        elif isinstance(value, dict):
            self._content = {key: _Saved(entry, device) for key, entry in value.items()}
        elif isinstance(value, (list, tuple)):
            self._content = [_Saved(entry, device) for entry in value]

    def restore(self) -> Any:
        """Write everything back; returns the value."""
        if isinstance(self._value, Tensor):
            _write(self._value, self._content)
        elif isinstance(self._value, dict):
            kept = {key: entry.restore() for key, entry in self._content.items()}
            self._value.clear()
            self._value.update(kept)
        elif isinstance(self._value, list):
            self._value[:] = [entry.restore() for entry in self._content]
        elif isinstance(self._value, tuple):
            for entry in self._content:
                entry.restore()
        return self._value


def copied(tensors: Mapping[str, Tensor], device: torch.device | str | None = None) -> dict[str, Tensor]:
    """Copies that share nothing with `tensors`, where these are or on `device`."""
    return {name: _copy(x, x.device if device is None else device) for name, x in tensors.items()}


def _copy(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy on `device` that shares nothing with `tensor`."""
    return tensor.detach().to(device, copy=True)


def _write(target: Tensor, value: Tensor) -> None:
    """Copy `value` into `target`'s storage; without switching gradients off, which an interrupt could leave off."""
    target.detach().copy_(value)


def _assign(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copy `values` into the parameters."""
    for name, p in parameters.items():
        _write(p, values[name])

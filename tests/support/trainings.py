"""What the tests of the training callbacks share: states to compare, a probe that fails, and two processes."""

from __future__ import annotations

import os
import random
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import multiprocessing

from probe.live.step import UpdateProbe
from probe.shards import part


def streams() -> tuple[Any, ...]:
    """The states of all global random streams."""
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, keys.tobytes(), *rest, torch.get_rng_state().numpy().tobytes()


def set_streams(seed: int = 11) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def bits(tree: Any) -> Any:
    """Tensors as their bytes, of shards those of this process: NaN is equal to itself, and 0 not to -0."""
    if isinstance(tree, torch.Tensor):
        tree = part(tree)
        flat = tree.detach().cpu().contiguous().reshape(-1)
        return str(tree.dtype), tuple(tree.shape), flat.view(torch.uint8).numpy().tobytes()
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [bits(value) for value in tree]
    return repr(tree)


def break_probe(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Let the `at`-th probe fail in the middle of its work."""
    original = UpdateProbe.after

    def after(self: UpdateProbe, before: Any, *rest: Any) -> Any:
        if before.number == at:
            torch.rand(3), random.random(), np.random.rand()
            self.model.eval()
            raise RuntimeError("a broken probe")
        return original(self, before, *rest)

    monkeypatch.setattr(UpdateProbe, "after", after)


def in_two_processes(function: Callable[..., Any], *arguments: Any, seconds: float = 60.0) -> list[Any]:
    """What a function returns in each of two processes; see `in_processes`."""
    return in_processes(2, function, *arguments, seconds=seconds)


def in_processes(
    count: int, function: Callable[..., Any], *arguments: Any, seconds: float = 60.0
) -> list[Any]:
    """What a function returns in each of several processes that torch.distributed can connect.

    Args:
        count: of processes.
        function: called with `arguments`; a launcher has set its environment, as torchrun does.
        arguments: the first is a folder for the results.
        seconds: after which the processes are ended and the test fails.
    """
    folder = Path(arguments[0])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*multi-threaded, use of fork", DeprecationWarning
        )  # from Python 3.12 on
        # forked ones need no imports
        context = multiprocessing.start_processes(
            _process, (function, count, port, *arguments), nprocs=count, join=False, start_method="fork"
        )
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=1.0):  # raises what a process raised
            assert time.monotonic() < end, "one process waits for the other"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _process(
    rank: int, function: Callable[..., Any], count: int, port: int, folder: str, *arguments: Any
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }
    torch.save(function(Path(folder), *arguments), Path(folder) / f"{rank}.pt")

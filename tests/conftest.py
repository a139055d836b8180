"""Fixtures shared by the tests, and what watches that none leaves anything behind."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The models are tiny: threads only wait for each other, most of all where several test runs share a machine.
torch.set_num_threads(1)

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory):
    """A cache folder with the demo policy in it, made once for all tests that need the real one."""
    from probe.demo import ensure_demo_checkpoint

    folder = tmp_path_factory.mktemp("cache")
    ensure_demo_checkpoint(folder, progress=False)
    return folder


# ---------------------------------------------------------------- nothing is left behind

SET_BY_LIBRARIES = (
    "PYTEST_",
    "COV_",
    "KMP_",
    "TORCH",
    "PYTORCH_",
    "TRITON",
    "ACCELERATE_",
    "FSDP_",
    "CUBLAS_",
    "PL_",
    "POSSIBLE_USER_WARNINGS",
)
"""Beginnings of variables that libraries set once, when they are imported or first used."""


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(SET_BY_LIBRARIES)}


@pytest.fixture(autouse=True)
def environment_is_left_alone() -> Iterator[None]:
    """No test, and nothing that it runs, changes the environment for those after it."""
    before = _environment()
    yield
    assert _environment() == before


OF_LIBRARIES = ("_AsyncWriterThread", "TMonitor")
"""Threads of TensorBoard's writers and of tqdm: they live as long as the loggers and bars that a test made."""


@pytest.fixture(autouse=True)
def threads_end() -> Iterator[None]:
    """No thread of the probe's outlives a test."""
    before = set(threading.enumerate())
    yield
    left = [
        thread
        for thread in threading.enumerate()
        if thread not in before and type(thread).__name__ not in OF_LIBRARIES
    ]
    for thread in left:  # those that are just about to end
        thread.join(timeout=2.0)
    assert [thread.name for thread in left if thread.is_alive()] == []


def _files() -> set[str]:
    """Every file of the repository but those of tools: caches, and what stands behind a dot."""
    found: set[str] = set()
    for folder, folders, files in os.walk(REPOSITORY):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        found |= {os.path.join(folder, name) for name in files if not name.startswith(".")}
    return found


@pytest.fixture(autouse=True)
def no_files_are_left() -> Iterator[None]:
    """Nothing is written into the repository, and the working folder is put back."""
    before, folder = _files(), os.getcwd()
    yield
    assert os.getcwd() == folder
    assert _files() - before == set()


@pytest.fixture(autouse=True)
def random_streams_are_put_back() -> Iterator[None]:
    """A test may draw from the global random streams: it finds them the same in any order, and leaves no trace."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    yield
    random.setstate(kept[0])
    np.random.set_state(kept[1])
    torch.set_rng_state(kept[2])


@pytest.fixture(autouse=True)
def switches_are_left_alone() -> Iterator[None]:
    """Switches of torch, signal handlers and the probe's loggers are as they were."""

    def switches() -> dict[str, object]:
        own = logging.getLogger("probe")
        cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
        return {
            "default dtype": torch.get_default_dtype(),
            "gradients": torch.is_grad_enabled(),
            "threads": torch.get_num_threads(),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "matmul precision": torch.get_float32_matmul_precision(),
            "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
            "attention": (
                cuda.flash_sdp_enabled(),
                cuda.mem_efficient_sdp_enabled(),
                cuda.math_sdp_enabled(),
            ),
            "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
            "signal handlers": [
                signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
            ],
            "logging": (list(own.handlers), own.level, own.propagate),
        }

    before = switches()
    yield
    assert switches() == before


@pytest.fixture(autouse=True)
def watches_end_with_their_test() -> Iterator[None]:
    """A watch that a test leaves attached hears nothing of the optimizers of later ones."""
    hooks = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)
    before = [set(one) for one in hooks]
    yield
    for one, kept in zip(hooks, before, strict=True):
        for key in set(one) - kept:
            del one[key]

"""Fixtures shared by the tests, and what watches that none leaves anything behind."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

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
    "TRITON",
    "ACCELERATE_",
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
"""Threads of TensorBoard's writers and of tqdm, which live as long as the loggers and bars that somebody made."""


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


@pytest.fixture(autouse=True)
def no_files_are_left() -> Iterator[None]:
    """Nothing is written into the repository, and the working folder is put back."""
    before, folder = set(os.listdir(REPOSITORY)), os.getcwd()
    yield
    assert os.getcwd() == folder
    assert set(os.listdir(REPOSITORY)) - before == set()


@pytest.fixture(autouse=True)
def random_streams_are_put_back() -> Iterator[None]:
    """A test may draw from the global random streams; those after it find them as it did."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(kept[0])
    np.random.set_state(kept[1])
    torch.set_rng_state(kept[2])


@pytest.fixture(autouse=True)
def switches_are_left_alone() -> Iterator[None]:
    """Torch's global switches are as they were."""

    def switches() -> tuple[object, ...]:
        return (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
        )

    before = switches()
    yield
    assert switches() == before

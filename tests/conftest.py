"""Fixtures shared by the tests."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The models are tiny: threads only wait for each other, most of all where several test runs share a machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_cache(tmp_path_factory):
    """A cache folder with the demo policy in it, made once for all tests that need the real one."""
    from probe.demo import ensure_demo_checkpoint

    folder = tmp_path_factory.mktemp("cache")
    ensure_demo_checkpoint(folder, progress=False)
    return folder

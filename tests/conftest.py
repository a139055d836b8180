"""Fixtures shared by the tests."""

from __future__ import annotations

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The models are tiny: threads only wait for each other, most of all where several test runs share a machine.
torch.set_num_threads(1)

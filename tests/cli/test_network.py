"""Local files are read without a look at the network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import sys

def refuse(event, details):
    if event in ("socket.getaddrinfo", "socket.connect", "socket.gethostbyname", "socket.sendto"):
        print("looked up:", event, details, flush=True)
        raise OSError(101, "Network is unreachable")

sys.addaudithook(refuse)
"""
"""Comes first in each process: every look-up is printed and fails."""
READ_PROMPTS = """
from pathlib import Path
import datasets
from probe.config import BatchConfig
from probe.data.prompts import load_prompts

folder = Path(sys.argv[1])
counted = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
table = datasets.Dataset.from_list([{"prompt": "1 + 1 =", "answer": "2"}] * 3)
(folder / "clone").mkdir()
(folder / "clone" / "README.md").write_text("A data set.")
for name in ("a.csv", "a.jsonl", "a.json", "a.parquet", "saved", "clone/train.jsonl"):
    path = folder / name
    if path.suffix == ".csv":
        table.to_csv(path)
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix:
        table.to_json(path)
    else:
        table.save_to_disk(path)
for name in ("a.csv", "a.jsonl", "a.json", "a.parquet", "saved", "clone"):
    print(name, len(load_prompts(BatchConfig(dataset_name=str(folder / name), split="train"), None)))
assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS == counted
"""
PROBE = """
import json
from probe import OfflineEntropyProbe

probe = OfflineEntropyProbe(json.loads(sys.argv[1]))
print("probed", len(probe.run_mixed_probe()) > 0)
"""


def in_a_process_that_may_look_up(code: str, argument: str) -> str:
    """What `code` prints in a process without the variables that switch look-ups off."""
    switched = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_UPDATE_DOWNLOAD_COUNTS")
    environment = {key: value for key, value in os.environ.items() if key not in switched}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code, argument],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_hook_sees_look_ups():
    code = 'import socket\ntry: socket.create_connection(("example.org", 80))\nexcept OSError: pass'
    assert "looked up: socket.getaddrinfo" in in_a_process_that_may_look_up(code, "")


def test_local_prompts_look_nothing_up(tmp_path):
    out = in_a_process_that_may_look_up(READ_PROMPTS, str(tmp_path))
    assert "looked up" not in out
    assert len(out.splitlines()) == 6


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_a_local_checkpoint_is_probed_without_looking_anything_up(tmp_path, kind):
    from tests.support.tiny_models import load_base, lora_checkpoint, save_base, trainer_checkpoint

    base = save_base(tmp_path / "base")
    if kind == "adapter":
        folder = tmp_path / "step_60"
        lora_checkpoint(folder, base)
    else:
        folder, _, _ = trainer_checkpoint(tmp_path / "run", load_base(base))
    rows = "".join(json.dumps({"prompt": f"{i} apples", "answer": str(i)}) + "\n" for i in range(9))
    (tmp_path / "prompts.jsonl").write_text(rows)
    config = {
        "checkpoint": {"checkpoint_path": str(folder)},
        "batch_config": {"dataset_name": str(tmp_path / "prompts.jsonl"), "split": "train"},
        "generation": {"max_new_tokens": 3},
        "probe_rework": {"curvature": "off", "learning_rate": 1e-4},
        "detailed_logging": {"output_directory": str(tmp_path / "logs")},
        "trainer": {"accelerator": "cpu"},
    }
    config["batch_config"] |= {"reward": "exact_number", "B_E": 4, "B_U": 2, "G": 2}
    out = in_a_process_that_may_look_up(PROBE, json.dumps(config))
    assert "looked up" not in out
    assert "probed True" in out

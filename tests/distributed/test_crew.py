"""A run of several processes ends on all of them when it ends on one, and one of them says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
CALLBACK = """
import os, signal, time
from probe.callbacks import ProbeCallback

class Act(ProbeCallback):
    def on_update_start(self, runner, module):
        rank, how = os.environ["ACTS"].split(":")
        if runner.ranks.rank == int(rank) or rank == "-1":
            open(f"acted-{runner.ranks.rank}", "w").close()
            if how == "raise":
                raise ValueError("this rank\\nfails")
            os.kill(os.getpid(), getattr(signal, how))
            time.sleep(60)
"""


def run(folder, cache, acts, launcher=(), strategy="auto"):
    """The exit code, standard error and the seconds from the act to the end of a run of two processes."""
    (folder / "acting.py").write_text(CALLBACK)
    settings = {"B_E": 32, "B_U": 4, "G": 2, "dataset_name": "arithmetic"}
    command = [sys.executable, "-m", "probe"] if not launcher else [*launcher, "-m", "probe"]
    command += ["run", "--checkpoint.checkpoint_path", "demo", "--trainer.devices", "2"]
    command += ["--trainer.accelerator", "cpu", "--trainer.callbacks", "acting.Act"]
    command += ["--generation.max_new_tokens", "16", "--trainer.strategy", strategy]
    command += [x for key, value in settings.items() for x in (f"--batch_config.{key}", str(value))]
    environment = {
        **os.environ,
        "ENTROPY_PROBE_CACHE": str(cache),
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{folder}",
        "OMP_NUM_THREADS": "1",
        "ACTS": acts,
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180)
    ended, acted = time.time(), [path.stat().st_mtime for path in folder.glob("acted-*")]
    assert acted, done.stderr
    return done.returncode, done.stderr, ended - max(acted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "acts", "code", "said"),
    [
        ("auto", "1:SIGKILL", 2, "the one of rank 1 has ended by SIGKILL"),
        ("auto", "1:raise", 2, "rank 1 of 2: ValueError: this rank fails"),
        ("auto", "0:raise", 1, "ValueError: this rank fails"),
        ("auto", "1:SIGINT", 2, "rank 1 of 2: interrupted"),
        ("auto", "-1:SIGINT", 130, "interrupted; everything is restored"),
        ("fsdp", "1:SIGKILL", 2, "the one of rank 1 has ended by SIGKILL"),
        ("fsdp", "1:raise", 2, "rank 1 of 2: ValueError: this rank fails"),
        ("fsdp", "-1:SIGINT", 130, "interrupted; everything is restored"),
    ],
)
def test_one_line_says_why_and_nothing_is_written(tmp_path, demo_cache, strategy, acts, code, said):
    returned, err, seconds = run(tmp_path, demo_cache, acts, strategy=strategy)
    lines = [line for line in err.splitlines() if line.startswith("entropy-probe: error")]
    assert len(lines) == 1, err
    assert said in lines[0]
    assert returned == code
    assert "Traceback" not in err
    assert seconds < 30
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".gz", ".json")]


@pytest.mark.slow
def test_the_second_rank_says_that_the_first_has_gone(tmp_path, demo_cache):
    returned, err, _ = run(tmp_path, demo_cache, "0:SIGKILL")
    assert returned == -signal.SIGKILL
    assert "the one of rank 0 has ended" in err


@pytest.mark.slow
def test_torchrun_ends_what_it_has_started(tmp_path, demo_cache):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    returned, err, _ = run(tmp_path, demo_cache, "1:raise", torchrun)
    assert returned != 0
    assert err.count("entropy-probe: error: ") == 1
    assert "rank 1 of 2: ValueError: this rank fails" in err

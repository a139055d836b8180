"""Sweeps over the demo policy: the same numbers as single runs, and a real kill in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from probe import OfflineEntropyProbe
from probe.config.files import read_config_file
from probe.sweep import run_sweep

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
SIZES = {"B_E": 96, "B_U": 4, "G": 4}


@pytest.fixture
def config(demo_cache, tmp_path, monkeypatch):
    """The shipped configuration with small batches, in an empty folder."""
    monkeypatch.setenv("ENTROPY_PROBE_CACHE", str(demo_cache))
    monkeypatch.chdir(tmp_path)
    config = read_config_file("quickstart")
    return {**config, "batch_config": {**config["batch_config"], **SIZES}, "trainer": {"accelerator": "cpu"}}


def single(config, **rework):
    quiet = {"detailed_logging": {"enabled": False}}
    quiet["trainer"] = {**config["trainer"], "logger": False}
    rework = {**config["probe_rework"], **rework}
    return OfflineEntropyProbe({**config, **quiet, "probe_rework": rework}).run_mixed_probe()


def test_the_points_of_a_sweep_are_what_single_runs_give(config, capsys):
    table = run_sweep(config, eta_factors=[0.5, 1, 4], B_E=[96, 64])
    assert list(table["B_E"]) == [96] * 3 + [64] * 3
    assert set(table["status"]) == {"ok"}
    assert list(table["eta_factor"]) == [0.5, 1, 4] * 2
    for row in (table.iloc[1], table.iloc[2]):
        expected = single(config, learning_rate=float(row["learning_rate"]))
        for key in ("deltaH1", "deltaH_true", "deltaH1_se", "deltaH_true_se", "residual_tok"):
            assert row[key] == pytest.approx(expected[key], rel=1e-3, abs=2e-6), key
        assert row["verdict"] == expected["verdict"]
    assert table["deltaH1"][2] == pytest.approx(4 * table["deltaH1"][1])
    assert not Path("lightning_logs/entropy_probe").exists()
    assert sorted(path.name for path in Path("lightning_logs/sweep").glob("*.png")) == [
        "batch_size_B_E.png",
        "eta_B_E64.png",
        "eta_B_E96.png",
    ]


def test_a_sweep_that_was_killed_continues(config, tmp_path):
    """SIGKILL as soon as a point is there; the same command does the rest, with the numbers of an unbroken one."""
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    command = [
        sys.executable,
        "-m",
        "probe",
        "sweep",
        "--config",
        "config.yaml",
        "--seeds",
        "1,2,3",
        "--B_E",
        "32",
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    points = tmp_path / "lightning_logs" / "sweep" / "points"
    deadline = time.monotonic() + 300
    while len(list(points.glob("*.json"))) < 1 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.read_bytes() for path in points.glob("*.json")}
    assert 1 <= len(kept) < 3  # on a busy machine another may be finished meanwhile
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True, timeout=300
    )
    assert f"Sweep of 3 points, {len(kept)} of them finished before" in done.stdout
    assert "[3/3] seed 3" in done.stdout
    assert all(path.read_bytes() == content for path, content in kept.items())
    table = pd.read_parquet(points.parent / "sweep.parquet")
    straight = run_sweep(config, seeds=[1, 2, 3], B_E=[32], output_folder="straight")
    assert list(table["deltaH_true"]) == pytest.approx(list(straight["deltaH_true"]), rel=1e-6, abs=1e-12)


def test_huge_learning_rates_do_not_stop_a_sweep(config):
    table = run_sweep(config, learning_rates=[1e-3, 1e30])
    assert table["status"][0] == "ok"
    huge = table.iloc[1]
    assert huge["status"] == "failed" or huge["verdict"] == "invalid"

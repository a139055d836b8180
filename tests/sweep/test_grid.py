"""The grid of a sweep: its points, their names, and mistakes in what is asked for."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from probe.config.schema import ProbeConfig
from probe.errors.exceptions import ConfigError
from probe.sweep.grid import Point, build_grid, find_checkpoints
from probe.sweep.settings import DEFAULT_FACTORS, SweepConfig, sweep_config
from tests.support.sweep_fakes import fake_config


def test_nothing_asked_for_is_learning_rates_around_the_own_one():
    grid = build_grid(SweepConfig(), fake_config(), 42)
    assert [point.eta_factor for point in grid.points] == list(DEFAULT_FACTORS)
    assert grid.varying == ["eta_factors"]
    assert len(grid.combinations) == 1


def test_other_axes_keep_the_own_learning_rate():
    grid = build_grid(SweepConfig(B_E=[8, 16]), fake_config(), 42)
    assert [(point.B_E, point.eta_factor) for point in grid.points] == [(8, 1.0), (16, 1.0)]
    assert {(point.B_U, point.G, point.seed) for point in grid.points} == {(16, 8, 42)}


def test_the_product_has_checkpoints_outermost_and_learning_rates_innermost(tmp_path):
    for name in ("checkpoint-5", "checkpoint-10"):
        (tmp_path / name).mkdir()
    sweep = SweepConfig(
        learning_rates=[1e-3, 1e-4], B_E=[8, 4], B_U=[2, 3], G=[2, 4], seeds=[7, 1], checkpoints=str(tmp_path)
    )
    grid = build_grid(sweep, fake_config(), 42)
    assert len(grid.points) == len({point.id for point in grid.points}) == 64
    assert [len(combination.points) for combination in grid.combinations] == [2] * 32
    assert [Path(p.checkpoint).name for p in grid.points[::32]] == ["checkpoint-5", "checkpoint-10"]
    assert [p.learning_rate for p in grid.points[:4]] == [1e-3, 1e-4, 1e-3, 1e-4]
    assert [p.B_E for p in grid.points[:4]] == [8, 8, 4, 4]
    assert [p.seed for p in grid.points[:32:16]] == [7, 1]


def test_checkpoints_without_a_next_update_are_left_out(tmp_path, caplog):
    """After the last checkpoint of a finished run there was no update."""
    run, rollouts = tmp_path / "run", tmp_path / "rollouts"
    rollouts.mkdir()
    for number in (5, 10, 15):
        (run / f"checkpoint-{number}").mkdir(parents=True)
    config = fake_config(U_rollouts=str(rollouts))
    sweep = SweepConfig(seeds=[0, 1], checkpoints=str(run))
    (rollouts / "completions_00016.txt").write_text("")
    with pytest.raises(ConfigError, match="expected rollouts of an update after one of the checkpoints"):
        build_grid(sweep, config, 42)
    for update in (6, 11):
        (rollouts / f"completions_{update:05d}.parquet").write_text("")
    grid = build_grid(sweep, config, 42)
    assert {Path(point.checkpoint).name for point in grid.points} == {"checkpoint-5", "checkpoint-10"}
    assert "checkpoint-15 is left out" in caplog.text
    assert (
        len(
            build_grid(SweepConfig(seeds=[0, 1], checkpoints=[str(run / "checkpoint-15")]), config, 42).points
        )
        == 2
    )


def test_the_id_of_a_point_is_stable():
    """Within a process, across processes, and for equal numbers written differently."""
    point = Point("/runs/checkpoint-60", 42, 16, 8, 64, 3e-4, None)
    code = f"from probe.sweep.grid import Point; print({point!r}.id)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == point.id == "4d7e9ec2c8b6740d"
    grid = build_grid(SweepConfig(learning_rates=[0.0003]), fake_config(), 42)
    assert grid.points[0].id == point.id
    whole = build_grid(SweepConfig(eta_factors=[1]), fake_config(), 42)
    assert whole.points[0].id == build_grid(SweepConfig(eta_factors=[1.0]), fake_config(), 42).points[0].id
    for change in ({"seed": 1}, {"B_E": 65}, {"learning_rate": 4e-4}, {"checkpoint": "/runs/checkpoint-61"}):
        assert replace(point, **change).id != point.id


def test_a_run_is_configured_for_its_point(tmp_path):
    config = replace(fake_config(), probe_rework=replace(fake_config().probe_rework, master_seed=3))
    sweep = SweepConfig(B_E=[8], seeds=[5])
    (combination,) = build_grid(sweep, config, 3).combinations
    made = combination.configure(config, sweep)
    assert made.batch_config.B_E == 8
    assert made.probe_rework.master_seed is None
    assert not made.detailed_logging.enabled
    assert made.output.results_path is None
    assert made.checkpoint == config.checkpoint
    assert combination.configure(config, SweepConfig(B_E=[8])).probe_rework.master_seed == 3
    (tmp_path / "a").mkdir()
    elsewhere = SweepConfig(checkpoints=[str(tmp_path / "a")])
    (combination,) = build_grid(elsewhere, config, 3).combinations
    assert combination.configure(config, elsewhere).checkpoint.checkpoint_path == str(tmp_path / "a")


MISTAKES = [
    ({"learning_rates": [1e-3], "eta_factors": [1.0]}, "sweep.eta_factors: expected null where"),
    ({"learning_rates": [0.0]}, "sweep.learning_rates: expected finite numbers above 0, found 0.0"),
    ({"learning_rates": [float("inf")]}, "sweep.learning_rates: expected finite numbers above 0, found inf"),
    ({"learning_rates": [float("nan")]}, "sweep.learning_rates: expected finite numbers above 0, found nan"),
    ({"eta_factors": [-1.0]}, "sweep.eta_factors: expected finite numbers above 0"),
    ({"eta_factors": []}, "sweep.eta_factors: expected a list of finite numbers above 0, found an empty one"),
    ({"B_E": [4, 4]}, "sweep.B_E: expected different values, found 4 twice"),
    ({"B_E": [1]}, "sweep.B_E: expected integers of at least 2 and at most [0-9]+, found 1"),
    ({"B_U": [0]}, "sweep.B_U: expected integers of at least 1 and at most [0-9]+, found 0"),
    ({"G": [2.5]}, "sweep.G: expected integers of at least 2 and at most [0-9]+, found 2.5"),
    ({"seeds": [-1]}, "sweep.seeds: expected integers of at least 0 and at most [0-9]+, found -1"),
    ({"checkpoints": []}, "sweep.checkpoints: expected a list of checkpoint folders, found an empty one"),
    ({"output_folder": ""}, "sweep.output_folder: expected the name of a folder"),
    ({"B_E": 4}, "sweep.B_E: expected a list, found 4"),
    ({"BE": [4]}, r"sweep.BE: unknown configuration key; did you mean sweep.B_E\?"),
    ({"nonsense": 1}, "sweep.nonsense: unknown configuration key; the keys are learning_rates"),
]


@pytest.mark.parametrize(("given", "message"), MISTAKES)
def test_mistakes_are_named(given, message):
    with pytest.raises(ConfigError, match=message):
        sweep_config(given)


def test_seed_zero_is_a_seed():
    assert SweepConfig(seeds=[0]).seeds == [0]


def test_arrays_and_paths_are_taken(tmp_path):
    sweep = sweep_config(
        {"learning_rates": np.geomspace(1e-4, 1e-3, 2), "B_E": np.array([4, 8]), "seeds": range(2), "G": (2,)}
    )
    assert sweep.learning_rates == pytest.approx([1e-4, 1e-3])
    assert (sweep.B_E, sweep.seeds, sweep.G) == ([4, 8], [0, 1], [2])
    assert all(type(n) is int for n in sweep.B_E)
    assert sweep_config({"checkpoints": tmp_path}).checkpoints == str(tmp_path)
    assert sweep_config({"checkpoints": [tmp_path]}).checkpoints == [str(tmp_path)]


IDLE = [
    (
        {"E_rollouts": "E.jsonl"},
        SweepConfig(B_E=[4, 8]),
        "sweep.B_E: expected null with batch_config.E_rollouts",
    ),
    (
        {"U_rollouts": "U.jsonl"},
        SweepConfig(B_U=[4, 8]),
        "sweep.B_U: expected null with batch_config.U_rollouts",
    ),
    ({"U_rollouts": "U.jsonl"}, SweepConfig(G=[4, 8]), "sweep.G: expected null with batch_config.U_rollouts"),
    (
        {"E_rollouts": "E.jsonl", "U_rollouts": "U.jsonl"},
        SweepConfig(seeds=[1, 2]),
        "sweep.seeds: expected null where both batches",
    ),
]


@pytest.mark.parametrize(("batch", "sweep", "message"), IDLE)
def test_axes_that_could_change_nothing_are_refused(batch, sweep, message):
    with pytest.raises(ConfigError, match=message):
        build_grid(sweep, fake_config(**batch), 42)


def test_a_checkpoint_is_needed():
    with pytest.raises(ConfigError, match=r"checkpoint.checkpoint_path: expected a checkpoint folder"):
        build_grid(SweepConfig(), ProbeConfig(), 42)


def test_checkpoints_need_an_optimizer_each(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    config = fake_config()
    config = replace(config, checkpoint=replace(config.checkpoint, optimizer_path="optimizer.pt"))
    with pytest.raises(ConfigError, match=r"checkpoint.optimizer_path: expected null with sweep.checkpoints"):
        build_grid(SweepConfig(checkpoints=str(tmp_path)), config, 42)


def test_a_folder_of_checkpoints_is_sorted_by_number(tmp_path):
    for name in ("checkpoint-100", "checkpoint-20", "checkpoint-3", "runs-1", "logs"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    found = find_checkpoints(str(tmp_path))
    assert [Path(path).name for path in found] == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]


def test_other_numbered_folders_are_taken_where_there_are_no_usual_ones(tmp_path):
    for name in ("step_60", "step_9", "other"):
        (tmp_path / name).mkdir()
    assert [Path(path).name for path in find_checkpoints(str(tmp_path))] == ["step_9", "step_60"]


def test_a_list_of_checkpoints_keeps_its_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
    assert find_checkpoints(["b", "./a", "demo"]) == [str(tmp_path / "b"), str(tmp_path / "a"), "demo"]


def test_checkpoints_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"expected checkpoint-N folders in .*, found none"):
        find_checkpoints(str(tmp_path))
    with pytest.raises(ConfigError, match="expected a folder with checkpoint-N in it, found no folder"):
        find_checkpoints(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="expected existing folders, found no folder"):
        find_checkpoints([str(tmp_path), str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match="found one of them twice"):
        find_checkpoints([str(tmp_path), f"{tmp_path}/."])

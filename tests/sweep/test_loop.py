"""The loop of a sweep: what is measured, what is kept, what a second session does."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from probe.callbacks import DeltaH1, GroundTruth
from probe.errors.exceptions import (
    CheckpointError,
    ConfigError,
    DataError,
    LogError,
    NumericalError,
    OptimizerStateError,
    RolloutError,
)
from probe.sweep.loop import execute, refuse_failures
from probe.sweep.settings import IncompleteSweepError, SweepConfig
from probe.sweep.store import SweepFolder
from tests.support.sweep_fakes import OWN_RATE, FakeModule, FakeRunner, fake_config


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a sweep that draws no plots."""
    monkeypatch.setattr("probe.sweep.loop.write_plots", lambda table, folder: [])
    monkeypatch.setattr(
        "probe.sweep.loop.measure_at", lambda runner, module, eta: runner.measure_at(module, eta)
    )
    return tmp_path / "sweep"


def sweep(runner, folder, config=None, **axes):
    return execute(
        runner, FakeModule(config or fake_config()), SweepConfig(output_folder=str(folder), **axes)
    )


def stop_at(count, error=KeyboardInterrupt):
    """A hook that raises before the result after `count` others is given."""
    given = []

    def before(module, eta):
        given.append(eta)
        if len(given) > count:
            raise error

    return before


def test_one_run_per_combination_and_one_measurement_per_further_rate(folder):
    runner = FakeRunner()
    table = sweep(runner, folder, seeds=[1, 2], eta_factors=[0.5, 1, 2])
    assert [seed for _, seed in runner.runs] == [1, 2]
    assert runner.rates == [0.5 * OWN_RATE, 2 * OWN_RATE] * 2
    assert list(table["learning_rate"]) == [0.5 * OWN_RATE, OWN_RATE, 2 * OWN_RATE] * 2
    assert set(table["status"]) == {"ok"}


def test_absolute_rates_are_measured_too_and_their_factor_is_known(folder):
    runner = FakeRunner()
    table = sweep(runner, folder, learning_rates=[OWN_RATE, 3 * OWN_RATE])
    assert runner.rates == [3 * OWN_RATE]
    assert list(table["eta_factor"]) == pytest.approx([1, 3])


def test_sizes_and_seeds_reach_the_runs_which_publish_nothing(folder):
    runner = FakeRunner()
    sweep(runner, folder, B_E=[8, 16], B_U=[2], G=[4])
    assert [type(c) for run in runner.callbacks for c in run] == [DeltaH1, GroundTruth] * 2
    assert [(c.batch_config.B_E, c.batch_config.B_U, c.batch_config.G) for c, _ in runner.runs] == [
        (8, 2, 4),
        (16, 2, 4),
    ]
    assert not any(c.detailed_logging.enabled for c, _ in runner.runs)


def test_checkpoints_have_a_module_each_that_is_used_for_all_its_points(folder, tmp_path):
    for step in (20, 3):
        (tmp_path / "runs" / f"checkpoint-{step}").mkdir(parents=True)
    runner = FakeRunner(own_rate=lambda path: 1e-3 if path.endswith("-3") else 2e-3)
    modules = []
    runner.before = lambda module, eta: modules.append(module)
    table = sweep(runner, folder, checkpoints=str(tmp_path / "runs"), seeds=[1, 2], eta_factors=[1.0, 10.0])
    assert [len({id(m) for m in part}) for part in (modules[:4], modules[4:])] == [1, 1]
    assert modules[0] is not modules[-1]
    assert list(table["training_step"]) == [3] * 4 + [20] * 4
    assert list(table["learning_rate"]) == pytest.approx([1e-3, 1e-2] * 2 + [2e-3, 2e-2] * 2)


def test_a_line_per_point(folder, capsys):
    runner = FakeRunner()
    sweep(runner, folder, seeds=[1, 2], eta_factors=[1, 2])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Sweep of 4 points, in {folder}"
    assert lines[1].startswith("[1/4] seed 1, eta 0.001: trustworthy; deltaH1 -0.0")
    assert "deltaH_true -0.0" in lines[1]
    assert " +/- 0.0" in lines[1]
    assert "nats per token; 0." in lines[1]
    assert lines[-1].startswith("4 of 4 points finished: ")
    assert len(lines) == 6


def test_a_sweep_that_was_stopped_continues_where_it_was(folder, capsys):
    runner = FakeRunner()
    runner.before = stop_at(4)
    axes = {"seeds": [1, 2, 3], "eta_factors": [1, 2, 4]}
    with pytest.raises(KeyboardInterrupt, match=r"4 of 9 points are kept in .*, the same command continues"):
        sweep(runner, folder, **axes)
    assert len(pd.read_csv(folder / "sweep.csv")) == 4
    again = FakeRunner()
    table = sweep(again, folder, **axes)
    assert "4 of them finished before" in capsys.readouterr().out
    assert [seed for _, seed in again.runs] == [2, 3]
    assert again.rates == [2e-3, 4e-3, 2e-3, 4e-3]
    straight = sweep(FakeRunner(), folder.with_name("straight"), **axes)
    told = ["seconds", "finished_at"]
    pd.testing.assert_frame_equal(table.drop(columns=told), straight.drop(columns=told))


def test_a_finished_sweep_measures_nothing_again(folder):
    sweep(FakeRunner(), folder)
    runner = FakeRunner()
    table = sweep(runner, folder)
    assert runner.runs == []
    assert len(table) == 7


def test_a_kill_in_the_middle_of_writing_leaves_no_half_point(folder, monkeypatch):
    """The process dies between the temporary file and its renaming, and cannot clean up."""

    def die(source, target):
        if "points" in str(target) and len(os.listdir(folder / "points")) == 3:
            raise KeyboardInterrupt
        rename(source, target)

    rename = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        patch.setattr("pathlib.Path.unlink", lambda self, missing_ok=False: None)
        with pytest.raises(KeyboardInterrupt):
            sweep(FakeRunner(), folder)
    assert len(list((folder / "points").glob("*.json"))) == 2
    assert len(list((folder / "points").glob(".tmp-*"))) == 1
    runner = FakeRunner()
    assert len(sweep(runner, folder)) == 7
    assert len(runner.rates) == 4  # and the run's own
    assert not list((folder / "points").glob(".tmp-*"))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"schema_version": 99}', '{"schema_version": 1, "id": "x"}']
)
def test_a_point_that_cannot_be_read_is_measured_again(folder, content):
    sweep(FakeRunner(), folder, seeds=[1, 2])
    broken = sorted((folder / "points").glob("*.json"))[0]
    broken.write_text(content)
    runner = FakeRunner()
    assert list(sweep(runner, folder, seeds=[1, 2])["status"]) == ["ok", "ok"]
    assert len(runner.runs) == 1


def test_a_longer_list_adds_points(folder):
    sweep(FakeRunner(), folder, seeds=[1, 2])
    runner = FakeRunner()
    table = sweep(runner, folder, seeds=[1, 2, 3])
    assert [seed for _, seed in runner.runs] == [3]
    assert list(table["seed"]) == [1, 2, 3]


@pytest.mark.parametrize(
    ("axes", "change", "message"),
    [
        ({"B_E": [8, 16]}, {}, r"sweep.seeds is \[1, 2\] there and \[42\] here"),
        ({"seeds": [1, 3]}, {}, r"sweep.seeds is \[1, 2\] there and \[1, 3\] here"),
        ({"seeds": [1, 2], "learning_rates": [1e-3]}, {}, "sweep.eta_factors is .*1.*there and not swept here"),
        ({"seeds": [1, 2]}, {"weighting": "matched"}, "probe_rework.weighting is 'causal' there and 'matched' here"),
        ({"seeds": [1, 2]}, {"kl_coef": 0.5, "loss": "grpo"}, "probe_rework.loss is .*; probe_rework.kl_coef is"),
    ],
)  # fmt: skip
def test_another_sweep_in_the_folder_is_refused(folder, axes, change, message):
    sweep(FakeRunner(), folder, seeds=[1, 2])
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    config = replace(fake_config(), probe_rework=replace(fake_config().probe_rework, **change))
    runner = FakeRunner()
    with pytest.raises(
        ConfigError, match=f"sweep.output_folder: .*{message}.*; choose another --output_folder, or"
    ):
        sweep(runner, folder, config, **axes)
    assert runner.runs == []
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_precision_is_part_of_the_configuration(folder):
    sweep(FakeRunner(), folder, seeds=[1])
    runner = FakeRunner()
    runner.precision = "bf16-mixed"
    with pytest.raises(ConfigError, match=r"trainer.precision is '32-true' there and 'bf16-mixed' here"):
        sweep(runner, folder, seeds=[1])


def test_what_only_bounds_memory_may_change(folder):
    sweep(FakeRunner(), folder, seeds=[1])
    config = fake_config()
    config = replace(config, memory_config=replace(config.memory_config, microbatch_size=1))
    runner = FakeRunner()
    sweep(runner, folder, config, seeds=[1])
    assert runner.runs == []


def test_overwrite_starts_anew_and_deletes_only_what_a_sweep_wrote(folder):
    sweep(FakeRunner(), folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "eta.png").write_text("an old plot")
    runner = FakeRunner()
    table = sweep(runner, folder, seeds=[5], overwrite=True)
    assert len(runner.runs) == len(table) == 1
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "eta.png").exists()
    assert len(list((folder / "points").iterdir())) == 1
    runner = FakeRunner()
    runner.before = stop_at(1)
    with pytest.raises(KeyboardInterrupt, match="the same command without --overwrite continues"):
        sweep(runner, folder, seeds=[5, 6], overwrite=True)


def test_a_folder_of_something_else_is_refused(folder):
    folder.mkdir()
    (folder / "thesis.tex").write_text("")
    for overwrite in (False, True):
        with pytest.raises(
            ConfigError, match=r"expected a new folder or that of a sweep, found .*thesis.tex"
        ):
            sweep(FakeRunner(), folder, overwrite=overwrite)
    assert [p.name for p in folder.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", ["", "{}", '{"schema_version": 99, "axes": {}, "config": {}}'])
def test_a_manifest_that_is_none_is_refused(folder, content):
    folder.mkdir()
    (folder / "sweep.json").write_text(content)
    with pytest.raises(ConfigError, match=r"found a sweep.json that is none; choose another"):
        sweep(FakeRunner(), folder)
    assert len(sweep(FakeRunner(), folder, overwrite=True)) == 7


def test_a_file_in_the_place_of_the_folder(folder):
    folder.write_text("")
    with pytest.raises(LogError, match="cannot write"):
        sweep(FakeRunner(), folder)


def test_two_sweeps_at_a_time_in_one_folder_are_refused(folder):
    with (
        SweepFolder(folder).locked(),
        pytest.raises(LogError, match=r"expected one sweep at a time in .*, found another process"),
    ):
        sweep(FakeRunner(), folder)
    sweep(FakeRunner(), folder)


def test_a_point_that_fails_does_not_stop_the_others_and_is_tried_again(folder, capsys):
    def before(module, eta):
        if eta > 5e-3:
            raise NumericalError("entropy: expected a finite number,\n found nan")

    runner = FakeRunner()
    runner.before = before
    table = sweep(runner, folder, learning_rates=[1e-2, 1e-3, 2e-3])
    assert list(table["status"]) == ["failed", "ok", "ok"]
    assert table["error"][0] == "entropy: expected a finite number, found nan"
    assert list(table["learning_rate"]) == [1e-2, 1e-3, 2e-3]
    assert table["deltaH1"].isna().tolist() == [True, False, False]
    out = capsys.readouterr().out
    assert "eta 0.01: failed: entropy: expected a finite number, found nan" in out
    assert "2 of 3 points finished, 1 failed: " in out
    assert json.loads((folder / "sweep_summary.json").read_text())["points"] == {"finished": 2, "failed": 1}
    with pytest.raises(
        IncompleteSweepError, match=r"1 of 3 points failed, the first one with: entropy: .*again"
    ):
        refuse_failures(table)
    again = FakeRunner()
    table = sweep(again, folder, learning_rates=[1e-2, 1e-3, 2e-3])
    assert again.rates == [1e-2]
    assert set(table["status"]) == {"ok"}
    assert table["error"].isna().all()
    refuse_failures(table)


def test_a_run_that_fails_takes_its_combination_with_it(folder):
    def before(module, eta):
        if module.seed == 2:
            raise RolloutError("all responses are empty")

    runner = FakeRunner()
    runner.before = before
    table = sweep(runner, folder, seeds=[1, 2, 3], eta_factors=[1, 2])
    assert list(table["status"]) == ["ok", "ok", "failed", "failed", "ok", "ok"]


def test_an_error_that_was_not_foreseen_is_kept_with_its_traceback(folder):
    def before(module, eta):
        if module.seed == 2:
            raise MemoryError

    runner = FakeRunner()
    runner.before = before
    table = sweep(runner, folder, seeds=[1, 2])
    assert list(table["error"].fillna("")) == ["", "MemoryError"]
    records = [json.loads(file.read_text()) for file in (folder / "points").iterdir()]
    (record,) = [record for record in records if record["error"]]
    assert "sweep_fakes.py" in record["traceback"]


@pytest.mark.parametrize("error", [CheckpointError, OptimizerStateError])
def test_a_broken_checkpoint_is_tried_once_and_does_not_stop_the_others(folder, tmp_path, error):
    for step in (1, 2, 3):
        (tmp_path / "runs" / f"checkpoint-{step}").mkdir(parents=True)

    def before(module, eta):
        if module.config.checkpoint.checkpoint_path.endswith("-2"):
            raise error("no weights")

    runner = FakeRunner()
    runner.before = before
    table = sweep(runner, folder, checkpoints=str(tmp_path / "runs"), seeds=[1, 2])
    assert list(table["status"]) == ["ok", "ok", "failed", "failed", "ok", "ok"]
    assert len(runner.runs) == 5


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("batch_config.reward: expected a reward, found 'x'"),
        ConfigError("batch_config.B_E: expected less than the data have, found 64"),
        DataError("prompts.jsonl: not there"),
        CheckpointError("no weights"),
        LogError("cannot write"),
    ],
)
def test_an_error_that_would_hit_every_point_stops_at_once(folder, error):
    runner = FakeRunner()
    runner.before = stop_at(0, error)
    with pytest.raises(type(error), match=str(error)):
        sweep(runner, folder, seeds=[1, 2])
    assert len(runner.runs) == 1


def test_an_impossible_size_fails_alone_where_sizes_are_swept(folder):
    def before(module, eta):
        if module.config.batch_config.B_U > 100:
            raise ConfigError("batch_config.B_U: expected at most 100 prompts, found 500")

    runner = FakeRunner()
    runner.before = before
    assert list(sweep(runner, folder, B_U=[500, 10])["status"]) == ["failed", "ok"]


def test_the_table(folder):
    table = sweep(FakeRunner(), folder, seeds=[1], eta_factors=[1e-3, 1.0])
    for read in (pd.read_parquet(folder / "sweep.parquet"), pd.read_csv(folder / "sweep.csv")):
        assert list(read.columns) == list(table.columns)
        np.testing.assert_array_equal(read["deltaH1_tok"].to_numpy(), table["deltaH1_tok"].to_numpy())
    first = ["point", "status", "verdict", "checkpoint", "checkpoint_name", "training_step", "seed", "B_E"]
    assert list(table.columns[:12]) == [*first, "B_U", "G", "learning_rate", "eta_factor"]
    assert list(table.columns[-4:]) == ["seconds", "finished_at", "verdict_reasons", "error"]
    for name in ("deltaH1", "deltaH_true", "residual"):
        for suffix in ("", "_tok"):
            assert {f"{name}{suffix}{end}" for end in ("", "_se", "_ci95_lo", "_ci95_hi")} <= set(
                table.columns
            )
    row = table.iloc[1]
    assert row["deltaH1_ci95_lo"] < row["deltaH1"] < row["deltaH1_ci95_hi"]
    assert (row["ESS"], row["bias_flags"], row["derivative_mode"]) == (64 * 0.9, "a, b", "jvp")
    assert row["avg_reward"] == 0.5
    assert row["verdict_reasons"] == "The interval is narrow. All is well."
    unresolved = table.iloc[0]
    assert pd.isna(unresolved["deltaH_true"])
    assert pd.isna(unresolved["deltaH_true_ci95_lo"])
    assert not {"nested", "estimates", "E", "timing", "diagnostics"} & set(table.columns)
    assert str(table["G"].dtype) == "Int64"


def test_evaluation_sizes_are_responses_in_failed_rows_too(folder):
    runner = FakeRunner()
    runner.before = stop_at(0, NumericalError("no"))
    table = sweep(runner, folder, fake_config(G_E=3), B_E=[10])
    assert (table["status"][0], table["B_E"][0]) == ("failed", 30)


def test_the_whole_result_is_in_the_file_of_the_point(folder):
    table = sweep(FakeRunner(), folder, seeds=[1])
    record = json.loads((folder / "points" / f"{table['point'][0]}.json").read_text())
    assert record["schema"] == "entropy-probe/sweep-point"
    assert record["values"]["estimates"] == [{"quantity": "deltaH1", "value": 1.0}]
    assert record["point"]["seed"] == 1

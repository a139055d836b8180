"""What publishes a result: log files, result file, TensorBoard, console and progress bars."""

from __future__ import annotations

import errno
import html
import io
import json
import math
import os
import re
import threading
from dataclasses import replace

import pytest
import torch
import yaml
from lightning.fabric.loggers import CSVLogger as FabricCSVLogger
from lightning.fabric.loggers import TensorBoardLogger as FabricTensorBoardLogger
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers import TensorBoardLogger as PyTorchTensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

from probe.callbacks.base import ProbeCallback
from probe.callbacks.console import ConsoleReport
from probe.callbacks.detailed_logging import DetailedLogging
from probe.callbacks.progress import ProgressBars
from probe.callbacks.results_file import ResultsFile
from probe.callbacks.tensorboard import TensorBoardDiagnostics
from probe.config.output import DetailedLoggingConfig
from probe.config.schema import ProbeConfig
from probe.errors.exceptions import LogError
from probe.files.log_files import load_log
from probe.logs.document import build_log
from probe.logs.own_logger import OwnLogger
from probe.logs.write import log_name, safe_name, write_log
from probe.phases.state import ProbeState
from probe.report.tags import scalar_tags
from probe.report.terminal import report
from probe.runner import HOOKS
from tests.support.helpers import name_of_ended_process, rendered
from tests.support.live_loops import attach, small_loop
from tests.support.synthetic_run import (
    estimate_rows,
    make_module,
    make_result,
    make_runner,
    make_state,
    make_values,
)
from tests.support.terminal import Terminal


@pytest.fixture(scope="module")
def state():
    return make_state(B_E=6, B_U=3, G=4, lengths=(2, 8), layers=2, shape=(2, 3))


def publish(callback, state, result, runner=None):
    """Call the hooks of a run in their order."""
    runner = make_runner(state) if runner is None else runner
    module = make_module()
    callback.on_probe_start(runner, module)
    callback.on_report_end(runner, module, result)
    callback.on_probe_end(runner, module, result)
    return runner


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_every_hook_is_one_of_the_base_class():
    hooks = set(vars(ProbeCallback))
    for callback in (ConsoleReport, DetailedLogging, ProgressBars, ResultsFile, TensorBoardDiagnostics):
        defined = {name for name in vars(callback) if name.startswith(("on_", "run_"))}
        assert defined <= hooks


# ---------------------------------------------------------------- log files


def test_three_files_in_a_folder_per_date(state, tmp_path, capsys):
    callback = DetailedLogging(DetailedLoggingConfig(output_directory=str(tmp_path / "logs")))
    runner = publish(callback, state, make_result(state))
    assert runner.errors == []
    folder, stem = tmp_path / "logs" / "2025-01-15", "entropy_probe_14-30-25_step_60"
    assert callback.paths.main == folder / f"{stem}.json.gz"
    assert callback.paths.summary == folder / f"{stem}_summary.json"
    assert callback.paths.config == folder / f"{stem}_config.yaml"
    assert sorted(folder.iterdir()) == sorted(vars(callback.paths).values())
    assert runner.written == {"log": str(callback.paths.main)}
    assert load_log(callback.paths.main) == build_log(make_result(state), state, "standard")


def test_the_configuration_can_be_read_again(state, tmp_path):
    result = make_result(state)
    callback = DetailedLogging(DetailedLoggingConfig(output_directory=str(tmp_path)))
    publish(callback, state, result)
    text = callback.paths.config.read_text()
    assert text.startswith("# schema: entropy-probe/config\n# started_at: 2025-01-15T14:30:25")
    assert yaml.safe_load(text) == result.config


def test_settings_reach_the_log(state, tmp_path):
    config = DetailedLoggingConfig(
        output_directory=str(tmp_path),
        level="debug",
        compress=False,
        log_sequences=False,
        log_raw_tensors=False,
    )
    callback = DetailedLogging(config)
    publish(callback, state, make_result(state))
    log = load_log(callback.paths.main)
    assert "raw" not in log
    assert "id" not in log["tokens"]["E"][0]
    assert callback.paths.main.suffix == ".json"


def test_token_texts_come_from_the_tokenizer_of_the_module(state, tmp_path):
    callback = DetailedLogging(DetailedLoggingConfig(output_directory=str(tmp_path), level="debug"))
    publish(callback, state, make_result(state))
    tokens = load_log(callback.paths.main)["tokens"]["E"][0]
    assert tokens["text"] == [make_module().tokenizer.decode([token]) for token in tokens["id"]]


def test_a_name_that_is_taken_gets_a_number(state, tmp_path):
    names = []
    for compress in (True, True, False):
        config = DetailedLoggingConfig(output_directory=str(tmp_path), compress=compress)
        callback = DetailedLogging(config)
        publish(callback, state, make_result(state))
        names.append(callback.paths.summary.name)
    stem = "entropy_probe_14-30-25_step_60"
    assert names == [f"{stem}_summary.json", f"{stem}_2_summary.json", f"{stem}_3_summary.json"]


def test_runs_that_end_together_get_different_names(state, tmp_path):
    callbacks = [DetailedLogging(DetailedLoggingConfig(output_directory=str(tmp_path))) for _ in range(8)]
    threads = [threading.Thread(target=publish, args=(c, state, make_result(state))) for c in callbacks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({callback.paths.main for callback in callbacks}) == 8
    assert all(load_log(callback.paths.main) for callback in callbacks)


def test_names(state):
    result = replace(make_result(state), checkpoint_name="../a b/ü:step 60")
    config = DetailedLoggingConfig(
        filename_template="{date}_{time}_{checkpoint}_{level}_{seed}", level="debug"
    )
    assert log_name(result, config) == "2025-01-15_14-30-25_a_b_step_60_debug_7"
    assert log_name(replace(result, config={}), config).endswith("_none")
    assert safe_name("...") == "checkpoint"
    assert len(safe_name("x" * 500)) == 80


def test_old_runs_are_pruned(state, tmp_path):
    config = DetailedLoggingConfig(output_directory=str(tmp_path), max_files=2)
    for second in range(4):
        result = replace(make_result(state), started_at=f"2025-01-15T14:30:0{second}")
        publish(DetailedLogging(config), state, result)
    assert len(list(tmp_path.glob("*/*_summary.json"))) == 2
    assert len(list(tmp_path.glob("*/*"))) == 6


def test_a_folder_that_cannot_be_made_stops_the_run_at_its_start(state, tmp_path):
    (tmp_path / "file").write_text("x")
    callback = DetailedLogging(DetailedLoggingConfig(output_directory=str(tmp_path / "file" / "logs")))
    with pytest.raises(LogError, match="a part of the path is a file"):
        callback.on_probe_start(make_runner(state), make_module())


def test_a_folder_that_cannot_be_written_stops_the_run_at_its_start(state, tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.write_bytes", no_space)
    callback = DetailedLogging(DetailedLoggingConfig(output_directory=str(tmp_path)))
    with pytest.raises(LogError, match=f"cannot write {tmp_path}: No space left on device; free some space"):
        callback.on_probe_start(make_runner(state), make_module())


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_full_disk_at_the_end_is_reported_and_leaves_no_half_run(
    state, tmp_path, monkeypatch, capsys, call
):
    callback, runner = (
        DetailedLogging(DetailedLoggingConfig(output_directory=str(tmp_path))),
        make_runner(state),
    )
    callback.on_probe_start(runner, make_module())
    monkeypatch.setattr(os, call, no_space)
    callback.on_report_end(runner, make_module(), make_result(state))
    callback.on_probe_end(runner, make_module(), make_result(state))
    with pytest.raises(LogError, match=r"cannot write .*entropy_probe_14-30-25_step_60.*: No space left"):
        raise runner.errors[0]
    assert callback.paths is None
    assert list(tmp_path.glob("*/*")) == []
    assert capsys.readouterr().out == ""


def test_what_was_complete_before_the_disk_was_full_stays(state, tmp_path, monkeypatch):
    callback, runner = (
        DetailedLogging(DetailedLoggingConfig(output_directory=str(tmp_path))),
        make_runner(state),
    )
    real = os.replace

    def summary_fails(source, target):
        return no_space() if "_summary" in str(target) else real(source, target)

    monkeypatch.setattr(os, "replace", summary_fails)
    callback.on_report_end(runner, make_module(), make_result(state))
    assert "_summary.json" in str(runner.errors[0])
    config, log = sorted(tmp_path.glob("*/*"), key=lambda path: path.suffix, reverse=True)
    assert config.name.endswith("_config.yaml")
    assert load_log(log)["level"] == "standard"


def test_a_kill_at_any_time_leaves_whole_files_only(state, tmp_path, monkeypatch):
    """Each file is looked at whenever something happens to a name, as another process, or a kill, would find it."""
    seen = []

    def spy(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            seen.extend((path, path.read_bytes()) for path in tmp_path.glob("*/[!.]*"))
            return real(*args, **kwargs)

        return call

    for name in ("open", "link", "replace", "fsync", "unlink"):
        monkeypatch.setattr(os, name, spy(name))
    config = DetailedLoggingConfig(output_directory=str(tmp_path))
    write_log(make_result(state), state, config)
    monkeypatch.undo()
    assert {path.suffix for path, _ in seen} == {".yaml", ".gz"}
    assert all(content == path.read_bytes() for path, content in seen)
    assert len(list(tmp_path.glob("*/*"))) == 3


def test_what_a_killed_run_left_in_the_log_folder_goes_at_the_next_start(state, tmp_path):
    config = DetailedLoggingConfig(output_directory=str(tmp_path))
    paths = write_log(make_result(state), state, config)
    left = paths.main.with_name(name_of_ended_process())
    left.write_bytes(b"half")
    DetailedLogging(config).on_probe_start(make_runner(state), make_module())
    assert not left.exists()
    assert paths.main.exists()


def test_a_failure_to_prune_is_reported(state, tmp_path, monkeypatch):
    runner = make_runner(state)
    monkeypatch.setattr("probe.callbacks.detailed_logging.prune", no_space)
    publish(
        DetailedLogging(DetailedLoggingConfig(output_directory=str(tmp_path), max_files=1)),
        state,
        make_result(state),
        runner,
    )
    assert "No space left" in str(runner.errors[0])


def test_nothing_is_written_when_switched_off_or_on_another_rank(state, tmp_path):
    off = DetailedLogging(DetailedLoggingConfig(enabled=False, output_directory=str(tmp_path / "logs")))
    publish(off, state, make_result(state))
    rank1 = make_runner(state)
    rank1.fabric.is_global_zero = False
    publish(
        DetailedLogging(DetailedLoggingConfig(output_directory=str(tmp_path / "logs"))),
        state,
        make_result(state),
        rank1,
    )
    publish(ResultsFile(tmp_path / "logs" / "r.json"), state, make_result(state), rank1)
    publish(TensorBoardDiagnostics(), state, make_result(state), rank1)
    assert not (tmp_path / "logs").exists()


# ---------------------------------------------------------------- result file


def test_the_result_file_is_the_mapping(state, tmp_path):
    path = tmp_path / "new" / "result.json"
    runner = publish(ResultsFile(path), state, make_result(state, deltaH_true=math.nan))
    assert runner.errors == []
    values = json.loads(path.read_text())
    assert values["deltaH_true"] is None
    assert values["deltaH1"] == state.prediction.deltaH1.sequence


def test_a_result_file_that_cannot_be_written(state, tmp_path, monkeypatch):
    with pytest.raises(LogError, match="found a folder"):
        ResultsFile(tmp_path).on_probe_start(make_runner(state), make_module())
    runner = make_runner(state)
    monkeypatch.setattr(os, "replace", no_space)
    ResultsFile(tmp_path / "r.json").on_report_end(runner, make_module(), make_result(state))
    with pytest.raises(LogError, match=r"cannot write .*r\.json: No space left on device; free some space"):
        raise runner.errors[0]
    assert list(tmp_path.iterdir()) == []


def test_without_a_path_nothing_is_written(state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    publish(ResultsFile(None), state, make_result(state))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- TensorBoard


def events(logger):
    found = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    found.Reload()
    return found


@pytest.mark.parametrize("kind", [PyTorchTensorBoardLogger, FabricTensorBoardLogger])
@pytest.mark.parametrize("default_hp_metric", [True, False])
def test_tensorboard_has_everything_once(state, tmp_path, kind, default_hp_metric):
    logger = kind(str(tmp_path), default_hp_metric=default_hp_metric)
    result = make_result(state)
    runner = publish(TensorBoardDiagnostics(), state, result, make_runner(state, (logger,)))
    assert runner.errors == []
    found = events(logger)
    tags = found.Tags()
    assert set(tags["scalars"]) == set(scalar_tags(result.values))
    for tag, value in scalar_tags(result.values).items():
        (event,) = found.Scalars(tag)
        assert event.step == 60
        assert event.value == pytest.approx(value, rel=1e-6, abs=1e-38)
    expected = {"E/importance_weight", "E/sequence_entropy_before", "E/sequence_entropy_after", "E/length"}
    expected |= {"E/token_entropy_before", "U/reward", "U/length"}
    assert {f"entropy_probe_{name}" for name in expected} <= set(tags["histograms"])
    (weights,) = found.Histograms("entropy_probe_E/importance_weight")
    assert weights.histogram_value.num == len(state.E)
    assert weights.histogram_value.max == pytest.approx(state.ground_truth.weights.w_max)
    texts = {name for name in tags["tensors"] if name.endswith("text_summary")}
    assert texts == {f"entropy_probe/{name}/text_summary" for name in ("verdict", "report", "responses")}
    assert "custom_scalars__config__" in tags["tensors"]
    assert tags["images"] == ["entropy_probe/1_prediction_and_measurement"]
    (image,) = found.Images(tags["images"][0])
    picture = Image.open(io.BytesIO(image.encoded_image_string))
    assert image.step == 60
    assert picture.size == (image.width, image.height)
    assert picture.convert("L").getextrema() == (0, 255)  # something is drawn


def test_a_run_of_its_own_has_no_charts_of_a_single_point(state, tmp_path):
    logger = PyTorchTensorBoardLogger(str(tmp_path))
    runner = make_runner(state, (logger,))
    runner.logger = True
    publish(TensorBoardDiagnostics(), state, make_result(state), runner)
    assert "custom_scalars__config__" not in events(logger).Tags()["tensors"]


def charts_of(found):
    """The charts of bands in an events file, each its three tags."""
    (config,) = found.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(config.tensor_proto.string_val[0])
    return [
        (series.value, series.lower, series.upper)
        for category in layout.category
        for chart in category.chart
        for series in chart.margin.series
    ]


def without_measurement(values):
    """What a run with `importance.enabled: false` has."""
    of_it = ("deltaH_true", "H_upd", "residual")
    return {key: value for key, value in values.items() if not key.startswith(of_it)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_runs_and_a_training_have_the_tags_of_each_others_charts_or_none(state, tmp_path):
    """TensorBoard says "Missing Tags" of every run that has one or two of the three tags of a band."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "training")) as writer:
        loop = small_loop(steps=2)
        attach(loop.model, loop.optimizers[0], log=writer)
        loop.run()
    found = {"training": EventAccumulator(str(tmp_path / "training")).Reload()}
    whole = make_result(state)
    for name, values in (("run", whole.values), ("prediction", without_measurement(whole.values))):
        logger = PyTorchTensorBoardLogger(str(tmp_path / name))
        publish(TensorBoardDiagnostics(), state, replace(whole, values=values), make_runner(state, (logger,)))
        found[name] = events(logger)
    charts = [chart for one in found.values() for chart in charts_of(one)]
    shared = 0
    for chart in charts:
        for one in found.values():
            there = [tag for tag in chart if tag in one.Tags()["scalars"]]
            assert len(there) in (0, 3), (chart, there)
            assert len({tuple(event.step for event in one.Scalars(tag)) for tag in there}) <= 1
        shared += all(chart[0] in one.Tags()["scalars"] for one in (found["training"], found["run"]))
    assert shared >= 3  # the entropy, the change predicted and the one measured


@pytest.mark.parametrize("kind", [PyTorchTensorBoardLogger, FabricTensorBoardLogger, OwnLogger])
def test_the_last_lines_name_tensorboard(state, tmp_path, kind):
    logger = kind(tmp_path)
    runner = publish(TensorBoardDiagnostics(), state, make_result(state), make_runner(state, (logger,)))
    assert runner.written == {"TensorBoard": logger.log_dir}


@pytest.mark.parametrize("kind", [PyTorchTensorBoardLogger, FabricTensorBoardLogger])
def test_the_hparams_tab_has_settings_and_metrics(state, tmp_path, kind):
    logger = kind(str(tmp_path))
    result = make_result(state)
    publish(TensorBoardDiagnostics(), state, result, make_runner(state, (logger,)))
    contents = events(logger).PluginTagToContent(metadata.PLUGIN_NAME)
    parse = plugin_data_pb2.HParamsPluginData.FromString
    experiment = parse(contents[metadata.EXPERIMENT_TAG]).experiment
    shown = {info.name.tag for info in experiment.metric_infos}
    assert "entropy_probe/deltaH1_tok" in shown
    assert "entropy_probe_diagnostics/ESS" in shown
    assert "hp_metric" not in shown
    assert "entropy_probe/verdict_code" not in shown  # the word stands among the settings
    session = parse(contents[metadata.SESSION_START_INFO_TAG]).session_start_info.hparams
    assert session["checkpoint"].string_value == "step_60"
    assert session["LR"].number_value == 1e-6
    assert session["loss"].string_value == "dapo"
    assert session["Verdict"].string_value == make_result(state).values["verdict"]
    # TensorBoard shows the first five at once, and has a tick box for every one
    assert sorted(session)[:5] == ["B_E", "LR", "Seed", "Verdict", "checkpoint"]
    assert len(session) <= 12


def test_hyperparameters_can_be_left_to_the_training_loop(state, tmp_path):
    logger = PyTorchTensorBoardLogger(str(tmp_path))
    publish(
        TensorBoardDiagnostics(hyperparameters=False),
        state,
        make_result(state),
        make_runner(state, (logger,)),
    )
    found = events(logger)
    assert set(found.Tags()["scalars"]) == set(scalar_tags(make_result(state).values))
    assert metadata.EXPERIMENT_TAG not in found.summary_metadata


def test_several_checkpoints_make_a_curve(state, tmp_path):
    logger = FabricTensorBoardLogger(str(tmp_path))
    for name, step in (("step_20", 20), ("step_40", 40)):
        publish(
            TensorBoardDiagnostics(),
            state,
            replace(make_result(state, training_step=step), checkpoint_name=name),
            make_runner(state, (logger,)),
        )
    assert [event.step for event in events(logger).Scalars("entropy_probe/deltaH1")] == [20, 40]


def test_tags_are_taken_as_they_are(state, tmp_path, caplog):
    """TensorBoard would replace other characters, and say so in a warning."""
    rows = [entry | {"estimator": f"{entry['estimator']}+cv"} for entry in estimate_rows(make_values())]
    logger = FabricTensorBoardLogger(str(tmp_path))
    result = make_result(state, estimates=rows)
    publish(TensorBoardDiagnostics(), state, result, make_runner(state, (logger,)))
    assert set(events(logger).Tags()["scalars"]) == set(scalar_tags(result.values))
    assert "illegal" not in caplog.text


def test_non_finite_samples_do_not_stop_tensorboard(state, tmp_path):
    weights = state.ground_truth.weights.weights.clone()
    weights[0] = math.inf
    odd = replace(
        state,
        ground_truth=replace(
            state.ground_truth, weights=replace(state.ground_truth.weights, weights=weights)
        ),
    )
    logger = FabricTensorBoardLogger(str(tmp_path))
    assert (
        publish(TensorBoardDiagnostics(), odd, make_result(state), make_runner(odd, (logger,))).errors == []
    )
    (found,) = events(logger).Histograms("entropy_probe_E/importance_weight")
    assert found.histogram_value.num == len(state.E) - 1


def test_a_run_of_which_little_ran(state, tmp_path):
    bare, result = ProbeState(), replace(make_result(state), values={"timing": {"sample": 1.0}})
    logger = FabricTensorBoardLogger(str(tmp_path))
    assert publish(TensorBoardDiagnostics(), bare, result, make_runner(bare, (logger,))).errors == []
    assert events(logger).Tags()["scalars"] == ["entropy_probe_timing/sample"]


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=http://e.example/x onerror=alert(1)>",
    "![x](http://e.example/x.png)",
    "[click](javascript:alert(1))",
    "| a | b |\n|---|---|",
    "**bold** _it_ `code` ~~x~~",
    "# head\n\n- item\n1. one",
    "\x02klzzwxh:0001\x03 \x00 \x1b[31m",
    "&lt;b&gt; &amp; <http://e.example>",
    "```\nfence\n```",
    "a\\|b \\<b\\>",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_shown_as_they_are(state, tmp_path, text):
    E = replace(state.E, prompts=(text,) * 6, completions=("plain",) * 6)
    hostile = replace(state, sample=replace(state.drawn, E=E))
    result = replace(make_result(state, verdict_reasons=[f"It is flagged {text}."]), checkpoint_name=text)
    logger = FabricTensorBoardLogger(str(tmp_path))
    assert (
        publish(TensorBoardDiagnostics(examples=1), hostile, result, make_runner(hostile, (logger,))).errors
        == []
    )
    found = events(logger)
    for name in ("verdict", "report", "responses"):
        page = rendered(found.Tensors(f"entropy_probe/{name}/text_summary")[0].tensor_proto.string_val[0])
        allowed = {"table", "thead", "tbody", "tr", "th", "td", "p", "pre", "strong", "br", "ul", "li"}
        assert set(re.findall(r"</?([a-z0-9]+)", page)) <= allowed
    cells = re.findall(r"<td>(.*?)</td>", page, flags=re.DOTALL)
    assert len(cells) == 2
    assert cells[1] == "plain"
    shown = re.sub(r"[\x00-\x08\x1b]", "\ufffd", " ".join(text.split()))
    assert " ".join(html.unescape(cells[0].replace("<br>", " ")).split()) == shown


def test_texts_are_left_out_where_the_log_leaves_them_out(state, tmp_path):
    logger = FabricTensorBoardLogger(str(tmp_path))
    config = ProbeConfig(detailed_logging=DetailedLoggingConfig(log_sequences=False))
    publish(TensorBoardDiagnostics(), state, make_result(state), make_runner(state, (logger,), config))
    assert "entropy_probe/responses/text_summary" not in events(logger).Tags()["tensors"]


def test_other_loggers_get_the_scalars(state, tmp_path):
    loggers = (CSVLogger(str(tmp_path / "a")), FabricCSVLogger(str(tmp_path / "b")))
    runner = publish(TensorBoardDiagnostics(), state, make_result(state), make_runner(state, loggers))
    assert runner.errors == []
    for folder in ("a", "b"):
        (metrics,) = (tmp_path / folder).rglob("metrics.csv")
        assert "entropy_probe/deltaH1" in metrics.read_text().splitlines()[0]


def test_a_logger_that_fails_does_not_keep_the_next_from_publishing(state, tmp_path):
    class Broken(CSVLogger):
        def log_metrics(self, metrics, step=None):
            raise RuntimeError("no network")

    good = FabricTensorBoardLogger(str(tmp_path / "good"))
    runner = make_runner(state, (Broken(str(tmp_path / "bad")), good))
    publish(TensorBoardDiagnostics(), state, make_result(state), runner)
    with pytest.raises(LogError, match=r"Broken did not take the results: no network$"):
        raise runner.errors[0]
    assert events(good).Tags()["scalars"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_full_disk_under_tensorboard_is_one_line_and_no_traceback(
    state, tmp_path, monkeypatch, capsys, code, after
):
    """Its writer fails in a thread of its own, at the first record or later."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    real, calls = RecordWriter.write, []

    def write(self, data):
        calls.append(data)
        if len(calls) > after:
            raise OSError(code, os.strerror(code))
        real(self, data)

    monkeypatch.setattr(RecordWriter, "write", write)
    logger = PyTorchTensorBoardLogger(str(tmp_path), name="entropy_probe")
    runner = make_runner(state, (logger,))
    runner.logger = True
    before = threading.excepthook
    publish(TensorBoardDiagnostics(), state, make_result(state), runner)
    assert threading.excepthook is before
    (error,) = runner.errors
    assert str(error).startswith(f"cannot write {logger.log_dir}: {os.strerror(code)}; ")
    assert "Traceback" not in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_errors_of_other_threads_are_still_shown(state, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(threading, "excepthook", lambda args: shown.append(args.exc_value))

    class Busy(CSVLogger):
        def log_metrics(self, metrics, step=None):
            thread = threading.Thread(target=no_space)
            thread.start()
            thread.join()

    publish(TensorBoardDiagnostics(), state, make_result(state), make_runner(state, (Busy(str(tmp_path)),)))
    assert [error.errno for error in shown] == [errno.ENOSPC]


def test_the_folder_of_a_logger_is_tried_before_the_work(state, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for logger in (CSVLogger, PyTorchTensorBoardLogger, FabricCSVLogger, FabricTensorBoardLogger):
        runner = make_runner(state, (logger(str(tmp_path / "file")),))
        with pytest.raises(LogError, match=r"a part of the path is a file|a file of that name is in the way"):
            TensorBoardDiagnostics().on_probe_start(runner, make_module())


# ---------------------------------------------------------------- console


def test_the_report_reads_well(state, capsys):
    result = make_result(state, deltaH1_tok=-0.00112345, deltaH1_tok_se=0.00031)
    runner = publish(ConsoleReport(), state, result)
    assert runner.errors == []
    text = capsys.readouterr().out
    assert text.startswith(report(result))
    assert text[len(report(result)) :].startswith(f"\nVerdict: {result.values['verdict']}. ")
    assert max(map(len, text.splitlines())) <= 80
    lines = report(result, 120).splitlines()
    assert (
        lines[0]
        == "Entropy probe of step_60: E = 6 responses, U = 3 prompts x 4 responses, learning rate 1e-06"
    )
    assert lines[2] == f"Verdict: {result.values['verdict']}"
    for label in (
        "H before",
        "H after",
        "deltaH1",
        "deltaH_true",
        "difference",
        "deltaH2",
        "eta_10",
        "  spread over U",
        "deltaH1 causal",
        "deltaH_true snis",
        "ESS of E",
        "Pareto k",
        "noise floor",
        "derivative",
        "second order",
        "controls",
        "weights",
        "bias flags",
    ):
        (line,) = [line for line in lines if line.startswith(f"  {label}  ")]
        assert re.search(r"[a-z]{3,}.*$", line)
    assert "-0.00112 +/- 0.00031" in text
    assert "total" in lines[-1]
    assert max(len(line) for line in lines) <= 120


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_the_verdict_is_what_one_sees_in_the_end(state, monkeypatch, columns, tmp_path):
    result = make_result(state, verdict="caution", verdict_reasons=["[bold]one[/] \x1b[2J", "two"])
    runner = make_runner(state)
    with Terminal(columns) as terminal:
        terminal.take_over(monkeypatch)
        path = tmp_path / "results.json"
        for callback in (ConsoleReport(), ResultsFile(path)):
            runner.written.clear()
            publish(callback, state, result, runner)
        publish(ConsoleReport(), state, result, runner)
    assert runner.errors == []
    lines = terminal.lines
    path_lines = -(-len(f"results: {path}") // columns)
    assert "".join(lines[-path_lines:]) == f"results: {path}"
    assert lines[-path_lines - 1] == "Verdict: caution. [bold]one[/] \\x1b[2J"
    assert b"\x1b[1;33mVerdict: caution\x1b[0m" in terminal.raw
    assert lines.count("Verdict: caution") == 2  # of the two reports, at their beginnings


def test_no_colour_means_no_escape_sequence(state, monkeypatch):
    with Terminal() as terminal:
        terminal.take_over(monkeypatch)
        monkeypatch.setenv("NO_COLOR", "1")
        publish(ConsoleReport(), state, make_result(state))
    assert b"Verdict: " in terminal.raw
    assert b"\x1b" not in terminal.raw


class AsciiTerminal(io.StringIO):
    encoding = "ascii"


def test_what_the_terminal_cannot_show_is_escaped(state, monkeypatch):
    stream = AsciiTerminal()
    monkeypatch.setattr("sys.stdout", stream)
    publish(ConsoleReport(), state, replace(make_result(state), checkpoint_name="grün\x1b[31m\n"))
    assert stream.getvalue().startswith("Entropy probe of gr\\xfcn\\x1b[31m")


def test_a_closed_pipe_is_reported(state, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("sys.stdout", Closed())
    runner = publish(ConsoleReport(), state, make_result(state))
    with pytest.raises(LogError, match=r"cannot print to stdout: .*Broken pipe"):
        raise runner.errors[0]


# ---------------------------------------------------------------- progress


def test_a_short_run_in_a_file_has_a_line_per_phase(state, capsys):
    runner, module = make_runner(state), make_module()
    runner.state = replace(state, timing={})
    bars = ProgressBars()
    bars.on_probe_start(runner, module)
    runner.state.timing["load"] = 0.25
    bars.on_sample_start(runner, module)
    bars.on_progress(runner, "sample", 2, 4, "sample E")
    bars.on_progress(runner, "sample", 4, 4, "sample E")
    runner.state.timing["sample"] = 12.3
    bars.on_sample_end(runner, module)
    bars.on_report_start(runner, module)
    bars.on_probe_end(runner, module, make_result(state))
    assert capsys.readouterr().err.splitlines() == [
        "load                0.2 s  policy and optimizer state read from the checkpoint",
        "sample             12.3 s  responses drawn, rewarded and scored",
        "",
    ]


def test_every_phase_has_its_line(state):
    ends = {end for phase, (_, end) in HOOKS.items() if phase != "report"}
    assert ends <= set(vars(ProgressBars))


def test_one_bar_at_a_time(state, monkeypatch):
    threads = threading.active_count()
    with Terminal() as terminal:
        before = threading.active_count()
        terminal.take_over(monkeypatch)
        bars, runner = ProgressBars(), make_runner(state)
        for phase, what in (("sample", "sample E"), ("ground_truth", "score E after the step")):
            for done in (2, 4):
                bars.on_progress(runner, phase, done, 4, what)
        assert threading.active_count() == before
    assert threading.active_count() == threads
    raw = terminal.raw.decode()
    assert "sample: sample E" in raw
    assert "ground truth: score E after the step" in raw
    assert terminal.lines == []


@pytest.mark.parametrize("end", ["exception", "report", "end", "next pass", "next phase"])
def test_an_unfinished_bar_is_taken_away(state, monkeypatch, end):
    runner, module = make_runner(state), make_module()
    runner.state = replace(state, timing={})
    with Terminal() as terminal:
        terminal.take_over(monkeypatch)
        bars = ProgressBars()
        bars.on_progress(runner, "sample", 1, 4, "E")
        if end == "exception":
            bars.on_exception(runner, module, KeyboardInterrupt())
        elif end == "report":
            bars.on_report_start(runner, module)
        elif end == "end":
            bars.on_probe_end(runner, module, make_result(state))
        elif end == "next phase":
            bars.on_sample_end(runner, module)
        else:
            bars.on_progress(runner, "sample", 1, 4, "U")
            bars.on_exception(runner, module, RuntimeError())
        print("an error", file=terminal.stream)
    assert b"sample: E" in terminal.raw
    assert terminal.raw.count(b"\x1b[?25l") == terminal.raw.count(b"\x1b[?25h") > 0  # the cursor is back
    assert terminal.lines == ["an error"]


def test_other_ranks_show_nothing(state, capsys):
    runner = make_runner(state)
    runner.fabric.is_global_zero = False
    bars = ProgressBars()
    bars.on_progress(runner, "sample", 1, 2, "E")
    bars.on_sample_end(runner, make_module())
    bars.on_report_start(runner, make_module())
    publish(ConsoleReport(), state, make_result(state), runner)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_publishing_changes_no_random_state(state, tmp_path):
    before = torch.get_rng_state()
    logger = FabricTensorBoardLogger(str(tmp_path / "tb"))
    for callback in (
        TensorBoardDiagnostics(),
        DetailedLogging(DetailedLoggingConfig(output_directory=str(tmp_path / "logs"), level="debug")),
    ):
        publish(callback, state, make_result(state), make_runner(state, (logger,)))
    assert torch.equal(torch.get_rng_state(), before)

"""`entropy-probe report`: pages of what runs and trainings have left."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from lightning.pytorch.loggers import CSVLogger
from torch.utils.tensorboard import SummaryWriter

from probe.cli.main import main
from probe.cli.old_logs import logged_history, page_of
from probe.errors.exceptions import LogError
from probe.live.names import ALARMS, scalars
from tests.support.logged_run import logged_run
from tests.support.synthetic_training import made_up_history


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    return logged_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run `entropy-probe report` in an empty folder: `(code, stdout, stderr)`."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        code = main(["report", *map(str, args)])
        return code, *capsys.readouterr()

    return run


def logs(history):
    """What a watch gives a logger: numbers by their names, with their steps."""
    for entry in history:
        yield entry["step"], scalars(entry)
        for step in entry.get("alarms", ()):
            yield step, scalars({ALARMS[False]: 1.0})


def trainer_state(folder, history):
    path = folder / "trainer_state.json"
    rows = [{"loss": 0.1, "step": 1}, *({**numbers, "step": step} for step, numbers in logs(history))]
    path.write_text(json.dumps({"log_history": rows, "global_step": 120}))
    return path


def csv_file(folder, history):
    logger = CSVLogger(folder, name="csv")
    for step, numbers in logs(history):
        logger.log_metrics(numbers, step=step)
    logger.save()
    (path,) = folder.glob("csv/*/metrics.csv")
    return path


def events(folder, history, prefix=""):
    with SummaryWriter(folder / "events") as writer:
        for step, numbers in logs(history):
            for name, value in numbers.items():
                writer.add_scalar(prefix + name, value, step)
    return folder / "events"


def events_of_transformers(folder, history):
    return events(folder, history, "train/")


def test_a_log_and_its_summary(call, logged, tmp_path):
    code, out, err = call(logged.log, "--output", "page.html")
    assert (code, out, err) == (0, "report: page.html\n", "")
    assert (tmp_path / "page.html").read_bytes() == logged.page.read_bytes()
    code, out, err = call(logged.log)
    beside = logged.log.with_name(logged.log.name.replace(".json.gz", ".html"))
    assert out == f"report: {beside}\n"
    assert beside.read_bytes() == logged.page.read_bytes()
    (summary,) = logged.folder.glob("logs/*/*_summary.json")
    code, out, err = call(summary, "--output", tmp_path / "summary.html")
    assert (code, err) == (0, "")
    page = (tmp_path / "summary.html").read_text(encoding="utf-8")
    assert "checkpoint_path: " in page  # the configuration beside it
    assert f"This is a summary; the log {logged.log.name} beside it has more." in page


@pytest.mark.parametrize("write", [trainer_state, csv_file, events, events_of_transformers])
def test_the_log_of_a_training(call, tmp_path, write):
    history = made_up_history()
    path = write(tmp_path, history)
    code, out, err = call(path, "--output", "training.html")
    assert (code, out, err) == (0, "report: training.html\n", "")
    page = (tmp_path / "training.html").read_text(encoding="utf-8")
    assert page.count("data-verdict=") == len(history)
    assert "The policy&#39;s entropy has collapsed" in page
    assert "Alarm after step 61." in page
    assert f"{history[-1]['H_orig_tok']:.3f} ± 0.012".replace(" ", "\u00a0") in page


def test_steps_are_those_that_the_trainer_has_counted(call, tmp_path):
    path = trainer_state(tmp_path, made_up_history(probes=10, alarm=None))
    call(path, "--output", "training.html")
    assert "<span>120 optimizer steps</span>" in (tmp_path / "training.html").read_text(encoding="utf-8")


def test_a_log_gives_the_history_back():
    history = made_up_history()
    steps = (
        {"step": step, **{name.partition("/")[2]: x for name, x in numbers.items()}}
        for step, numbers in logs(history)
    )
    found = logged_history(steps)
    assert [entry["step"] for entry in found] == [entry["step"] for entry in history]
    for entry, known in zip(found, history, strict=True):
        assert entry["verdict"] == known["verdict"]
        assert entry.get("alarms") == known.get("alarms")
        for name in ("H_orig_tok", "deltaH1_tok", "deltaH_true_tok", "H_predicted_tok_ci95_low"):
            assert entry[name] == known[name]


def test_what_is_not_finite_or_no_step_is_left_out():
    steps = [
        {"step": None, "H_orig_tok": 1.0},
        {"step": math.nan, "H_orig_tok": 1.0},
        {"step": 3, "H_orig_tok": 0.5, "pareto_k": math.inf, "verdict_code": 17},
        {"step": 3.0, "deltaH1_tok": -0.1, "H_orig_tok_se": math.nan},
    ]
    assert logged_history(steps) == [{"step": 3, "H_orig_tok": 0.5, "verdict_code": 17, "deltaH1_tok": -0.1}]


BAD = {
    "nothing": (None, "expected a log of a run (.json, .json.gz), trainer_state.json, "),
    "text.json": ("no json", "expected JSON, found"),
    "other.json": ('{"a": 1}', "expected a log or summary of entropy-probe"),
    "trainer_state.json": (
        '{"log_history": [{"loss": 1.0, "step": 3}]}',
        "found none; attach the probe to the training",
    ),
    "metrics.csv": ("loss,step\n0.1,1\n", "found none; attach the probe to the training"),
    "folder": ("", "found none; attach the probe to the training"),
    "damaged.csv": (b"\xff\xfe\x00", "expected a CSV file of Lightning's CSVLogger"),
    "list.json": ("[]", "expected a log or summary of entropy-probe"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_files_give_one_line(call, tmp_path, name):
    content, message = BAD[name]
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = call(path)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err
    assert not list(tmp_path.glob("**/*.html"))


def test_events_of_a_run_are_referred_to_its_log(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("entropy_probe/H_orig_tok", 0.5, 60)
    with pytest.raises(LogError, match=r"found those of a run; give the run's log \(NAME.json.gz"):
        page_of(tmp_path)


def test_a_folder_of_logs_is_answered_with_them(call, logged):
    code, out, err = call(logged.log.parent)
    assert (code, out) == (2, "")
    assert "found the logs of 1 runs; give one of them (" in err


def test_a_page_ends_in_html(call, logged, tmp_path):
    code, out, err = call(logged.log, "--output", tmp_path / "page.pdf")
    assert (code, out) == (2, "")
    assert "--output: expected a file that ends in .html, found" in err
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written(call, logged, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = call(logged.log, "--output", "file/page.html")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "file/page.html" in err


def test_the_help_needs_no_library():
    code = (
        "import sys; from probe.cli.main import main\n"
        "try: main(['report', '--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'jinja2', 'transformers', 'tensorboard') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "trainer_state.json" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"

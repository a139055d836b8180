"""The command line as a user meets it: what is printed, where, and the exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

import probe
from probe.callbacks import ProbeCallback
from probe.cli.commands import ProbeCLI
from probe.cli.main import main
from probe.config.files import SHIPPED_CONFIGS, shipped_names
from probe.module import EntropyProbe
from probe.runner import ProbeRunner
from tests.support.terminal import Terminal
from tests.support.tiny_models import lora_checkpoint, save_base


class Announce(ProbeCallback):
    """Prints a text and the key of a result."""

    def __init__(self, text: str) -> None:
        self.text = text

    def on_report_end(self, runner, module, result):
        print(self.text, next(k for k in result.values if k == "deltaH1"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    base = save_base(folder / "base")
    lora_checkpoint(folder / "step_60", base)
    rows = "".join(json.dumps({"prompt": f"{i} apples", "answer": str(i)}) + "\n" for i in range(40))
    (folder / "prompts.jsonl").write_text(rows)
    config = {
        "checkpoint": {"checkpoint_path": str(folder / "step_60")},
        "batch_config": {
            "dataset_name": str(folder / "prompts.jsonl"),
            "split": "train",
            "B_E": 8,
            "B_U": 2,
            "G": 2,
        },
        "generation": {"max_new_tokens": 6},
        "memory_config": {"microbatch_size": 8},
        "trainer": {"accelerator": "cpu"},
    }
    config["batch_config"]["reward"] = "exact_number"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def call(files, tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder: `(code, stdout, stderr)`."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str):
        try:
            code = main([*args])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize("plain", [False, True])
def test_a_run_on_a_terminal(files, tmp_path, plain):
    with Terminal(80) as terminal:
        arguments = ["run", "--config", str(files / "config.yaml"), "--output.results_path", "r.json"]
        code = terminal.run(arguments, tmp_path, {"NO_COLOR": "1"} if plain else {})
    raw, lines = terminal.raw.decode(), terminal.lines
    assert code == 0, raw
    assert ("\x1b" in raw) == (not plain)
    values = json.loads((tmp_path / "r.json").read_text())
    start = next(k for k, line in enumerate(lines) if line.startswith("Entropy probe of step_60: "))
    # before the report a line for each phase, and notes; no bars
    phases = [line[:16].strip() for line in lines[:start] if re.search(r"^[a-z ]{16} +\d+\.\d s  ", line)]
    assert phases == ["load", "sample", "entropy gradient", "update", "prediction", "ground truth"]
    assert all("\u2501" not in line for line in lines)
    if not plain:
        assert "\u2501" in raw  # there were some
    assert max(map(len, lines)) <= 80
    label, word = lines[start + 3 if lines[start + 1].startswith("  ") else start + 2].split(": ")
    assert (label, word) == ("Verdict", values["verdict"])
    last = next(k for k, line in reversed(list(enumerate(lines))) if line.startswith("Verdict: "))
    assert lines[last].startswith(f"Verdict: {word}. ")
    assert any(line.startswith("results: r.json") for line in lines[last:])
    assert any(line.startswith("log: ") for line in lines[last:])
    assert len(lines) - last < 15  # it is on the screen


def test_a_long_run_in_a_file_says_how_far_it_is(call, files, monkeypatch):
    monkeypatch.setattr("probe.progress.LINE_SECONDS", 0.0)
    code, out, err = call("run", "--config", str(files / "config.yaml"), "--generation.batch_size", "4")
    assert code == 0
    assert re.search(r"^sample: sample E: 50 % \(4 of 8\), about \d+ s left$", err, re.MULTILINE)
    assert "\x1b" not in out + err
    assert "\r" not in err
    assert max(map(len, out.splitlines()[:-2])) <= 80  # the last ones have paths


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["swep", "--config", "quickstart"], "found 'swep'; did you mean sweep?"),
        (["whatis"], "did you mean whatif?"),
        (["xyzzy"], "expected a subcommand (run, demo, "),
        (
            ["--config", "quickstart"],
            "before its options, found '--config': entropy-probe run --config quickstart",
        ),
        (["--checkpoint=/a"], "expected a subcommand (run, demo, "),
    ],
)
def test_a_subcommand_is_needed(call, arguments, message):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("command", [[], ["run"], ["whatif"]])
def test_help_fits_a_terminal(call, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = call(*command, "--help")
    assert code == 0
    head = out.partition("options:")[0].splitlines()
    assert all(len(line) <= 80 for line in head if not line.startswith("  "))  # examples are to be copied


def test_a_run_prints_the_report_and_writes_the_logs(call, files, tmp_path):
    code, out, err = call(
        "run",
        "--config",
        str(files / "config.yaml"),
        "--batch_config.B_E",
        "12",
        "--output.results_path",
        "r.json",
    )
    assert code == 0, err
    assert "deltaH1" in out
    assert "deltaH_true" in out
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["B_E"] == 12
    assert results["training_step"] == 60
    names = [p.name for p in (tmp_path / "lightning_logs").glob("20*/*")]
    assert len(names) == 3
    assert all(name.startswith("entropy_probe_") and "step_60" in name for name in names)
    (run,) = (tmp_path / "lightning_logs" / "entropy_probe").iterdir()
    assert re.fullmatch(r"step_60_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", run.name)
    assert list(run.glob("events.*"))


def test_shorthands(call, files):
    code, out, _ = call(
        "run", "--config", "test_deltaH1", "--checkpoint", str(files / "step_60"), "--trainer.logger", "false",
        "--batch_config.dataset_name", str(files / "prompts.jsonl"), "--batch_config.split=train",
        "--batch_config.reward=exact_number", "--detailed_logging.enabled=false",
    )  # fmt: skip
    assert code == 0
    assert "step_60" in out


def test_print_config_gives_a_configuration_that_can_be_run(call, files, tmp_path):
    code, out, _ = call("run", "--config", str(files / "config.yaml"), "--print_config")
    assert code == 0
    assert yaml.safe_load(out)["batch_config"]["B_E"] == 8


def test_help_explains_options(call):
    code, out, _ = call("run", "--help")
    assert code == 0
    assert "--batch_config.B_E" in out
    assert "drawn with replacement" in out
    code, out, _ = call()
    assert code == 0
    assert "demo" in out


@pytest.mark.parametrize("command", [[], ["run"], ["sweep"], ["plan"], ["demo"], ["compare"]])
def test_help_begins_with_what_one_needs_first(call, command):
    code, out, _ = call(*command, "--help")
    assert code == 0
    first = out.split("options:")[0]
    assert first.startswith(f"usage: {' '.join(['entropy-probe', *command])} ")
    assert len(first.splitlines()) < 25
    examples = [line.strip() for line in first.splitlines() if line.startswith("  entropy-probe ")]
    assert examples
    assert all(line.startswith(f"entropy-probe {' '.join(command)}".strip()) for line in examples)
    if command not in (["demo"], ["compare"]):
        for name in shipped_names():
            assert name in first
    if command in (["run"], ["sweep"], ["plan"]):
        assert "--checkpoint takes the folder of a checkpoint" in first
        assert "--checkpoint FOLDER   Folder of the checkpoint" in out


BAD = [
    (["--batch_config.BE", "3"], "did you mean batch_config.B_E?"),
    (["--batch_config.B_E", "x"], "batch_config.B_E: expected int, found 'x'"),
    (["--checkpoint", "/nowhere"], "/nowhere"),
    (["--batch_config.B_U", "500"], "batch_config.B_U"),
    (["--batch_config.prompt_column", "text"], "text"),
    (["--batch_config.reward", "no_such_reward"], "no_such_reward"),
    (["--generation.top_k", "50"], "generation.allow_truncated_support"),
    (["--trainer.strategy", "ddp_spawn"], "expected ddp, whose processes run the program from its start"),
    (["--trainer.accelerator", "gpu"], "devices cannot be set up"),
]


@pytest.mark.parametrize(("extra", "message"), BAD, ids=[b[0][0] + b[0][1] for b in BAD])
def test_bad_input_gives_one_line_and_code_2(call, files, extra, message):
    code, _, err = call("run", "--config", str(files / "config.yaml"), *extra)
    errors = [line for line in err.splitlines() if "error" in line]
    assert code == 2
    assert len(errors) == 1, err
    assert errors[0].startswith("entropy-probe: error: ")
    assert message in errors[0]
    assert "Traceback" not in err


def test_other_bad_input(call, files, tmp_path):
    code, _, err = call("run")
    assert code == 2
    assert "expected a checkpoint folder" in err
    code, _, err = call("run", "--config", "missing.yaml")
    assert code == 2
    assert "found no missing.yaml" in err
    code, _, err = call("probe")
    assert code == 2
    assert "expected a subcommand (run, demo," in err
    (tmp_path / "empty").mkdir()
    code, _, err = call(
        "run", "--config", str(files / "config.yaml"), "--checkpoint", str(tmp_path / "empty")
    )
    assert code == 2
    assert "adapter_config.json" in err


def test_debug_shows_the_traceback(call, files):
    code, _, err = call("run", "--config", str(files / "config.yaml"), "--checkpoint", "/nowhere", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_a_folder_that_cannot_be_written_is_an_error_before_the_run(call, files, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, err = call(
        "run",
        "--config",
        str(files / "config.yaml"),
        "--detailed_logging.output_directory",
        str(tmp_path / "file"),
    )
    assert code == 2
    assert "file" in err
    assert "deltaH1" not in out


def test_callbacks_by_class_path(call, files, tmp_path):
    extra = {
        "callbacks": [{"class_path": "tests.cli.test_cli.Announce", "init_args": {"text": "hello"}}],
        "logger": False,
    }
    config = yaml.safe_load((files / "config.yaml").read_text())
    (tmp_path / "with.yaml").write_text(yaml.safe_dump({**config, "trainer": {**config["trainer"], **extra}}))
    code, out, err = call("run", "--config", str(tmp_path / "with.yaml"))
    assert code == 0, err
    assert "hello deltaH1" in out


def test_help_of_a_sweep(call):
    code, out, _ = call("sweep", "--help")
    assert code == 0
    for option in (
        "learning_rates",
        "eta_factors",
        "B_E",
        "B_U",
        "G",
        "seeds",
        "checkpoints",
        "output_folder",
    ):
        assert f"--sweep.{option}" in out
    assert "`--B_E` is short for `--sweep.B_E`" in " ".join(out.split())


BAD_SWEEPS = [
    (["--B_E", "x,2"], 'sweep.B_E: expected a list of numbers such as "[256, 1024]", found'),
    (["--sweep.seeds", "3"], 'sweep.seeds: expected a list of numbers such as "[1, 2, 3]", found'),
    (["--G", "[1]"], "sweep.G: expected integers of at least 2 and at most 10000000, found 1"),
    (["--learning_rates", "1e-3", "--eta_factors=2"], "sweep.eta_factors: expected null where sweep.learning_rates"),
    (["--checkpoints", "/nowhere"], "sweep.checkpoints: expected a folder with checkpoint-N in it, found no folder"),
    (["--sweep.B_F", "[1]"], "sweep.B_F: unknown configuration key; did you mean sweep.B_"),
    (["--batch_config.BE", "3"], "did you mean batch_config.B_E?"),
    (["--output_folder", "."], "sweep.output_folder: expected a new folder or that of a sweep, found . with"),
]  # fmt: skip


@pytest.mark.parametrize(("extra", "message"), BAD_SWEEPS, ids=[b[0][0] for b in BAD_SWEEPS])
def test_a_mistake_in_a_sweep_gives_one_line_and_code_2(call, files, tmp_path, extra, message):
    (tmp_path / "something").write_text("")
    code, out, err = call("sweep", "--config", str(files / "config.yaml"), *extra)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("entropy-probe: error: ")
    assert message in err
    assert out == ""


def test_a_sweep_is_done_once_and_writes_no_other_files(call, files, tmp_path):
    config = yaml.safe_load((files / "config.yaml").read_text())
    config["sweep"] = {"output_folder": "found", "B_E": [8, 12]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(config))
    command = ("sweep", "--config", "sweep.yaml", "--eta_factors", "1,2")
    code, out, err = call(*command)
    assert code == 0, err
    assert out.startswith("Sweep of 4 points, in found\n[1/4] B_E 8, eta 0.001: ")
    assert len(out.splitlines()) == 6
    assert "error" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found", "sweep.yaml"]
    table = (tmp_path / "found" / "sweep.csv").read_text().splitlines()
    assert len(table) == 5
    assert sorted(path.name for path in (tmp_path / "found").glob("*.png")) == [
        "batch_size_B_E.png",
        "eta_B_E12.png",
        "eta_B_E8.png",
    ]
    code, out, _ = call(*command)
    assert code == 0
    assert "Sweep of 4 points, 4 of them finished before" in out
    assert len(out.splitlines()) == 2
    assert (tmp_path / "found" / "sweep.csv").read_text().splitlines() == table
    code, _, err = call(*command, "--generation.temperature", "0.9")
    assert code == 2
    assert "generation.temperature is 1.0 there and 0.9 here; choose another --output_folder, or pass" in err
    code, out, _ = call(*command, "--generation.temperature", "0.9", "--overwrite")
    assert code == 0
    assert "4 of 4 points finished" in out


def test_a_plan_prints_a_page_and_writes_its_mapping(call, files, tmp_path):
    command = (
        "plan",
        "--config",
        str(files / "config.yaml"),
        "--pilot_B_E",
        "12",
        "--output.results_path=p.json",
    )
    code, out, err = call(*command)
    assert code == 0, err
    assert out.startswith("Plan for step_60: pilot of B_E = 12, B_U = 2 prompts")
    assert max(map(len, out.splitlines())) <= 80
    for words in ("nats per token", "  deltaH_true ", "  deltaH1 ", "Cost: ", "pilot "):
        assert words in out
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    values = json.loads((tmp_path / "p.json").read_text())
    assert values["B_E"] == values["plan"]["pilot_B_E"] == 12
    assert values["B_U"] == values["plan"]["pilot_B_U"] == 2
    assert values["plan"]["deltaH_true_tok"]["value"] == values["deltaH_true_tok"]
    assert values["plan"]["runs"][0]["B_E"] == 12


def test_a_plan_takes_its_section_from_a_file_and_another_update(call, files, tmp_path):
    config = yaml.safe_load((files / "config.yaml").read_text())
    config["plan"] = {"pilot_B_E": 9, "power": 0.9}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(config))
    code, out, err = call("plan", "--config", "plan.yaml", "--pilot_B_U=3", "--importance.enabled", "false")
    assert code == 0, err
    assert "pilot of B_E = 9, B_U = 3 prompts" in out
    assert "90 %" in out
    assert "deltaH_true" not in out


BAD_PLANS = [
    (["--pilot_B_E", "1"], "plan.pilot_B_E: expected an integer of at least 2, found 1"),
    (["--pilot_B_E", "x"], "plan.pilot_B_E: expected int, found 'x'"),
    (
        ["--pilot_B_U", "0"],
        "plan.pilot_B_U: expected an integer of at least 1, or null for batch_config.B_U, found 0",
    ),
    (["--power", "1"], "plan.power: expected a probability from 0.5 to below 1, found 1"),
    (["--power", "nan"], "plan.power: expected float, found 'nan'"),
    (["--plan.pilot_C", "3"], "did you mean plan.pilot_"),
    (["--output.results_path", "."], "cannot write .: expected a file"),
]


@pytest.mark.parametrize(("extra", "message"), BAD_PLANS, ids=[" ".join(b[0]) for b in BAD_PLANS])
def test_a_mistake_in_a_plan_gives_one_line_and_code_2(call, files, extra, message):
    code, out, err = call("plan", "--config", str(files / "config.yaml"), *extra)
    errors = [line for line in err.splitlines() if "error" in line]
    assert code == 2
    assert len(errors) == 1, err
    assert message in errors[0]
    assert "Plan for" not in out


def test_a_comparison_prints_a_page_and_writes_its_mapping(call, files, tmp_path):
    config = ["--config", str(files / "config.yaml"), "--detailed_logging.level", "detailed"]
    for name, rate in (("A", "1e-3"), ("B", "2e-3")):
        code, _, err = call(
            "run", *config, "--probe_rework.learning_rate", rate,
            "--detailed_logging.output_directory", str(tmp_path / name),
        )  # fmt: skip
        assert code == 0, err
    a, b = (str(next((tmp_path / name).glob("*/*.json.gz"))) for name in "AB")
    code, out, _ = call("compare", a, b, "--output.results_path", str(tmp_path / "found.json"))
    assert code == 0
    assert out == str(probe.compare(a, b))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == json.loads(json.dumps(probe.compare(a, b).as_mapping()))
    assert found["how"] == "paired"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["A.json"],
            "the following arguments are required: B; usage: entropy-probe compare A B [--unpaired]",
        ),
        (["A.json", "B.json", "C.json"], "unrecognized arguments: C.json; usage: entropy-probe compare"),
        (["A.json", "B.json", "--paired"], "--paired"),
        (["A.json", "B.json"], "cannot read A.json: No such file or directory; check the path"),
    ],
)
def test_a_mistake_in_a_comparison_gives_one_line_and_code_2(call, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = call("compare", *arguments)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_sweep_with_a_broken_checkpoint_goes_on_and_gives_code_3(call, files, tmp_path):
    (tmp_path / "runs" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "runs" / "checkpoint-60").symlink_to(files / "step_60")
    code, out, err = call("sweep", "--config", str(files / "config.yaml"), "--checkpoints", "runs")
    assert code == 3
    assert "checkpoint-1, 1 x the learning rate: failed: Checkpoint not found: no adapter or model in" in out
    assert "1 of 2 points finished, 1 failed" in out
    assert [line for line in err.splitlines() if "error" in line] == err.splitlines()[-1:]
    assert "1 of 2 points failed, the first one with: Checkpoint not found" in err
    assert (tmp_path / "lightning_logs" / "sweep" / "sweep.parquet").is_file()


def test_python_dash_m(files):
    done = subprocess.run(
        [sys.executable, "-m", "probe", "run", "--config", "nope"],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "found no nope" in done.stderr


@pytest.mark.parametrize(
    ("module", "entry", "reason"),
    [
        ("def f(:", "my_part.Part", "importing module 'my_part' failed with SyntaxError"),
        (
            "import no_such_package",
            "my_part.Part",
            "needs a package that is missing: No module named 'no_such_package'",
        ),
        ("1 / 0", "my_part.Part", "failed with ZeroDivisionError: division by zero"),
        ("class Patr: pass", "my_part.Part", "has no class 'Part'; did you mean Patr?"),
        ("class Part: pass", "my_part.Part", "expected my_part.Part to be derived from"),
        (None, "my_part.Part", "module 'my_part' was not found; start in the folder that holds it"),
    ],
)
@pytest.mark.parametrize("key", ["callbacks", "logger"])
def test_why_a_class_of_the_users_cannot_be_taken(call, tmp_path, monkeypatch, module, entry, reason, key):
    monkeypatch.delitem(sys.modules, "my_part", raising=False)
    if module is not None:
        (tmp_path / "my_part.py").write_text(module)
    value = [{"class_path": entry}] if key == "callbacks" else {"class_path": entry}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"trainer": {key: value}}))
    code, _, err = call("run", "--config", "c.yaml")
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith(f"entropy-probe: error: trainer.{key}: ")
    assert reason in line


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"text": [1]}, "trainer.callbacks: my_part.Part: text: Expected a <class 'str'>"),
        ({"txt": "a"}, "trainer.callbacks: my_part.Part has no argument 'txt'"),
        ({"text": "bad"}, "cannot be made: not this text"),
        ({"text": "good"}, "Checkpoint not found"),
    ],
)
def test_a_class_in_the_working_folder_and_its_arguments(call, tmp_path, monkeypatch, arguments, reason):
    monkeypatch.delitem(sys.modules, "my_part", raising=False)
    (tmp_path / "my_part.py").write_text(
        "from probe.callbacks import ProbeCallback\n"
        "class Part(ProbeCallback):\n"
        "    def __init__(self, text: str):\n"
        "        if text == 'bad': raise ValueError('not this text')\n"
    )
    trainer = {"logger": False, "callbacks": [{"class_path": "my_part.Part", "init_args": arguments}]}
    config = {"trainer": trainer, "checkpoint": {"checkpoint_path": "/nowhere"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    code, _, err = call("run", "--config", "c.yaml")
    assert code == 2
    assert reason in err


def test_a_class_given_as_an_option(call, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "my_part", raising=False)
    (tmp_path / "my_part.py").write_text("import no_such_package\n")
    for value, reason in (
        ("my_part.Part", "needs a package that is missing"),
        ("x", "expected module.Class"),
    ):
        code, _, err = call("run", f"--trainer.callbacks+={value}")
        assert code == 2
        assert f"trainer.callbacks: {'' if value == 'x' else 'module '}" in err
        assert reason in err


def test_the_installed_script_finds_a_class_in_the_working_folder(tmp_path):
    """The folder of the script, and not the current one, is on its path."""
    (tmp_path / "my_part.py").write_text(
        "from probe.callbacks import ProbeCallback\nclass Part(ProbeCallback): pass\n"
    )
    config = {"trainer": {"callbacks": [{"class_path": "my_part.Part"}], "logger": False}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config | {"checkpoint": {"checkpoint_path": "/nowhere"}}))
    script = tmp_path / "bin" / "entropy-probe"
    script.parent.mkdir()
    script.write_text("import sys\nfrom probe.cli import main\nsys.exit(main())\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(script), "run", "--config", "c.yaml"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Checkpoint not found" in done.stderr


LIBRARIES = (
    "torch",
    "transformers",
    "lightning",
    "peft",
    "datasets",
    "numpy",
    "pandas",
    "pyarrow",
    "matplotlib",
    "scipy",
    "accelerate",
    "tensorboard",
    "trl",
    "rich.console",
)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], 0),
        (["--help"], 0),
        (["run", "--help"], 0),
        (["sweep", "--help"], 0),
        (["run", "--print_config", "--trainer.logger", "false"], 0),
        (["run", "--batch_config.B_EE", "5"], 2),
        (["run", "--batch_config.B_E", "x"], 2),
        (["run", "--trainer.precision", "16"], 2),
        (["run", "--batch_config.B_E", "1"], 2),
        (["sweep", "--B_U", "0"], 2),
        (["plan", "--help"], 0),
        (["compare", "--help"], 0),
        (["compare", "A.json"], 2),
        (["plan", "--pilot_B_E", "1"], 2),
        (["swep"], 2),
        (["--config", "quickstart"], 2),
    ],
)
def test_what_needs_no_library_imports_none(arguments, code):
    program = (
        "import sys\nfrom probe.cli.main import main\n"
        f"try:\n    code = main({arguments!r})\nexcept SystemExit as stop:\n    code = stop.code or 0\n"
        f"print(code, sorted(set(sys.modules) & set({LIBRARIES!r})), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == f"{code} []"


@pytest.mark.parametrize(
    ("key", "name", "path"),
    [
        ("callbacks", "ProgressBars", "probe.callbacks.ProgressBars"),
        ("logger", "WandbLogger", "lightning.pytorch.loggers.WandbLogger"),
        ("logger", "lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.CSVLogger"),
    ],
)
def test_classes_of_the_libraries_are_found(call, key, name, path):
    extra = ["--trainer.logger.save_dir=x"] if key == "logger" else []
    code, out, err = call("run", f"--trainer.{key}", name, *extra, "--print_config")
    assert code == 0, err
    assert yaml.safe_load(out)["trainer"][key]["class_path"] == path


def test_a_misspelt_logger_is_looked_for_in_its_module(call):
    code, _, err = call("run", "--trainer.logger", "lightning.pytorch.loggers.CSVLoggr")
    assert code == 2
    assert "trainer.logger: module 'lightning.pytorch.loggers'" in err
    assert "CSVLogger" in err


def test_it_is_a_lightning_cli(monkeypatch, tmp_path):
    """Module and runner are its model and trainer, and a subclass can change what a command does."""
    monkeypatch.chdir(tmp_path)
    seen = []

    class Own(ProbeCLI):
        def run(self):
            seen.append((self.command.name, self.model, self.trainer))

    options = ["--batch_config.B_E", "33", "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    cli = Own(["run", "--config", str(SHIPPED_CONFIGS / "quickstart.yaml"), *options])
    assert isinstance(cli, LightningCLI)
    ((name, module, runner),) = seen
    assert name == "run"
    assert isinstance(module, EntropyProbe)
    assert isinstance(runner, ProbeRunner)
    assert module.config.batch_config.B_E == 33

"""What README and guides show can be run as it stands, in any folder, by somebody who has what the text says."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from lightning import LightningModule

import probe
from probe.cli.main import main
from probe.cli.parser import READERS, Command
from probe.cli.texts import DESCRIPTION, DESCRIPTIONS, NEXT_STEPS
from probe.config.files import read_config_file
from probe.config.schema import SECTIONS
from probe.loading import quiet_libraries
from probe.module import EntropyProbe
from probe.plan.settings import PlanConfig
from probe.sweep.settings import SweepConfig
from tests.support.helpers import char_tokenizer
from tests.support.tiny_models import VOCABULARY, add_lora, lora_checkpoint, save_base, tiny_model

pytestmark = [pytest.mark.filterwarnings("ignore")]  # of trainers, about trainings as small as these

REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PROMPTS = [f"q{i}:" for i in range(12)]


def blocks(language: str) -> list[Any]:
    """The fenced blocks of a language in all pages, named by page and line."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text[: match.start()].count("\n") + 1
            found.append(pytest.param(match.group(1), id=f"{page.name}:{line}"))
    return found


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    """The working folder is not the repository."""
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- Python


class LanguageModel(LightningModule):
    """Somebody's training, which ends after two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model(max_position_embeddings=512)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        self.trainer.should_stop = self.trainer.global_step >= 1
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def random_tokens() -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (4, 8))


def steps(model: Any, optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Batches; the step that the text leaves to the reader is made when the next one is asked for."""
    for _ in range(2):
        batch = random_tokens()
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        yield batch


def of_trl() -> dict[str, Any]:
    with quiet_libraries():
        from trl import GRPOConfig, GRPOTrainer
    args = GRPOConfig(
        output_dir="output", max_steps=2, per_device_train_batch_size=4, num_generations=4, use_cpu=True, bf16=False,
        max_completion_length=4, report_to="none", save_strategy="no", disable_tqdm=True, optim="adamw_torch",
    )  # fmt: skip
    return {
        "GRPOTrainer": GRPOTrainer,
        "args": args,
        "model": add_lora(tiny_model()),
        "reward": lambda prompts, completions, **columns: [float(len(text)) for text in completions],
        "data": Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        "tokenizer": char_tokenizer(),
    }


def of_trl_trainer() -> dict[str, Any]:
    there = of_trl()
    names = {"model": there["model"], "args": there["args"], "processing_class": there["tokenizer"]}
    with quiet_libraries():
        trainer = there["GRPOTrainer"](reward_funcs=there["reward"], train_dataset=there["data"], **names)
    return {"trainer": trainer, "EntropyProbeTrainerCallback": probe.EntropyProbeTrainerCallback}


def of_lightning() -> dict[str, Any]:
    data = torch.utils.data.DataLoader([random_tokens()[0] for _ in range(8)], batch_size=2)
    return {"prompts": PROMPTS, "tokenizer": char_tokenizer(), "module": LanguageModel(), "data": data}


def of_a_loop() -> dict[str, Any]:
    model = tiny_model(max_position_embeddings=512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    fabric = SimpleNamespace(log_dict=lambda metrics, step=None: None)
    names = {"model": model, "optimizer": optimizer, "prompts": PROMPTS, "tokenizer": char_tokenizer()}
    return {**names, "loader": steps(model, optimizer), "fabric": fabric}


STAND_INS = {
    "GRPOTrainer(": of_trl,
    "trainer.add_callback": of_trl_trainer,
    "Trainer(callbacks": of_lightning,
    "probe.watch(": of_a_loop,
}
"""What the reader of a block has, by what stands in it; the first that fits."""


@pytest.fixture
def tiny_run(tmp_path, monkeypatch):
    """Configurations keep what they say, but probe a tiny checkpoint with few samples."""
    lora_checkpoint(tmp_path / "step_60", save_base(tmp_path / "base"))
    rows = "".join(json.dumps({"prompt": f"{i} apples", "answer": str(i)}) + "\n" for i in range(9))
    (tmp_path / "prompts.jsonl").write_text(rows)

    def read(path: str | Path) -> dict[str, Any]:
        config = read_config_file(path)
        config["checkpoint"] = {"checkpoint_path": str(tmp_path / "step_60")}
        config["batch_config"] = {
            "dataset_name": "prompts.jsonl",
            "split": "train",
            "B_E": 8,
            "B_U": 2,
            "G": 2,
        }
        config["batch_config"]["reward"] = "exact_number"
        config["generation"] = {"max_new_tokens": 4}
        config["detailed_logging"] = {"level": "detailed"}
        return config

    monkeypatch.setattr("probe.offline.read_config_file", read)
    monkeypatch.setattr("probe.sweep.loop.read_config_file", read)


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run(block, tmp_path, tiny_run):
    stand_in = next((make for sign, make in STAND_INS.items() if sign in block), dict)
    for path in re.findall(r'"([\w./-]+\.json\.gz)"', block):
        probe.OfflineEntropyProbe.from_config_file("quickstart").run_mixed_probe()
        (log,) = Path("lightning_logs").glob("20*/*.json.gz")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        log.rename(path)
    exec(compile(block, "block", "exec"), {"__name__": "__main__", **stand_in()})


# ---------------------------------------------------------------- commands and configurations


@pytest.fixture
def started(monkeypatch) -> list[tuple[str, Any]]:
    """Commands are parsed and their objects built; instead of the work their name and module are noted."""
    calls: list[tuple[str, Any]] = []

    def note(command: Command) -> None:
        resolved = command.resolved
        calls.append((command.name, EntropyProbe(resolved.probe, resolved.seed, resolved.given)))

    def note_reading(name: str, **options: Any) -> None:
        calls.append((name, options))

    monkeypatch.setattr("probe.cli.commands.ProbeCLI", note)
    for name, module in READERS.items():
        monkeypatch.setattr(f"{module}.execute", partial(note_reading, name))
    for name in ("my.yaml", "run.yaml"):  # the reader's own
        Path(name).write_text("batch_config: {B_E: 8}\n")
    return calls


def commands(text: str) -> list[list[str]]:
    """The command lines of a block, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("block", blocks("bash"))
def test_commands_are_understood(block, started, capsys):
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for program, *arguments in commands(block):
        if program in ("torchrun", "srun"):
            called = next(k for k, word in enumerate(arguments) if word in ("probe", "entropy-probe"))
            program, arguments = "entropy-probe", arguments[called + 1 :]
        if program == "make":
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in arguments)
        else:
            assert program == "entropy-probe"
            assert main(arguments) == 0, capsys.readouterr().err
            assert started[-1][0] == arguments[0]


@pytest.mark.parametrize("text", [DESCRIPTION, *DESCRIPTIONS.values(), NEXT_STEPS.replace("{bin}", "  ")])
def test_the_examples_of_help_and_demo_are_understood(text, started, capsys):
    examples = re.findall(
        r"^ +entropy-probe ((?:run|demo|sweep|plan|attribute|whatif|compare|report)(?:.*\\\n)*.*)$",
        text,
        re.MULTILINE,
    )
    assert examples
    for example in examples:
        (arguments,) = commands(example)
        assert main(arguments) == 0, capsys.readouterr().err
    assert len(started) == len(examples)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_configurations_are_valid(block, started, capsys):
    Path("block.yaml").write_text(block)
    command = "sweep" if "sweep" in yaml.safe_load(block) else "run"
    assert main([command, "--config", "block.yaml"]) == 0, capsys.readouterr().err
    assert started[-1][0] == command


# ---------------------------------------------------------------- names of keys

KEYS = {f"{name}.{field.name}" for name, section in SECTIONS.items() for field in fields(section)}
KEYS |= {f"sweep.{field.name}" for field in fields(SweepConfig)}
KEYS |= {f"plan.{field.name}" for field in fields(PlanConfig)}
KEYS |= {
    f"trainer.{name}" for name in ("accelerator", "devices", "precision", "callbacks", "logger", "strategy")
}
NAMED = re.compile(
    rf"(?<![\w./]){'(' + '|'.join([*SECTIONS, 'sweep', 'plan']) + ')'}\.([A-Za-z_]\w*)(?![\w(])"
)
"""`section.key` in a text."""
FILE_ENDINGS = {"csv", "parquet", "json", "yaml", "py", "png", "md"}


def texts_of(file: Path) -> Iterator[str]:
    """The strings of a Python file, docstrings included, or a page."""
    source = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        yield re.sub(r"```python.*?```", "", source, flags=re.DOTALL)
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


SOURCES = [
    *sorted((REPOSITORY / "probe").rglob("*.py")),
    *sorted((REPOSITORY / "callbacks").glob("*.py")),
    *PAGES,
]


def test_keys_named_in_texts_exist():
    seen, wrong = set(), []
    for file in SOURCES:
        for text in texts_of(file):
            for section, key in NAMED.findall(text):
                seen.add(f"{section}.{key}")
                if key not in FILE_ENDINGS and f"{section}.{key}" not in KEYS:
                    wrong.append(f"{file.relative_to(REPOSITORY)}: {section}.{key}")
    assert wrong == []
    assert len(seen & KEYS) > 40

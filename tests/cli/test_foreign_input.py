"""What a stranger can put into a YAML file, a reward or a name ends in one clear line, in bounded time."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from probe.config.files import read_config_file
from probe.data.reward_calls import call_reward, resolve_rewards
from probe.errors.exceptions import ConfigError, DataError
from probe.limits import CONFIG_ALIASES, CONFIG_BYTES, CONFIG_DEPTH
from probe.text import error_text, printable, shown

cli = importlib.import_module("probe.cli.main")  # the package has the function under that name

ESCAPES = "\x1b[31mred\x1b[0m\x1b]0;title\x07 \u202e \ud83d"


def doubling(levels):
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 100_000, f"at most {CONFIG_DEPTH} levels of nesting"),
        ("a: " + "{b: " * 3000 + "1" + "}" * 3000, f"at most {CONFIG_DEPTH} levels of nesting"),
        (doubling(40), f"at most {CONFIG_ALIASES} uses of anchors"),
        ("a: 1\nb: {c: 1, d: 2, c: 3}\n", "line 2: expected every key once, found c again"),
        ("a: 1\nb: 2\na: 3\n", "line 3: expected every key once, found a again"),
        ("a: {[x]: 1", "cannot be read"),
        ("a: 1\n" + "#" * CONFIG_BYTES, f"at most {CONFIG_BYTES} bytes"),
        ("- 1\n- 2\n", "expected a mapping with sections"),
        ("!!python/object/apply:os.system ['true']", "cannot be read"),
    ],
)
def test_yaml(tmp_path, text, message, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=message):
        read_config_file(file)
    if (
        "mapping with sections" not in message and "python" not in text
    ):  # the same check before the command line parses
        assert cli.main(["run", "--config", str(file)]) == cli.USAGE_ERROR
        assert message in capsys.readouterr().err
    assert time.monotonic() - start < 30  # a hang, not a slow machine


def test_yaml_that_is_fine(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("a: &x {b: 1}\nc: [{b: 1}, {b: 2}]\nd: *x\ne: {b: {b: 1}}\n")
    assert read_config_file(file)["d"] == {"b": 1}


class _Other(BaseException):
    pass


class _NoTextError(Exception):
    def __str__(self):
        raise RuntimeError("no")


class _NoRepr:
    def __repr__(self):
        raise RuntimeError("no")


def _raises(error):
    def reward(prompts, completions, **columns):
        raise error

    return reward


def _endless(prompts, completions, **columns):
    while True:
        yield 1.0


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (_raises(SystemExit(7)), "failed with SystemExit: 7"),
        (_raises(_Other("x")), "failed with _Other: x"),
        (_raises(_NoTextError()), "failed with _NoTextError: .without a text"),
        (lambda prompts, completions, **c: [10**400] * 2, "expected a finite number, found inf"),
        (lambda prompts, completions, **c: [_NoRepr()] * 2, "whose __repr__ raises"),
        (_endless, "expected 2 numbers, found more"),
    ],
)
def test_rewards(reward, message):
    with pytest.raises(DataError, match=message):
        call_reward(reward, ["a", "b"], ["c", "d"], {})


def test_ctrl_c_in_a_reward_is_the_users():
    with pytest.raises(KeyboardInterrupt):
        call_reward(_raises(KeyboardInterrupt()), ["a"], ["b"], {})


def test_a_module_that_exits_when_it_is_imported(tmp_path, monkeypatch):
    (tmp_path / "leaving_at_once.py").write_text("import sys; sys.exit(3)")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"leaving_at_once.* failed with SystemExit: 3"):
        resolve_rewards("leaving_at_once:f")


def test_no_escape_sequence_reaches_the_terminal(capsys):
    assert cli.main(["run", "--checkpoint", f"/no{ESCAPES}"]) == cli.USAGE_ERROR
    out, err = capsys.readouterr()
    for text in (out, err.rstrip("\n")):
        assert text.isprintable()
        assert text.isascii()
    assert "x1b[31mred" in err
    assert printable(ESCAPES).isprintable()


def test_texts_of_what_has_none():
    assert error_text(_NoTextError()) == "_NoTextError: (without a text: its __str__ raises)"
    assert shown(_NoRepr()) == "(a _NoRepr whose __repr__ raises)"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
        ),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_out_of_memory_says_what_to_lower(error, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cli, "parse", fail)
    assert cli.main(["run"]) == cli.USAGE_ERROR
    assert "out of memory" in (err := capsys.readouterr().err)
    assert "lower memory_config.head_chunk_tokens" in err


def test_an_error_without_a_text_ends_in_a_line(monkeypatch, capsys):
    def fail(*_, **__):
        raise _NoTextError

    monkeypatch.setattr(cli, "parse", fail)
    assert cli.main(["run"]) == cli.INTERNAL_ERROR
    assert "unexpected _NoTextError: (without a text" in capsys.readouterr().err


def test_sigterm_ends_like_ctrl_c(monkeypatch, capsys):
    own = signal.getsignal(signal.SIGTERM)

    def wait(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    monkeypatch.setattr(cli, "parse", wait)
    assert cli.main(["run"]) == cli.TERMINATED
    assert "interrupted; everything is restored" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is own


def test_ctrl_c_while_libraries_are_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    root = Path(cli.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", "from probe.__main__ import main; import sys; sys.exit(main(['demo']))"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (130, "entropy-probe: error: interrupted while starting\n")

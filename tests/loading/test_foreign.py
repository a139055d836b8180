"""A checkpoint of a stranger: whatever stands in its files ends in one clear line, in bounded time and memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch

import probe.data.rendering as rendering
import probe.loading.adapters as adapters
import probe.loading.saved_tokenizer as tokenizers
from probe.config.checkpoint import CheckpointConfig
from probe.errors.exceptions import CheckpointError, DataError, OptimizerStateError, ProbeError
from probe.limits import LARGEST_SETTING, MODEL_EXPERTS, SETTINGS_BYTES, time_limit
from probe.loading import load_optimizer, load_policy_model, locate_checkpoint
from probe.loading.foreign import check_torch_file
from tests.support.helpers import char_tokenizer
from tests.support.tiny_models import adamw, lora_checkpoint, save_base, take_steps, tiny_model

ENOUGH = 20.0  # a hang, not a slow machine


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """`base/` and `step_3/` of a LoRA training."""
    root = tmp_path_factory.mktemp("made")
    lora_checkpoint(root / "step_3", save_base(root / "base"))
    return root


@pytest.fixture
def copied(made, tmp_path) -> Path:
    root = Path(shutil.copytree(made, tmp_path / "c"))
    change(root / "step_3/model/adapter_config.json", base_model_name_or_path=str(root / "base"))
    return root


def change(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def load(root: Path):
    config = CheckpointConfig(checkpoint_path=str(root / "step_3"))
    files = locate_checkpoint(config)
    model, _ = load_policy_model(config, files, "cpu")
    return load_optimizer(model, files, config)


def refused(root: Path, match: str) -> None:
    start = time.monotonic()
    with pytest.raises(ProbeError, match=match) as caught:
        load(root)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < ENOUGH


def fifo(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


@pytest.mark.parametrize(
    "name",
    [
        "step_3/model/tokenizer_config.json",
        "step_3/model/chat_template.jinja",
        "step_3/model/special_tokens_map.json",
        "step_3/optimizer.bin",
        "step_3/trainer_state.json",
        "base/config.json",
        "base/generation_config.json",
        "base/model.safetensors",
    ],
)
def test_named_pipes(copied, name):
    fifo(copied / name)
    refused(copied, "expected a file, found a named pipe")


@pytest.mark.parametrize("name", ["step_3/model/adapter_config.json", "step_3/optimizer.pt"])
def test_named_pipes_in_the_place_of_what_is_looked_for(copied, name):
    fifo(copied / name)
    refused(copied, r"not found|expected a file, found a named pipe|beside .* found none")


def test_sockets_and_devices(copied):
    file = copied / "step_3/model/chat_template.jinja"
    held = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    try:  # names of sockets are short
        os.chdir(file.parent)
        held.bind(file.name)
    finally:
        os.chdir(here)
        held.close()
    refused(copied, "expected a file, found a socket")
    file.unlink()
    file.symlink_to("/dev/zero")
    refused(copied, "expected a file, found a device")
    file.unlink()
    file.symlink_to("/proc/self/environ")
    refused(copied, "found a link to /proc/")


def test_links_in_a_circle_and_to_nothing(copied):
    (copied / "step_3/model/a").symlink_to("b")
    (copied / "step_3/model/b").symlink_to("a")
    (copied / "step_3/model/c").symlink_to("nothing")
    assert load(copied).step == 3
    (copied / "step_3/optimizer.pt").unlink()
    (copied / "step_3/optimizer.pt").symlink_to("optimizer.pt")
    refused(copied, "Optimizer state not found")


@pytest.mark.parametrize(
    "name", ["step_3/model/adapter_config.json", "step_3/model/chat_template.jinja", "base/config.json"]
)
def test_files_with_nothing_in_them_but_their_size(copied, name):
    with (copied / name).open("wb") as file:
        file.truncate(2**40)
    refused(copied, f"at most {SETTINGS_BYTES} bytes, found {2**40}")


def test_an_optimizer_larger_than_any_of_this_model(copied):
    with (copied / "step_3/optimizer.pt").open("r+b") as file:
        file.truncate(2**40)
    refused(copied, r"bytes for the optimizer of this model, found .* checkpoint\.optimizer_path")


@pytest.mark.parametrize(
    "name", ["step_3/model/adapter_config.json", "base/config.json", "step_3/trainer_state.json"]
)
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "\xff\xfe", "", "nul", "[1]"])
def test_json_that_is_none(copied, name, text):
    (copied / name).write_bytes(text.encode("latin-1"))
    refused(copied, r"expected .*found")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"r": 10**9}, "expected r of at most 64"),
        ({"rank_pattern": {"q_proj": 10**9}}, "expected rank_pattern of at most 64"),
        ({"r": 10**400}, f"at most {LARGEST_SETTING}, found r: one of more than 30 digits"),
        ({"layer_replication": [[0, 1]] * 10_000}, "layers in layer_replication"),
        ({"layer_replication": [[0, 10**9]]}, "layers in layer_replication"),
        ({"layer_replication": [["a"]]}, "expected pairs of layers"),
        ({"peft_type": 7}, "with a peft_type, found 7"),
        ({"base_model_name_or_path": "x" * 5000}, "expected the name of a model"),
        ({"base_model_name_or_path": "y" * 900}, "expected a local folder, a hub id"),
        ({"base_model_name_or_path": ["base"]}, "expected the name of a model"),
        ({"base_model_name_or_path": "a\0b"}, "expected the name of a model"),
        ({"target_modules": "(("}, "expected a regular expression"),
        ({"target_modules": [f"m{i}" for i in range(20_000)]}, "entries in target_modules"),
        ({"rank_pattern": {f"m{i}": 4 for i in range(20_000)}}, "entries in rank_pattern"),
    ],
)
def test_settings_of_an_adapter(copied, changes, match):
    change(copied / "step_3/model/adapter_config.json", **changes)
    refused(copied, match)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "(([a-z._0-9])+)+!"},
        {"exclude_modules": "(([a-z._0-9])+)+!"},
        {"rank_pattern": {"(([a-z._0-9])+)+!": 4}},
        {"alpha_pattern": {"(([a-z._0-9])+)+!": 4}},
    ],
)
def test_patterns_without_an_end(copied, changes, monkeypatch):
    monkeypatch.setattr(adapters, "PATTERN_SECONDS", 0.3)
    change(copied / "step_3/model/adapter_config.json", **changes)
    refused(copied, r"expected patterns that go through \d+ names")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_hidden_layers": 10**7}, "expected num_hidden_layers of at most 26, the number of weights"),
        ({"num_experts": 10**7}, f"expected num_experts of at most {MODEL_EXPERTS}"),
        ({"hidden_size": 10**15}, f"at most {LARGEST_SETTING}, found hidden_size"),
        ({"hidden_size": 2**30}, "weights do not fit its config.json"),
    ],
)
def test_settings_of_a_model(copied, changes, match):
    change(copied / "base/config.json", **changes)
    refused(copied, match)


@pytest.mark.parametrize("name", ["../x.safetensors", "/dev/zero", "gone.safetensors", 7])
def test_an_index_that_leads_elsewhere(copied, name):
    (copied / "base/model.safetensors").unlink()
    (copied / "base/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    refused(copied, "expected files in its own folder|expected the name of a file for each weight")


@pytest.mark.parametrize("path", ["~nobody_of_this_name/x", "a\0b", "z" * 3000])
def test_paths_that_no_file_has(path):
    with pytest.raises(CheckpointError, match=r"expected a path|there is no folder"):
        locate_checkpoint(CheckpointConfig(checkpoint_path=path))


# ---------------------------------------------------------------- the optimizer's file


def archive(file: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file, "w", compression) as target:
        target.writestr("archive/data.pkl", content)
        target.writestr("archive/version", "3\n")
    return file


def tuples(levels: int, times: int) -> bytes:
    """A tuple that holds another `times` times, and so on: `times ** levels` values in a few bytes."""
    made = b")q\x00"
    for level in range(1, levels):
        made += b"(" + (b"h" + bytes([level - 1])) * times + b"tq" + bytes([level])
    return made


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\x80\x02}" + tuples(40, 3) + b"K\x01s.", "a tuple that stands for too many values"),
        (b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s.", "values nested without an end"),
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "values nested without an end"),
    ],
)
def test_tables_without_an_end(tmp_path, content, match):
    start = time.monotonic()
    with pytest.raises(OptimizerStateError, match=match):
        check_torch_file(archive(tmp_path / "o.pt", content), None)
    assert time.monotonic() - start < ENOUGH


def test_content_that_is_packed(tmp_path):
    with pytest.raises(OptimizerStateError, match="compressed entry"):
        check_torch_file(archive(tmp_path / "o.pt", b"\x80\x02}." * 1000, zipfile.ZIP_DEFLATED), None)


@pytest.mark.parametrize("new", [True, False])
def test_files_that_torch_writes_pass(tmp_path, new):
    model = tiny_model()
    optimizer = adamw(model)
    take_steps(model, optimizer, 1)
    file = tmp_path / "o.pt"
    torch.save(optimizer.state_dict(), file, _use_new_zipfile_serialization=new)
    check_torch_file(file, None)


def with_state(**values):
    return lambda saved: saved["state"][0].update(values)


def with_group(**values):
    return lambda saved: saved["param_groups"][0].update(values)


def whole(**values):
    return lambda saved: saved.update(values)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (with_group(lr="fast"), "a number in lr of group 0, found str 'fast'"),
        (with_group(lr=None), "a number in lr of group 0"),
        (with_group(lr=True), "a number in lr of group 0"),
        (with_group(lr=torch.zeros(2)), "a number in lr of group 0, found a tensor"),
        (with_group(lr=10**400), "expected finite learning rates"),
        (with_group(lr=float("nan")), "expected finite learning rates"),
        (with_group(betas=0.9), "numbers in betas"),
        (with_group(betas=("a", "b")), "a number in betas"),
        (with_group(betas=(0.9,)), "expected two betas"),
        (with_group(betas=(0.9, 0.99, 0.999)), "expected two betas"),
        (with_group(eps=[1e-8]), "a number in eps"),
        (with_group(weight_decay="0.1"), "a number in weight_decay"),
        (with_group(amsgrad="no"), "true or false in amsgrad"),
        (with_group(params=5), "a list of positions or names"),
        (with_group(params=[0.5]), "a list of positions or names"),
        (with_group(params=[0, 0]), "every parameter in one group"),
        (with_group(param_names=5), "a list of names in param_names"),
        (with_group(param_names=torch.zeros(28)), "a list of names in param_names"),
        (with_state(step=2**62), "faults: .* step 4"),
        (with_state(step=0), "a count of 0 steps"),
        (whole(param_groups=[1]), "a list of mappings in param_groups"),
        (whole(param_groups={}), "a list of mappings in param_groups"),
        (whole(state=[1]), "a mapping of mappings in state"),
        (whole(state={0: 1}), "a mapping of mappings in state"),
        (with_state(step=None), "step None"),
        (with_state(step="3"), "step '3'"),
        (with_state(step=10**400), "step nan"),
        (with_state(step=torch.zeros(2)), "step of several values"),
        (with_state(exp_avg="x"), "expected a tensor exp_avg"),
        (with_state(exp_avg_sq=None), "exp_avg_sq is no tensor but NoneType"),
        (with_state(exp_avg_sq="x"), "exp_avg_sq is no tensor but str"),
        (with_state(exp_avg_sq=torch.zeros(4, 32).to_sparse()), "exp_avg_sq is sparse"),
        (with_state(exp_avg=torch.zeros(4, 32).to_sparse()), "exp_avg is sparse"),
        (with_state(exp_avg=torch.empty(4, 32, device="meta")), "exp_avg has a shape but no values"),
        (with_state(exp_avg=torch.zeros(4, 32) * 1j), "exp_avg of type complex64"),
        (with_state(exp_avg=torch.zeros(4, 32).long()), "exp_avg of type int64"),
        (with_state(exp_avg=torch.zeros(4, 32).bool()), "exp_avg of type bool"),
        (with_state(exp_avg_sq=torch.zeros(4, 32).long()), "exp_avg_sq of type int64"),
        (with_state(exp_avg=torch.zeros(1).expand(4, 2**40)), r"expected shape|faults"),
    ],
)
def test_states_of_wrong_values(copied, edit, match):
    file = copied / "step_3/optimizer.pt"
    saved = torch.load(file, weights_only=True)
    edit(saved)
    torch.save(saved, file)
    refused(copied, match)


def test_numbers_in_tensors_and_dense_copies_of_views(copied):
    file = copied / "step_3/optimizer.pt"
    saved = torch.load(file, weights_only=True)
    saved["param_groups"][0]["lr"] = torch.tensor(2e-3)
    shape = saved["state"][0]["exp_avg_sq"].shape
    saved["state"][0]["exp_avg_sq"] = torch.full((1, 1), 1e-6).expand(shape)
    torch.save(saved, file)
    loaded = load(copied)
    assert loaded.learning_rate == pytest.approx(2e-3)
    first = next(iter(loaded.optimizer.state.values()))["exp_avg_sq"]
    assert first.is_contiguous()
    assert torch.equal(first, torch.full(shape, 1e-6))


@pytest.mark.parametrize("logs", [["a"], "abc", [{"learning_rate": "x"}], [None], {"a": 1}])
def test_logs_of_a_trainer_that_are_none(copied, logs):
    (copied / "step_3/trainer_state.json").write_text(json.dumps({"log_history": logs}))
    file = copied / "step_3/optimizer.pt"
    saved = torch.load(file, weights_only=True)
    with_group(lr=0.0)(saved)
    for group in saved["param_groups"]:
        group.pop("initial_lr", None)
    torch.save(saved, file)
    refused(copied, "expected a learning rate above 0")


# ---------------------------------------------------------------- programs in settings


def test_a_chat_template_without_an_end(monkeypatch):
    monkeypatch.setattr(rendering, "TEMPLATE_SECONDS", 0.3)
    tokenizer = char_tokenizer(chat_template=True)
    loop = "{% for i in range(99999) %}"
    tokenizer.chat_template = loop * 2 + "{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match=r"row 1: expected a chat template that is done within 0.3 seconds"):
        rendering.render_messages(tokenizer, [{"role": "user", "content": "7"}], "row 1")


def test_a_tokenizer_without_an_end(monkeypatch):
    over = threading.Event()

    class Endless:
        def no_truncation(self) -> None: ...

        def no_padding(self) -> None: ...

        def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list:
            over.wait(ENOUGH)
            return []

    monkeypatch.setattr(tokenizers, "TOKENIZER_SECONDS", 0.2)
    with pytest.raises(
        CheckpointError, match=r"a pattern in its tokenizer\.json that does not come to an end"
    ):
        tokenizers._saved_ids("t", Endless())
    over.set()


def test_a_tokenizer_that_fails(tmp_path):
    class Failing:
        def no_truncation(self) -> None: ...

        def no_padding(self) -> None: ...

        def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list:
            raise BaseException("panicked")

    with pytest.raises(CheckpointError, match=r"found one that fails .*checkpoint\.tokenizer_path"):
        tokenizers._saved_ids("t", Failing())


def test_a_time_limit_leaves_the_callers_timer_alone():
    rung = []
    own = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(ValueError, match="over"), time_limit(0.05, ValueError("over")):
            time.sleep(ENOUGH)
        assert not rung
        time.sleep(0.4)
        assert rung == [1]
        with time_limit(ENOUGH, ValueError("over")):
            pass
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    finally:
        signal.signal(signal.SIGALRM, own)


def test_a_time_limit_in_another_thread_limits_nothing():
    done = []

    def work() -> None:
        with time_limit(0.01, ValueError("over")):
            time.sleep(0.05)
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]

"""Settings of the update from the training arguments beside a checkpoint."""

from __future__ import annotations

import collections
import enum
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.parallelism_config import ParallelismConfig
from datasets import Dataset
from transformers import BitsAndBytesConfig, TrainingArguments

from probe import OfflineEntropyProbe, load_log
from probe.cli.main import main
from probe.config.checkpoint import CheckpointConfig
from probe.config.given import changed_keys
from probe.config.parsing import parse_config
from probe.config.schema import SECTIONS, ProbeConfig
from probe.errors.exceptions import CheckpointError, ConfigError
from probe.from_checkpoint.fill import fill_settings
from probe.from_checkpoint.options import IRRELEVANT, READ, SAMPLING, SIZES, UNSUPPORTED, known_options
from probe.from_checkpoint.sampling_options import changed_sampling
from probe.from_checkpoint.sources import KEYS
from probe.loading import locate_checkpoint, quiet_libraries
from probe.loading.training_args import read_training_args
from probe.report.terminal import report
from probe.runner import ProbeRunner, TrainerSection
from probe.sweep.grid import build_grid
from probe.sweep.loop import run_sweep
from probe.sweep.settings import SweepConfig
from tests.support.helpers import char_tokenizer
from tests.support.tiny_models import (
    adamw,
    add_lora,
    load_base,
    lora_checkpoint,
    save_base,
    save_checkpoint,
    take_steps,
)

with quiet_libraries():
    from trl import GRPOConfig, SFTConfig

pytestmark = [pytest.mark.filterwarnings("ignore")]


CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}


def grpo_args(**options):
    with quiet_libraries():
        return GRPOConfig(**{"output_dir": "output", **CPU, **options})


def saved(folder, args, name="training_args.bin"):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(args, folder / name)
    return folder / name


def filled(file, config=None, given=()):
    return fill_settings(config or ProbeConfig(), given, file)


def digits(prompts, completions, **columns):
    """A reward: how many digits the completion has."""
    return [float(sum(c.isdigit() for c in text)) for text in completions]


class Reduced:
    """Pickled as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# ---------------------------------------------------------------- the table


def test_the_table_has_every_option_of_the_installed_trl_once():
    counts = collections.Counter(known_options())
    assert [name for name, count in counts.items() if count > 1] == []
    missing = {f.name for f in fields(GRPOConfig)} - set(counts)
    assert not missing, (
        f"decide what these options are to the probe, in probe/from_checkpoint/options.py: {missing}"
    )


def test_the_table_has_no_option_that_trl_does_not_have():
    own = {f.name for f in fields(GRPOConfig)}
    irrelevant = [name for names in IRRELEVANT.values() for name in names]
    earlier = {"vllm_guided_decoding_regex"}
    assert {*READ, *SIZES, *UNSUPPORTED, *SAMPLING, *irrelevant} - own == earlier


def test_the_keys_are_those_of_the_configuration():
    for key in KEYS:
        section, name = key.split(".")
        assert name in {f.name for f in fields(SECTIONS[section])}


def test_trls_defaults_are_neutral():
    defaults = {f.name: f.default for f in fields(GRPOConfig) if f.default is not MISSING}
    for name, option in UNSUPPORTED.items():
        assert name not in defaults or defaults[name] in option.neutral, name
    assert changed_sampling(defaults) == {}


# ---------------------------------------------------------------- reading


def test_trls_defaults_are_the_probes(tmp_path):
    found, sources = filled(saved(tmp_path, grpo_args()))
    sizes = replace(ProbeConfig().batch_config, B_U=1, G=8)
    generation = replace(ProbeConfig().generation, max_new_tokens=512)
    rework = replace(ProbeConfig().probe_rework, advantage="grpo", per_device_train_batch_size=8)
    assert found == ProbeConfig(batch_config=sizes, generation=generation, probe_rework=rework)
    assert sources.flags == ()
    assert sources.unknown == ()
    assert sources.overruled == {}


OPTIONS = {
    "loss_type": ("cispo", "probe_rework.loss", "cispo"),
    "scale_rewards": ("batch", "probe_rework.advantage", "batch"),
    "beta": (0.04, "probe_rework.kl_coef", 0.04),
    "epsilon": (0.1, "probe_rework.clip_range", 0.1),
    "epsilon_high": (0.28, "probe_rework.clip_range_high", 0.28),
    "delta": (1.5, "probe_rework.delta", 1.5),
    "entropy_coef": (0.01, "probe_rework.entropy_coef", 0.01),
    "importance_sampling_level": ("sequence", "probe_rework.importance_sampling_level", "sequence"),
    "use_bias_correction_kl": (False, "probe_rework.use_bias_correction_kl", False),
    "mask_truncated_completions": (True, "probe_rework.mask_truncated_completions", True),
    "top_entropy_quantile": (0.2, "probe_rework.top_entropy_quantile", 0.2),
    "sapo_temperature_pos": (0.9, "probe_rework.sapo_temperature_pos", 0.9),
    "sapo_temperature_neg": (1.1, "probe_rework.sapo_temperature_neg", 1.1),
    "vespo_k_pos": (1.5, "probe_rework.vespo_k_pos", 1.5),
    "vespo_lambda_pos": (1.6, "probe_rework.vespo_lambda_pos", 1.6),
    "vespo_k_neg": (1.7, "probe_rework.vespo_k_neg", 1.7),
    "vespo_lambda_neg": (1.8, "probe_rework.vespo_lambda_neg", 1.8),
    "off_policy_mask_threshold": (0.5, "probe_rework.off_policy_mask_threshold", 0.5),
    "vllm_importance_sampling_correction": (False, "probe_rework.vllm_importance_sampling_correction", False),
    "vllm_importance_sampling_mode": (
        "token_mask",
        "probe_rework.vllm_importance_sampling_mode",
        "token_mask",
    ),
    "vllm_importance_sampling_clip_min": (0.5, "probe_rework.vllm_importance_sampling_clip_min", 0.5),
    "vllm_importance_sampling_clip_max": (2.0, "probe_rework.vllm_importance_sampling_clip_max", 2.0),
    "per_device_train_batch_size": (16, "probe_rework.per_device_train_batch_size", 16),
    "router_aux_loss_coef": (0.01, "probe_rework.router_aux_loss_coef", 0.01),
    "reward_weights": ([1.0, 0.5], "batch_config.reward_weights", [1.0, 0.5]),
    "multi_objective_aggregation": (
        "normalize_then_sum",
        "probe_rework.multi_objective_aggregation",
        "normalize_then_sum",
    ),
    "max_grad_norm": (0.2, "probe_rework.max_grad_norm", 0.2),
    "temperature": (0.7, "generation.temperature", 0.7),
    "max_completion_length": (99, "generation.max_new_tokens", 99),
    "num_generations": (4, "batch_config.G", 4),
    "chat_template_kwargs": (
        {"enable_thinking": False},
        "batch_config.chat_template_kwargs",
        {"enable_thinking": False},
    ),
    "top_p": (0.9, "generation.top_p", 0.9),
    "top_k": (20, "generation.top_k", 20),
    "min_p": (0.1, "generation.min_p", 0.1),
}


def test_every_option_that_is_read_is_tested():
    assert OPTIONS.keys() == READ.keys()
    assert {name: key for name, (_, key, _) in OPTIONS.items()} == {n: r.key for n, r in READ.items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_real_files_value_is_the_probes(tmp_path, name):
    value, key, expected = OPTIONS[name]
    section, leaf = key.split(".")
    config = ProbeConfig()
    config = replace(config, generation=replace(config.generation, allow_truncated_support=True))
    found, sources = filled(saved(tmp_path, grpo_args(**{name: value})), config)
    assert getattr(getattr(found, section), leaf) == expected != getattr(getattr(config, section), leaf)
    assert sources.filled[key] == expected


@pytest.mark.parametrize(
    ("options", "key", "expected"),
    [
        ({"max_grad_norm": 0.0}, "probe_rework.max_grad_norm", None),
        ({"scale_rewards": False}, "probe_rework.advantage", "dr_grpo"),
        ({"scale_rewards": True}, "probe_rework.advantage", "grpo"),
        ({"top_k": -1}, "generation.top_k", 0),
        ({"generation_kwargs": {"stop_strings": "</a>"}}, "generation.stop_strings", ["</a>"]),
        ({"generation_kwargs": {"max_new_tokens": 7}}, "generation.max_new_tokens", 7),
        ({"generation_kwargs": {"top_p": 1.0, "typical_p": 1.0}, "top_p": 0.9}, "generation.top_p", 1.0),
        ({"loss_type": "dr_grpo"}, "probe_rework.advantage", "grpo"),
    ],
)
def test_other_spellings(tmp_path, options, key, expected):
    assert filled(saved(tmp_path, grpo_args(**options)))[1].checkpoint[key] == expected


@pytest.mark.parametrize(
    ("options", "prompts"),
    [
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}, 4),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_generations": 2}, 8),
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_generation": 4}, 2),
        (
            {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "generation_batch_size": 32},
            1,
        ),
    ],
)
def test_prompts_per_update(tmp_path, options, prompts):
    found, _ = filled(saved(tmp_path, grpo_args(**options)))
    assert prompts == found.batch_config.B_U


def test_prompts_of_all_processes(tmp_path):
    args = grpo_args(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    args.generation_batch_size *= 8  # as eight processes have it
    assert filled(saved(tmp_path, args))[0].batch_config.B_U == 8
    del args.generation_batch_size  # earlier versions have none
    args.distributed_state.num_processes = 4
    try:
        assert filled(saved(tmp_path, args))[0].batch_config.B_U == 4
    finally:
        args.distributed_state.num_processes = 1


def test_what_earlier_versions_did_without_an_option(tmp_path):
    args = grpo_args()
    del args.use_bias_correction_kl, args.loss_type
    found, _ = filled(saved(tmp_path, args))
    assert found.probe_rework.use_bias_correction_kl is False
    assert found.probe_rework.loss == "grpo"


def test_options_of_other_versions_are_named(tmp_path):
    args = grpo_args()
    args.brand_new = 3
    args.generation_kwargs = {"seed": 1, "brand_new_too": 4, "max_tokens": args.max_completion_length}
    assert filled(saved(tmp_path, args))[1].unknown == ("brand_new", "generation_kwargs.brand_new_too")


@pytest.mark.parametrize(
    ("removed", "changed", "mode", "cap"),
    [
        ((), {}, "sequence_mask", 3.0),
        (("mode", "clip_max", "clip_min"), {"cap": 2.0}, "token_truncate", 2.0),
        (("clip_max", "clip_min"), {"cap": 2.5}, "sequence_mask", 2.5),
    ],
)
def test_the_samplers_correction_of_earlier_versions(tmp_path, removed, changed, mode, cap):
    args = grpo_args()
    for name in removed:
        delattr(args, f"vllm_importance_sampling_{name}")
    for name, value in changed.items():
        setattr(args, f"vllm_importance_sampling_{name}", value)
    rework = filled(saved(tmp_path, args))[0].probe_rework
    assert rework.vllm_importance_sampling_mode == mode
    assert rework.vllm_importance_sampling_clip_max == cap


@pytest.mark.parametrize("make", [TrainingArguments, SFTConfig])
def test_of_other_trainers_only_what_is_common_is_read(tmp_path, make):
    with quiet_libraries():
        args = make(output_dir="o", max_grad_norm=0.3, **CPU)
    found, sources = filled(saved(tmp_path, args))
    assert sources.checkpoint == {"probe_rework.max_grad_norm": 0.3}
    assert found.probe_rework == replace(ProbeConfig().probe_rework, max_grad_norm=0.3)
    assert f"({make.__name__}): not of TRL's GRPO" in sources.note


def test_nothing_that_the_file_names_is_imported(tmp_path):
    file = saved(tmp_path, grpo_args(beta=0.5))
    code = (
        "import sys; from pathlib import Path\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] == 'trl': raise ImportError('trl is not installed')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from probe.loading.training_args import read_training_args\n"
        "args = read_training_args(Path(sys.argv[1]))\n"
        "assert args.is_grpo and args.values['beta'] == 0.5 and args.values['optim'] == 'adamw_torch_fused'\n"
        "assert 'trl' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(file)], check=True)


@pytest.mark.parametrize(
    "options",
    [
        {"model_init_kwargs": {"dtype": torch.bfloat16}},
        {"model_init_kwargs": {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}},
        {"output_dir": Path("output")},
        {"parallelism_config": ParallelismConfig()},
        {"fsdp": "full_shard", "fsdp_config": {"min_num_params": 1}},
        {"debug": "underflow_overflow"},
        {"accelerator_config": {"split_batches": True}},
        {
            "eval_strategy": "steps",
            "eval_steps": 5,
            "lr_scheduler_type": "cosine",
            "hub_strategy": "checkpoint",
        },
    ],
    ids=lambda options: next(iter(options)),
)
def test_whatever_else_stands_in_a_real_file(tmp_path, options):
    assert filled(saved(tmp_path, grpo_args(**options)))[1].unknown == ()


def test_enums_by_their_name(tmp_path):
    """As Python 3.11.0 to 3.11.3 wrote them."""
    args = grpo_args()
    args.save_strategy = Reduced(getattr, type(args.save_strategy), "EPOCH")
    assert read_training_args(saved(tmp_path, args)).values["save_strategy"] == "epoch"


# ---------------------------------------------------------------- what counts


def test_the_configuration_counts_before_the_file(tmp_path):
    file = saved(tmp_path, grpo_args(loss_type="cispo", beta=0.1))
    resolved = parse_config(
        {"probe_rework": {"loss": "dapo"}, "generation": {"temperature": 1.0}}, TrainerSection
    )
    found, sources = fill_settings(resolved.probe, resolved.given, file)
    assert (found.probe_rework.loss, found.probe_rework.kl_coef) == ("dapo", 0.1)
    assert sources.configuration == {"probe_rework.loss": "dapo", "generation.temperature": 1.0}
    assert sources.overruled == {"probe_rework.loss": "cispo"}
    assert {*sources.checkpoint} | {*sources.configuration} | {*sources.default} <= set(KEYS)


def test_off_leaves_the_file_unread(tmp_path):
    (tmp_path / "training_args.bin").write_bytes(b"nonsense")
    config = parse_config({"probe_rework": {"from_checkpoint": "off"}}, TrainerSection).probe
    found, sources = filled(tmp_path / "training_args.bin", config)
    assert found == config
    assert "from_checkpoint: off" in sources.note
    assert sources.checkpoint == {}


@pytest.mark.parametrize("word", ["off", "'off'", "false"])
def test_off_needs_no_quotes_in_yaml(tmp_path, word, monkeypatch):
    file = tmp_path / "my.yaml"
    file.write_text(
        f"probe_rework:\n  from_checkpoint: {word}\n  curvature: {word}\n  control_variates: on\n"
    )
    resolved = OfflineEntropyProbe.from_config_file(file)._resolved
    assert resolved.probe.probe_rework.from_checkpoint == "off"
    seen = []
    monkeypatch.setattr(ProbeRunner, "run", lambda self, module, *_: seen.append(module))
    main(["run", "--config", str(file), "--probe_rework.loss", "grpo"])
    (module,) = seen
    rework = module.config.probe_rework
    assert (rework.from_checkpoint, rework.curvature, rework.control_variates) == ("off", "off", "on")


def test_the_command_line_knows_what_is_given(tmp_path, monkeypatch):
    file = tmp_path / "my.yaml"
    file.write_text("probe_rework:\n  delta: null\ngeneration:\n  temperature: 1.0\n")
    seen = []
    monkeypatch.setattr(ProbeRunner, "run", lambda self, module, *_: seen.append(module.given))
    assert main(["run", "--config", str(file), "--batch_config.B_U=16", "--probe_rework.loss", "dapo"]) == 0
    assert seen.pop() == {
        "probe_rework.delta",
        "generation.temperature",
        "batch_config.B_U",
        "probe_rework.loss",
    }
    assert main(["demo", "--batch_config.B_E", "64"]) == 0
    assert {"batch_config.B_E", "batch_config.B_U", "probe_rework.loss"} <= seen.pop()


def test_without_a_record_what_is_not_default_counts_as_given():
    config = ProbeConfig()
    assert changed_keys(config) == frozenset()
    changed = replace(config, probe_rework=replace(config.probe_rework, loss="grpo"))
    assert changed_keys(changed) == {"probe_rework.loss"}


def test_a_given_key_makes_up_for_a_value_that_cannot_be_used(tmp_path):
    file = saved(tmp_path, grpo_args(top_p=0.9))
    with pytest.raises(CheckpointError, match=r"generation.top_p: expected 1.0 .* or give that key .* off"):
        filled(file)
    assert filled(file, given={"generation.top_p"})[0].generation.top_p == 1.0
    args = grpo_args()
    args.loss_type = "brand_new"
    with pytest.raises(CheckpointError, match=r"loss_type: expected one of grpo.*give probe_rework.loss"):
        filled(saved(tmp_path, args))
    assert filled(file, given={"generation.top_p", "probe_rework.loss"})[0].probe_rework.loss == "dapo"


def test_sizes_and_sampling_of_u_do_not_apply_to_rollouts_from_a_file(tmp_path):
    file = saved(tmp_path, grpo_args(top_p=0.9, repetition_penalty=1.1, temperature=0.7, num_generations=4))
    config = ProbeConfig(batch_config=replace(ProbeConfig().batch_config, U_rollouts="u.parquet"))
    found, sources = filled(file, config)
    assert found.batch_config == config.batch_config
    assert (found.generation.top_p, found.generation.temperature) == (1.0, 0.7)
    assert "batch_config.G" not in sources.as_mapping()["default"]


# ---------------------------------------------------------------- what is not supported

FILE = {"U_rollouts": "u.parquet"}


@pytest.mark.parametrize(
    ("options", "named", "remedy"),
    [
        ({"optim": "schedule_free_adamw"}, "optim = 'schedule_free_adamw'", "checkpoint.optimizer"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha = 5.0", None),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy = True", "probe_rework.entropy_coef"),
        ({"sync_ref_model": True, "beta": 0.1}, "sync_ref_model = True", "probe_rework.kl_coef"),
        ({"vllm_structured_outputs_regex": "a+"}, "vllm_structured_outputs_regex = 'a+'", None),
        ({"repetition_penalty": 1.1}, "repetition_penalty = 1.1", None),
        ({"generation_kwargs": {"no_repeat_ngram_size": 3}}, "no_repeat_ngram_size = 3", None),
        ({"generation_kwargs": {"temperature": 0.5}}, "temperature = 0.5", None),
        ({"generation_kwargs": {"max_tokens": 64}}, "max_tokens = 64", None),
        ({"generation_kwargs": {"stop_token_ids": [5]}}, "stop_token_ids = [5]", None),
        ({"generation_kwargs": {"ignore_eos": True}}, "ignore_eos = True", None),
        (
            {"generation_kwargs": {"max_new_tokens": 7}, "loss_type": "dr_grpo"},
            "max_new_tokens = 7, where dr_grpo divides by 512",
            None,
        ),
    ],
)
def test_an_option_that_is_not_supported_is_named(tmp_path, options, named, remedy):
    file = saved(tmp_path, grpo_args(**options))
    with pytest.raises(CheckpointError) as caught:
        filled(file)
    message = str(caught.value)
    assert named in message
    assert str(file) in message
    assert "from_checkpoint: off" in message
    assert "\n" not in message
    if remedy is not None:
        assert f"give {remedy} in the configuration" in message
        filled(file, given={remedy})


def test_a_damaged_state_of_an_adapted_bonus_is_refused(tmp_path):
    file = saved(tmp_path, grpo_args(use_adaptive_entropy=True, entropy_target=0.5))
    state = tmp_path / "entropy_ctrl_state.json"
    for entropy, expected in ((0.4, 0.2), (0.6, 0.0), (math.inf, 0.0)):
        state.write_text(json.dumps({"entropy_coef": 0.2, "last_world_entropy": entropy}))
        assert filled(file)[0].probe_rework.entropy_coef == expected
    state.write_text(json.dumps({"entropy_coef": "much"}))
    with pytest.raises(
        CheckpointError, match="expected numbers entropy_coef and last_world_entropy, found 'much'"
    ):
        filled(file)


def test_a_reference_that_moves_does_not_matter_without_a_penalty(tmp_path):
    filled(saved(tmp_path, grpo_args(sync_ref_model=True)))


@pytest.mark.parametrize(
    ("options", "batch", "flags"),
    [
        ({"num_iterations": 2}, {}, ("rollouts_of_several_updates",)),
        ({"steps_per_generation": 4}, {}, ("rollouts_of_several_updates",)),
        ({"num_iterations": 2}, FILE, ("order_of_rows",)),
        ({"steps_per_generation": 4}, FILE, ("order_of_rows",)),
        ({"gradient_accumulation_steps": 4, "loss_type": "bnpo"}, {}, ()),
        ({"gradient_accumulation_steps": 4, "loss_type": "bnpo"}, FILE, ("order_of_rows",)),
        ({"gradient_accumulation_steps": 4, "entropy_coef": 0.1}, FILE, ("order_of_rows",)),
        ({"gradient_accumulation_steps": 4, "loss_type": "grpo"}, FILE, ()),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 1}, {}, ("means_of_microbatches",)),
        ({"top_entropy_quantile": 0.5}, {}, ()),
        ({"reward_weights": [1.0, 0.5]}, {}, ()),
    ],
)
def test_what_may_matter_marks_the_result(tmp_path, options, batch, flags):
    config = ProbeConfig(batch_config=replace(ProbeConfig().batch_config, **batch))
    assert filled(saved(tmp_path, grpo_args(**options)), config)[1].flags == flags


# ---------------------------------------------------------------- hostile and damaged files


class Hostile(Reduced):
    def __init__(self, path):
        super().__init__(os.system, f"touch {path}")


class Nested:
    def __init__(self, path):
        self.output_dir = Hostile(path)


class Colour(enum.Enum):
    RED = "red"


@pytest.mark.parametrize("make", [Hostile, Nested])
def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path, make):
    file = saved(tmp_path, make(tmp_path / "ran"))
    with pytest.raises(CheckpointError, match=r"(system|Nested|Hostile), which is not among") as caught:
        read_training_args(file)
    assert "\n" not in str(caught.value)
    assert "from_checkpoint: off" in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_hostile_code_inside_real_arguments_runs_nothing(tmp_path):
    args = grpo_args()
    args.run_name = Hostile(tmp_path / "ran")
    file = saved(tmp_path, args)
    with pytest.raises(CheckpointError, match="which is not among the classes"):
        filled(file)
    assert not (tmp_path / "ran").exists()


class OwnConfig(GRPOConfig):
    """A user's arguments, from a script that is not there when the checkpoint is probed."""


class Lookalike:
    """Has two of GRPO's options, and is something else."""

    def __init__(self) -> None:
        self.loss_type, self.beta = "dr_grpo", 0.3


def test_a_class_of_the_users_is_read_as_the_one_it_is_derived_from(tmp_path):
    with quiet_libraries():
        own = OwnConfig(output_dir="output", **CPU, loss_type="dr_grpo", beta=0.3, epsilon=0.1)
    own.bonus_of_mine = 0.5
    file = saved(tmp_path, own)
    args = read_training_args(file)
    assert (args.kind, args.is_grpo, args.derived) == ("OwnConfig", True, True)
    config, sources = filled(file)
    rework = config.probe_rework
    assert (rework.loss, rework.kl_coef, rework.clip_range) == ("dr_grpo", 0.3, 0.1)
    assert "(OwnConfig): an unknown class with the options of TRL's GRPOConfig" in sources.note
    assert sources.unknown == ("bonus_of_mine",)
    assert not read_training_args(saved(tmp_path, grpo_args())).derived


def test_a_class_of_the_users_is_not_run(tmp_path):
    """Neither looked up under its name, nor with what else the file names."""
    file = saved(tmp_path, OwnConfig(output_dir="output", **CPU))
    code = (
        "import sys; from pathlib import Path; from probe.loading.training_args import read_training_args; "
        f"print(read_training_args(Path({str(file)!r})).kind, "
        "'tests.from_checkpoint.test_from_checkpoint' in sys.modules, 'trl' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["OwnConfig", "False", "False"]
    own = OwnConfig(output_dir="output", **CPU)
    own.run_name = Hostile(tmp_path / "ran")
    with pytest.raises(CheckpointError, match="system, which is not among"):
        read_training_args(saved(tmp_path, own))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("make", [Lookalike, lambda: [OwnConfig(output_dir="output", **CPU)]])
def test_other_unknown_objects_are_refused(tmp_path, make):
    with pytest.raises(CheckpointError, match=r"(Lookalike|OwnConfig), which is not among"):
        read_training_args(saved(tmp_path, make()))


@pytest.mark.parametrize("name", ["upper", "__class__", "format"])
def test_getattr_is_for_members_of_enums_only(tmp_path, name):
    args = grpo_args()
    args.run_name = Reduced(getattr, "a text", name)
    with pytest.raises(CheckpointError, match="expected the member of an enum"):
        filled(saved(tmp_path, args))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"beta": 0.1}, "found an object of dict"),
        ([1, 2], "found an object of list"),
        (Colour.RED, "Colour, which is not among"),
    ],
)
def test_what_is_no_training_arguments(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        read_training_args(saved(tmp_path, content))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_file_that_is_cut_off(tmp_path, share):
    file = saved(tmp_path, grpo_args())
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        CheckpointError, match=r"training_args.bin: expected .* found one that cannot be read"
    ):
        filled(file)


def test_a_plain_pickle_and_values_without_end(tmp_path):
    (tmp_path / "training_args.bin").write_bytes(pickle.dumps(Hostile(tmp_path / "ran"), protocol=2))
    with pytest.raises(CheckpointError, match="system, which is not among"):
        filled(tmp_path / "training_args.bin")
    assert not (tmp_path / "ran").exists()
    args = grpo_args()
    args.report_to = []
    args.report_to.append(args.report_to)
    with pytest.raises(CheckpointError, match="without end"):
        filled(saved(tmp_path, args))
    args.report_to = []
    for _ in range(60):
        args.report_to = [args.report_to, args.report_to]
    with pytest.raises(CheckpointError, match="without end"):
        filled(saved(tmp_path, args))


def test_a_folder_or_a_link_to_nowhere_is_no_file(tmp_path, base):
    folder, *_ = lora_checkpoint(tmp_path / "step_1", base)
    (folder / "training_args.bin").symlink_to(tmp_path / "nowhere")
    assert locate_checkpoint(CheckpointConfig(checkpoint_path=str(folder))).training_args_file is None


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, base):
    """A flat `checkpoint-N` without training arguments."""
    return lora_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint-60", base, layout="flat")[0]


@pytest.fixture
def config(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{i} apples", "answer": "{i}"}}\n' for i in range(20)))
    here = tmp_path / "run" / "checkpoint-60"
    shutil.copytree(checkpoint, here)
    return {
        "checkpoint": {"checkpoint_path": str(here)},
        "batch_config": {
            "dataset_name": str(prompts),
            "split": "train",
            "reward": "tests.from_checkpoint.test_from_checkpoint:digits",
            "B_E": 8,
        },
        "generation": {"batch_size": 64},
        "memory_config": {"microbatch_size": 8},
        "probe_rework": {"update_spread": False, "curvature": "off"},
        "detailed_logging": {"enabled": False},
        "trainer": {"accelerator": "cpu", "logger": False},
    }


SMALL = {
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 6,
}


def test_a_run_makes_the_update_of_the_training(config, tmp_path, capsys):
    saved(tmp_path / "run" / "checkpoint-60", grpo_args(loss_type="dr_grpo", temperature=0.9, **SMALL))
    probe = OfflineEntropyProbe(config)
    results = probe.run_mixed_probe()
    assert (results["B_U"], results["G"]) == (2, 4)
    settings = results["settings"]
    assert settings["checkpoint"]["probe_rework.loss"] == "dr_grpo"
    assert settings["default"] == {"generation.stop_strings": []}
    assert settings["configuration"] == {}
    saved_config = probe.result.config
    assert saved_config["probe_rework"]["loss"] == "dr_grpo"
    assert saved_config["generation"]["temperature"] == 0.9
    assert saved_config["batch_config"]["B_U"] == 2
    assert "Settings of the update" in capsys.readouterr().out
    again = OfflineEntropyProbe(dict(saved_config)).run_mixed_probe()
    assert again["deltaH1"] == results["deltaH1"]
    assert again["settings"]["checkpoint"] == {}
    by_hand = {
        **config,
        "batch_config": {**config["batch_config"], "B_U": 2, "G": 4},
        "generation": {**config["generation"], "temperature": 0.9, "max_new_tokens": 6},
        "probe_rework": {
            **config["probe_rework"],
            "loss": "dr_grpo",
            "advantage": "grpo",
            "from_checkpoint": "off",
        },
    }
    assert OfflineEntropyProbe(by_hand).run_mixed_probe()["deltaH1"] == results["deltaH1"]


def test_a_hostile_file_is_one_line_on_the_command_line(config, tmp_path, capsys):
    args = grpo_args()
    args.run_name = Hostile(tmp_path / "ran")
    saved(tmp_path / "run" / "checkpoint-60", args)
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    assert main(["run", "--config", "my.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("entropy-probe: error: ")
    assert "system, which is not among" in lines[0]
    assert not (tmp_path / "ran").exists()
    off = ("--probe_rework.from_checkpoint", "off", "--batch_config.B_U=2", "--generation.max_new_tokens=6")
    assert main(["run", "--config", "my.yaml", *off]) == 0


def test_a_penalty_without_a_reference_is_said_before_loading(config, base, tmp_path):
    model = load_base(base)
    optimizer = adamw(model)
    take_steps(model, optimizer)
    folder = save_checkpoint(tmp_path / "full" / "checkpoint-3", model, optimizer, layout="flat")
    saved(folder, grpo_args(beta=0.1, **SMALL))
    config["checkpoint"] = {"checkpoint_path": str(folder)}
    with pytest.raises(
        CheckpointError, match=r"training_args.bin: probe_rework.kl_coef: expected 0 for a full"
    ):
        OfflineEntropyProbe(config).run_mixed_probe()
    config["probe_rework"]["kl_coef"] = 0.0
    results = OfflineEntropyProbe(config).run_mixed_probe()
    assert results["settings"]["overruled"] == {"probe_rework.kl_coef": 0.1}
    config["probe_rework"]["kl_coef"] = 0.2
    with pytest.raises(ConfigError, match=r"^probe_rework.kl_coef: expected 0 for a full model"):
        OfflineEntropyProbe(config).run_mixed_probe()


def test_weights_of_other_rewards_are_refused_before_loading(config, tmp_path):
    saved(tmp_path / "run" / "checkpoint-60", grpo_args(reward_weights=[1.0, 0.5], **SMALL))
    with pytest.raises(
        CheckpointError, match=r"reward_weights: expected one for each of 1 rewards, found 2; give"
    ):
        OfflineEntropyProbe(config).run_mixed_probe()
    config["batch_config"]["reward_weights"] = None
    assert OfflineEntropyProbe(config).run_mixed_probe()["B_U"] == 2


def test_the_folder_around_a_checkpoint(config, tmp_path):
    around = saved(tmp_path / "run", grpo_args(beta=0.1))
    own = CheckpointConfig(checkpoint_path=config["checkpoint"]["checkpoint_path"])
    assert locate_checkpoint(own).training_args_file == around
    (tmp_path / "latest").symlink_to(own.checkpoint_path)
    assert (
        locate_checkpoint(CheckpointConfig(checkpoint_path=str(tmp_path / "latest"))).training_args_file
        == around
    )
    nearer = saved(Path(own.checkpoint_path), grpo_args(beta=0.2))
    assert locate_checkpoint(own).training_args_file == nearer
    shutil.move(own.checkpoint_path, tmp_path / "run" / "final")
    (tmp_path / "run" / "final" / "training_args.bin").unlink()
    other = CheckpointConfig(checkpoint_path=str(tmp_path / "run" / "final"))
    assert locate_checkpoint(other).training_args_file is None


@pytest.mark.parametrize("level", ["minimal", "detailed"])
def test_the_logs_have_the_sources(config, tmp_path, level):
    saved(tmp_path / "run" / "checkpoint-60", grpo_args(beta=0.1, **SMALL))
    config["detailed_logging"] = {
        "enabled": True,
        "level": level,
        "output_directory": "logs",
        "compress": False,
    }
    results = OfflineEntropyProbe(config).run_mixed_probe()
    (summary,) = (tmp_path / "logs").glob("*/*_summary.json")
    (written,) = (tmp_path / "logs").glob("*/*_config.yaml")
    (main_log,) = (tmp_path / "logs").glob("*/*60.json")
    named = {key: value for key, value in results["settings"].items() if key != "default"}
    assert load_log(summary)["results"]["settings"] == named
    assert load_log(main_log)["results"]["settings"]["checkpoint"]["probe_rework.kl_coef"] == 0.1
    assert yaml.safe_load(written.read_text())["probe_rework"]["kl_coef"] == 0.1
    if level == "minimal":
        assert main_log.stat().st_size < 4_400  # some 2 KB, and what the file has said


@pytest.mark.parametrize("advantages", [True, False])
def test_advantages_of_a_rollout_file_count_before_those_of_its_rewards(config, tmp_path, advantages):
    options = {
        "scale_rewards": "batch",
        "reward_weights": [2.0],
        "multi_objective_aggregation": "normalize_then_sum",
    }
    saved(tmp_path / "run" / "checkpoint-60", grpo_args(**options, **SMALL))
    rows = [
        {
            "prompt": f"{i // 2} apples",
            "completion": "12" * (1 + i % 2),
            "reward": float(i),
            "advantage": float(i - 3),
        }
        for i in range(8)
    ]
    (tmp_path / "u.jsonl").write_text(
        "".join(
            json.dumps({k: v for k, v in row.items() if advantages or k != "advantage"}) + "\n"
            for row in rows
        )
    )
    config["batch_config"]["U_rollouts"] = "u.jsonl"
    probe = OfflineEntropyProbe(config)
    results = probe.run_mixed_probe()
    flagged = "reward_weights" in results["diagnostics"]["bias_flags"]
    used = probe.result.config["probe_rework"]["advantage"]
    assert (flagged, used) == ((False, "auto") if advantages else (True, "batch"))
    assert ("probe_rework.advantage" in results["settings"]["checkpoint"]) is not advantages
    assert ("probe_rework.advantage" in results["settings"]["default"]) is advantages
    again = OfflineEntropyProbe(dict(probe.result.config)).run_mixed_probe()
    assert again["deltaH1"] == results["deltaH1"]
    by_hand = dict(config, probe_rework={**config["probe_rework"], "advantage": used})
    assert OfflineEntropyProbe(by_hand).run_mixed_probe()["deltaH1"] == results["deltaH1"]


def test_the_report_says_where_settings_come_from(config, tmp_path):
    saved(tmp_path / "run" / "checkpoint-60", grpo_args(loss_type="cispo", num_iterations=2, **SMALL))
    config["probe_rework"]["loss"] = "grpo"
    probe = OfflineEntropyProbe(config)
    results = probe.run_mixed_probe()
    assert "rollouts_of_several_updates" in results["diagnostics"]["bias_flags"]
    assert any("num_iterations" in reason for reason in results["verdict_reasons"])
    text = " ".join(report(probe.result).split())
    assert "training_args.bin (GRPOConfig)" in "".join(text.split()).replace("(GRPO", " (GRPO")
    assert f"checkpoint {len(results['settings']['checkpoint'])} advantage grpo" in text
    assert "vllm" not in text
    assert "the configuration counts; trained with loss cispo" in text
    assert "configuration 1 loss grpo" in text


def test_without_a_file_the_report_says_so(config):
    probe = OfflineEntropyProbe(
        {
            **config,
            "batch_config": {**config["batch_config"], "B_U": 2, "G": 4},
            "generation": {"max_new_tokens": 6},
        }
    )
    results = probe.run_mixed_probe()
    assert results["settings"]["note"] == "no training_args.bin beside the checkpoint"
    assert results["settings"]["checkpoint"] == {}
    assert results["settings"]["default"]["probe_rework.loss"] == "dapo"
    assert "no training_args.bin beside the checkpoint" in report(probe.result)


def test_a_sweep_over_checkpoints_with_different_files(config, tmp_path):
    first = tmp_path / "run" / "checkpoint-60"
    for name, options in (
        ("checkpoint-61", {"loss_type": "grpo", **SMALL}),
        ("checkpoint-62", {"loss_type": "dr_grpo", **SMALL, "gradient_accumulation_steps": 1}),
        ("checkpoint-63", {"neftune_noise_alpha": 1.0, **SMALL}),
    ):
        shutil.copytree(first, tmp_path / "run" / name)
        saved(tmp_path / "run" / name, grpo_args(**options))
    shutil.rmtree(first)
    del config["checkpoint"]
    options = {"checkpoints": str(tmp_path / "run"), "output_folder": str(tmp_path / "sweep")}
    table = run_sweep(config, **options, seeds=[1, 2])
    by_name = dict(iter(table.groupby("checkpoint_name")))
    assert list(by_name["checkpoint-61"]["B_U"]) == [2, 2]
    assert list(by_name["checkpoint-62"]["B_U"]) == [1, 1]
    failed = table[table["status"] == "failed"]
    assert len(failed) == 2
    assert all("neftune_noise_alpha" in error for error in failed["error"])
    swept = run_sweep(
        config,
        checkpoints=[str(tmp_path / "run" / "checkpoint-61")],
        B_U=[3],
        output_folder=str(tmp_path / "b"),
    )
    assert list(swept["B_U"]) == [3]


def test_the_grid_has_the_sizes_that_count(config, tmp_path):
    saved(tmp_path / "run" / "checkpoint-60", grpo_args(**SMALL))
    resolved = parse_config({**config, "batch_config": {**config["batch_config"], "G": 8}}, TrainerSection)
    grid = build_grid(SweepConfig(), resolved.probe, 1, resolved.given)
    assert {(point.B_U, point.G) for point in grid.points} == {(2, 8)}
    grid = build_grid(SweepConfig(B_U=[1, 5]), resolved.probe, 1, resolved.given)
    assert grid.axes["B_U"] == [1, 5]
    off = replace(resolved.probe, probe_rework=replace(resolved.probe.probe_rework, from_checkpoint="off"))
    assert build_grid(SweepConfig(), off, 1, resolved.given).axes["B_U"] == [16]


def test_what_is_given_belongs_to_a_sweep(config, tmp_path):
    saved(tmp_path / "run" / "checkpoint-60", grpo_args(**SMALL))
    folder = str(tmp_path / "sweep")
    run_sweep(config, eta_factors=[1], output_folder=folder)
    given = {**config, "probe_rework": {**config["probe_rework"], "delta": None}}
    with pytest.raises(ConfigError, match=r"given explicitly.probe_rework.delta is None there and True here"):
        run_sweep(given, eta_factors=[1], output_folder=folder)


def test_a_checkpoint_of_trls_own_trainer(config, base, tmp_path):
    """The probe's settings of a checkpoint as `GRPOTrainer` writes it, at once and after the training."""
    with quiet_libraries():
        from trl import GRPOTrainer

        args = grpo_args(
            output_dir=str(tmp_path / "trl"), beta=0.02, max_steps=1, save_steps=1, optim="adamw_torch",
            gradient_checkpointing=False, **SMALL,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=add_lora(load_base(base)),
            reward_funcs=digits,
            args=args,
            train_dataset=Dataset.from_list([{"prompt": f"{i} apples"} for i in range(8)]),
            processing_class=char_tokenizer(),
        )
        trainer.train()
        trainer.save_model()
    assert (tmp_path / "trl" / "training_args.bin").is_file()
    config["checkpoint"] = {"checkpoint_path": str(tmp_path / "trl" / "checkpoint-1")}
    config["probe_rework"]["learning_rate"] = 1e-3
    results = OfflineEntropyProbe(config).run_mixed_probe()
    assert (results["B_U"], results["G"]) == (2, 4)
    assert results["settings"]["checkpoint"]["probe_rework.kl_coef"] == 0.02
    assert results["settings"]["unknown"] == []


@pytest.mark.parametrize("option", ["epsilon", "beta", "temperature", "gradient_accumulation_steps"])
def test_numbers_beyond_floating_point_are_one_line(tmp_path, option):
    args = grpo_args()
    setattr(args, option, 10**400)
    with pytest.raises(
        CheckpointError, match=rf"{option}.* found .*from_checkpoint: off|{option} = 1000"
    ) as caught:
        filled(saved(tmp_path, args))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600

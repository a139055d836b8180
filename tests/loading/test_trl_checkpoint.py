"""A checkpoint of TRL's trainer and what was recorded of its rollouts: the probe takes the very step that came next."""

from __future__ import annotations

import json
import warnings

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from probe import OfflineEntropyProbe, RolloutRecorderCallback
from probe.loading import quiet_libraries
from tests.support.helpers import char_tokenizer
from tests.support.tiny_models import add_lora, load_base, save_base

RUNS = {
    "the defaults": {},
    "off policy, accumulated": {
        "num_iterations": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
    },
    "penalty, bonus, clipping": {
        "beta": 0.1,
        "entropy_coef": 0.05,
        "max_grad_norm": 0.05,
        "loss_type": "bnpo",
        "weight_decay": 0.1,
        "temperature": 0.8,
    },
    "adaptive bonus, below its target": {
        "use_adaptive_entropy": True,
        "entropy_target": 10.0,
        "entropy_coef_delta": 0.05,
        "loss_type": "grpo",
    },
    "adaptive bonus, above its target": {
        "use_adaptive_entropy": True,
        "entropy_coef": 0.3,
        "entropy_target": 0.01,
    },
    "rewards by batch, cosine schedule": {"scale_rewards": "batch", "lr_scheduler_type": "cosine"},
    "the whole model": {"full": True},
}


def lengths(completions, **_):
    return [float(sum(map(ord, c)) % 7) for c in completions]


@pytest.mark.parametrize("name", RUNS)
def test_the_step_is_the_one_that_came_next(name, tmp_path):
    """Settings, optimizer state, learning rate and rows all come from files that the training wrote."""
    options = dict(RUNS[name])
    base = save_base(tmp_path / "base")
    full = options.pop("full", False)
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_base(base) if full else add_lora(load_base(base), lora_dropout=0.0)
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=lengths,
            args=GRPOConfig(
                output_dir=str(tmp_path / "run"),
                **{
                    "per_device_train_batch_size": 8,
                    "num_generations": 4,
                    "max_completion_length": 6,
                    "max_steps": 4,
                    "save_steps": 1,
                    "learning_rate": 1e-3,
                    "report_to": [],
                    "use_cpu": True,
                    "disable_tqdm": True,
                    "bf16": False,
                    "gradient_checkpointing": False,
                    **options,
                },
            ),
            train_dataset=Dataset.from_list([{"prompt": f"{k}+1="} for k in range(8)]),
            processing_class=char_tokenizer(),
        )
        trainer.add_callback(RolloutRecorderCallback(trainer, tmp_path / "rollouts"))
        trainer.train()
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{k}+2="}) + "\n" for k in range(8))
    )
    for step in (1, 2, 3):
        probe = OfflineEntropyProbe(
            {
                "checkpoint": {"checkpoint_path": str(tmp_path / "run" / f"checkpoint-{step}")},
                "batch_config": {
                    "dataset_name": str(tmp_path / "prompts.jsonl"),
                    "split": "train",
                    "B_E": 8,
                    "U_rollouts": str(tmp_path / "rollouts"),
                },
                "detailed_logging": {"enabled": False},
                "trainer": {"accelerator": "cpu", "logger": False},
            }
        )
        results = probe.run_mixed_probe()
        assert f"rollouts_{step + 1:05d}" in probe.runner.state.U.source
        found = probe.runner.state.update.step
        now, later = (parameters(tmp_path / "run" / f"checkpoint-{k}") for k in (step, step + 1))
        expected = {name: later[key] - now[key] for name, key in names(found, now).items()}
        size = sum(float(x.double().square().sum()) for x in expected.values()) ** 0.5
        error = sum(float((found[n] - x).double().square().sum()) for n, x in expected.items()) ** 0.5
        assert size > 0
        # float32, through Adam's division by small moments
        assert error <= 1e-3 * size, (step, error / size)
        assert results["settings"]["checkpoint"]
        if step == 3 and name == "the defaults":
            assert results["diagnostics"]["bias_flags"] == []


def parameters(folder):
    from safetensors.torch import load_file

    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model.safetensors")


def names(step, saved):
    """The parameters by their names in the file, which leave the adapter's out."""
    found = {name: name.replace(".default.", ".") for name in step}
    return {name: key for name, key in found.items() if key in saved}

"""The gradient on U is that of TRL's own trainer, for every option of its loss, on-policy and off."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer

from probe.config.schema import ProbeConfig
from probe.data.batch import RolloutBatch
from probe.errors.exceptions import ConfigError
from probe.estimators.advantages import combined_advantages, group_advantages
from probe.estimators.router_loss import router_coefficient
from probe.estimators.update import loss_gradient
from probe.from_checkpoint.fill import fill_settings
from probe.module import EntropyProbe
from probe.phases.update import loss_settings
from probe.scoring import Policy, score_tokens
from probe.scoring.reference import as_reference
from tests.support.helpers import char_tokenizer

LENGTH, GENERATIONS, ROWS = 6, 4, 8
TOLERANCE = 1e-5
"""Relative error of the gradient, by norm: both are float32, summed in another order."""

ADAPTER = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")


class Recorder(GRPOTrainer):
    """Keeps the inputs of every loss, and parameters and gradients of every optimizer step before clipping."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.window, self.updates = [], []

    def _compute_loss(self, model, inputs):
        self.window.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
        return super()._compute_loss(model, inputs)

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)

        def keep(*_):
            named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
            values = {n: p.detach().clone() for n, p in named.items()}
            gradients = {
                n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()
            }
            self.updates.append((self.window, values, gradients))
            self.window = []

        optimizer.register_step_pre_hook(keep)
        return optimizer


class Sampled(Recorder):
    """Its responses come from another engine, whose log-probs are a little off; of one token it gives none."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.use_vllm = True

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        self.use_vllm = False
        completions, _ = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self.use_vllm = True
        noise = torch.Generator().manual_seed(len(self.updates))
        given = []
        for prompt, own in zip(prompt_ids, completions, strict=True):
            ids = torch.tensor([[*prompt, *own]])
            with torch.no_grad():
                logits = self.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / self.temperature
            found = logits.log_softmax(-1).gather(1, torch.tensor(own)[:, None])[:, 0]
            given.append((found - 0.3 * torch.randn(found.shape, generator=noise)).clamp_max(0.0).tolist())
        given[0][0] = None
        return completions, given


SHAPE = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def uneven(model):
    """The model with weights of a size at which its logits differ."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def policy_model(new_adapter=False):
    """A LoRA whose B is not 0, so that every adapter weight has a gradient; or the base model without."""
    torch.manual_seed(0)
    model = uneven(Qwen2ForCausalLM(Qwen2Config(**SHAPE)))
    if new_adapter:
        return model
    model = get_peft_model(model, ADAPTER)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.2 * torch.randn_like(p))
    return model


def experts():
    """A mixture of experts."""
    torch.manual_seed(0)
    routed = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    return uneven(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **routed, router_aux_loss_coef=0.1)))


def variety(completions, **_):
    """A reward that differs between responses."""
    return [float(sum(map(ord, c)) % 7) for c in completions]


def short(completions, **_):
    """A reward that does not apply to every response."""
    return [None if len(c) % 2 else float(len(c)) for c in completions]


def unknown(completions, **_):
    """A reward that applies to no response that begins with a letter after m."""
    return [None if c[:1] > "m" else float(ord(c[0])) if c else 0.0 for c in completions]


def train(folder, options, steps, new_adapter=False, kind=Recorder, rewards=variety, model=None):
    """A short run of TRL's trainer, from a trained adapter or with a new one."""
    torch.manual_seed(1)
    settings = {
        "per_device_train_batch_size": ROWS,
        "num_generations": GENERATIONS,
        "max_completion_length": LENGTH,
        "max_steps": steps,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,  # no clipping: the gradient itself is compared
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 100,
        **options,
    }
    prompts = [{"prompt": text} for text in ("1+2=", "abc", "12", "what?")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = kind(
            model=policy_model(new_adapter) if model is None else model,
            peft_config=ADAPTER if new_adapter else None,
            reward_funcs=rewards,
            args=GRPOConfig(output_dir=str(folder), **settings),
            train_dataset=Dataset.from_list(prompts),
            processing_class=char_tokenizer(),
        )
        trainer.train()
    return trainer


def as_batch(windows):
    """What the trainer computed its losses on, as U."""
    rows = [
        {key: window[key][i] for key in window if isinstance(window[key], torch.Tensor) and window[key].dim()}
        for window in windows
        for i in range(len(window["completion_ids"]))
    ]
    widest = max(len(row["completion_ids"]) for row in rows)

    def padded(key):
        out = torch.zeros(len(rows), widest, dtype=rows[0][key].dtype)
        for i, row in enumerate(rows):
            out[i, : len(row[key])] = row[key]
        return out

    def optional(key):
        return padded(key).double() if key in rows[0] else None

    for row in rows:  # the trainer leaves out responses that were cut off, and keeps their tokens
        if not bool(row["completion_mask"].any()):
            row["completion_mask"] = torch.ones_like(row["completion_mask"])
    mask = padded("completion_mask").bool()
    ids = padded("completion_ids")
    cut = torch.tensor([not bool((own[m] == 1).any()) for own, m in zip(ids, mask, strict=True)])
    batch = RolloutBatch(
        prompts=("",) * len(rows),
        completions=("",) * len(rows),
        prompt_ids=tuple(tuple(row["prompt_ids"][row["prompt_mask"].bool()].tolist()) for row in rows),
        completion_ids=ids,
        mask=mask,
        truncated=cut,
        group=torch.arange(len(rows)),
        advantages=torch.stack([row["advantages"] for row in rows]).double(),
        old_logprobs=optional("old_per_token_logps"),
        sampling_logprobs=optional("sampling_per_token_logps"),
    )
    return batch, optional("ref_per_token_logps")


OFF_POLICY = {"num_iterations": 2}
CASES = {
    **{loss: {"loss_type": loss} for loss in ("grpo", "dr_grpo", "bnpo", "dapo", "sapo", "vespo", "luspo")},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "the default": {},
    "beta": {"beta": 0.3},
    "beta, uncorrected": {"beta": 0.3, "use_bias_correction_kl": False, "loss_type": "grpo"},
    "entropy bonus": {"entropy_coef": 0.5},
    "entropy bonus, grpo": {"entropy_coef": 0.5, "loss_type": "grpo"},
    "high-entropy tokens": {"top_entropy_quantile": 0.3, "entropy_coef": 0.5},
    "temperature": {"temperature": 0.7, "beta": 0.1},
    "rewards by batch": {"scale_rewards": "batch"},
    "rewards only centred": {"scale_rewards": "none"},
    "accumulation": {"per_device_train_batch_size": ROWS // 2, "gradient_accumulation_steps": 2},
    "accumulation, grpo, beta": {
        "per_device_train_batch_size": ROWS // 2,
        "gradient_accumulation_steps": 2,
        "loss_type": "grpo",
        "beta": 0.3,
    },
    **{
        f"accumulation, {loss}, high-entropy tokens, entropy bonus": {
            "per_device_train_batch_size": ROWS // 2,
            "gradient_accumulation_steps": 2,
            "loss_type": loss,
            "top_entropy_quantile": 0.5,
            "entropy_coef": 0.3,
        }
        for loss in ("bnpo", "dapo", "grpo", "luspo")
    },
    "accumulation, dapo, off policy": {
        "per_device_train_batch_size": ROWS // 2,
        "gradient_accumulation_steps": 2,
        **OFF_POLICY,
    },
    "off-policy responses left out": {"off_policy_mask_threshold": 1e-3, "learning_rate": 0.1, **OFF_POLICY},
    **{
        f"{loss}, off policy": {"loss_type": loss, **OFF_POLICY}
        for loss in ("grpo", "dr_grpo", "bnpo", "dapo", "sapo", "vespo", "luspo")
    },
    "cispo, off policy": {"loss_type": "cispo", "epsilon_high": 1.1, **OFF_POLICY},
    "narrow clipping": {"epsilon": 0.01, "epsilon_high": 0.02, **OFF_POLICY},
    "two-sided clipping": {"delta": 1.05, **OFF_POLICY},
    "sequence ratios": {"importance_sampling_level": "sequence", **OFF_POLICY},
    "sequence ratios, beta, grpo": {
        "importance_sampling_level": "sequence",
        "beta": 0.3,
        "loss_type": "grpo",
        **OFF_POLICY,
    },
    "luspo, sequence ratios": {
        "importance_sampling_level": "sequence",
        "loss_type": "luspo",
        **OFF_POLICY,
    },
    "everything": {
        "beta": 0.2,
        "entropy_coef": 0.3,
        "top_entropy_quantile": 0.5,
        "delta": 1.1,
        "temperature": 0.8,
        "loss_type": "dr_grpo",
        **OFF_POLICY,
    },
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_gradient(options, tmp_path):
    compare(train(tmp_path, options, steps=2))


SAMPLER = {
    **{
        f"{mode}": {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.1}
        for mode in ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate")
    },
    "both ends": {
        "vllm_importance_sampling_mode": "token_truncate",
        "vllm_importance_sampling_clip_min": 0.9,
        "vllm_importance_sampling_clip_max": 1.05,
        "beta": 0.2,
        **OFF_POLICY,
    },
    "vespo": {"loss_type": "vespo"},
    "vespo, tokens": {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_truncate", **OFF_POLICY},
    "not corrected": {"vllm_importance_sampling_correction": False},
    "left out by the sampler's log-probs": {"off_policy_mask_threshold": 0.05},
}


@pytest.mark.parametrize("options", SAMPLER.values(), ids=SAMPLER)
def test_gradient_of_responses_of_another_engine(options, tmp_path):
    trainer = train(tmp_path, options, steps=2, kind=Sampled)
    assert all("sampling_per_token_logps" in window for window in trainer.updates[0][0])
    compare(trainer)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router_aux_loss_coef": 0.0},
        {"router_aux_loss_coef": 0.5, "loss_type": "grpo"},
        {"per_device_train_batch_size": ROWS // 2, "gradient_accumulation_steps": 2},
        {"mask_truncated_completions": True, "router_aux_loss_coef": 0.5},
    ],
    ids=str,
)
def test_gradient_of_a_mixture_of_experts(options, tmp_path):
    """The whole model, whose own weight of the load-balancing loss is 0.1."""
    trainer = train(tmp_path, options, steps=2, model=experts())
    coefficient = router_coefficient(trainer.model, trainer.args.router_aux_loss_coef)
    assert coefficient == options.get("router_aux_loss_coef", 0.1)
    compare(trainer)


@pytest.mark.parametrize(
    "options",
    [{}, {"loss_type": "grpo"}, {"loss_type": "dr_grpo"}, {"beta": 0.3, "entropy_coef": 0.2}],
    ids=str,
)
def test_gradient_without_the_responses_that_were_cut_off(options, tmp_path):
    model = policy_model()
    with torch.no_grad():
        model.get_base_model().lm_head.weight[1] *= 4  # EOS is likely
    trainer = train(tmp_path, {"mask_truncated_completions": True, **options}, steps=2, model=model)
    batches = [as_batch(windows)[0] for windows, *_ in trainer.updates]
    assert any(0 < int(batch.truncated.sum()) < len(batch) for batch in batches)
    compare(trainer)


def test_a_model_without_experts_has_no_load_balancing_loss():
    model = policy_model()
    assert router_coefficient(model, None) == router_coefficient(model, 0.0) == 0.0
    with pytest.raises(ConfigError, match="router_aux_loss_coef: expected 0 or null for Qwen2Config"):
        router_coefficient(model, 0.1)


def test_gradient_of_a_new_adapter_whose_reference_is_the_base_model(tmp_path):
    compare(train(tmp_path, {"beta": 0.3, "learning_rate": 0.1}, steps=3, new_adapter=True))


def compare(trainer):
    """The gradient of every update, against the probe's at the same parameters on the same tokens.

    With the settings that the probe reads from the trainer's saved arguments.
    """
    args = trainer.args
    file = Path(args.output_dir) / "training_args.bin"
    torch.save(args, file)
    config, _ = fill_settings(ProbeConfig(), (), file)
    module = EntropyProbe(config)
    module.model = trainer.model
    settings = loss_settings(module.policy, module.config)
    model = trainer.model.eval()
    assert len(trainer.updates) == args.max_steps
    for windows, values, expected in trainer.updates:
        batch, reference = as_batch(windows)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in values:
                    p.copy_(values[name])
        # in the trainer's own arithmetic: which tokens have high entropy may hang on rounding
        policy = Policy(
            model, temperature=config.generation.temperature, microbatch_size=3, share_prompts=False
        )
        assert policy.parameters.keys() == expected.keys()
        if reference is not None:
            with as_reference(model):
                ours = score_tokens(policy, batch).logprob
            assert policy.parameters.keys() == expected.keys()
            used = batch.mask & ~(batch.truncated & args.mask_truncated_completions).unsqueeze(1)
            torch.testing.assert_close(ours[used], reference[used], rtol=0, atol=1e-5)
        found = loss_gradient(policy, batch, settings, reference).gradient
        size = sum(float(g.double().square().sum()) for g in expected.values()) ** 0.5
        error = sum(float((found[n] - g).double().square().sum()) for n, g in expected.items()) ** 0.5
        assert size > 0
        assert error <= TOLERANCE * size, error / size


@pytest.mark.parametrize(("scale", "kind"), [("group", "grpo"), ("batch", "batch"), ("none", "dr_grpo")])
def test_advantages(scale, kind, tmp_path):
    trainer = train(tmp_path, {"scale_rewards": scale}, 1)
    batch, _ = as_batch(trainer.updates[0][0])
    texts = [
        trainer.processing_class.decode(ids[m], skip_special_tokens=True)
        for ids, m in zip(batch.completion_ids, batch.mask, strict=True)
    ]
    rewards = torch.tensor(variety(texts), dtype=torch.float64)
    # TRL shuffles the rows of a generation; equal prompts are one group, as the prompts of a step differ
    group = torch.tensor([sorted(set(batch.prompt_ids)).index(ids) for ids in batch.prompt_ids])
    found = group_advantages(rewards, group, kind)
    torch.testing.assert_close(found, batch.advantages, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [None, [1.0, 0.2, -0.5]])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("rewards", [[variety, short, unknown], [short], [short, unknown]], ids=len)
def test_advantages_of_several_rewards_some_of_which_do_not_apply(aggregation, rewards, weights, tmp_path):
    weights = None if weights is None else weights[: len(rewards)]
    options = {
        "multi_objective_aggregation": aggregation,
        "reward_weights": weights,
        "max_completion_length": 3,
    }
    trainer = train(tmp_path, options, 1, rewards=rewards)
    batch, _ = as_batch(trainer.updates[0][0])
    texts = [
        trainer.processing_class.decode(ids[m], skip_special_tokens=True)
        for ids, m in zip(batch.completion_ids, batch.mask, strict=True)
    ]
    found = torch.tensor(
        [[math.nan if x is None else x for x in reward(texts)] for reward in rewards], dtype=torch.float64
    ).T
    group = torch.tensor([sorted(set(batch.prompt_ids)).index(ids) for ids in batch.prompt_ids])
    _, advantages = combined_advantages(found, weights, group, "grpo", aggregation)
    torch.testing.assert_close(advantages, batch.advantages, rtol=1e-4, atol=1e-5)

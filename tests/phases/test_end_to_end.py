"""The whole probe on tiny checkpoints that real libraries wrote."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

import probe.phases.ground_truth as phase_of_measuring
import probe.phases.sample as phase_of_sampling
from probe import OfflineEntropyProbe, load_log
from probe.callbacks import PHASES, ProbeCallback
from probe.errors.exceptions import (
    ConfigError,
    DataError,
    LogError,
    MemoryExhaustedError,
    NumericalError,
    OptimizerStateError,
    RolloutError,
)
from probe.results import DIAGNOSTIC_KEYS, RESULT_KEYS
from probe.rollouts.sampling import sample_rollouts
from probe.rollouts.write import write_rollouts
from probe.scoring.score import score_tokens
from probe.scoring.tuning import Tuned
from probe.snapshot import operator_threads
from probe.sweep.rescale import measure_at
from tests.support.little_memory import MESSAGE, backward, forward_mode, without_memory_for
from tests.support.runs import changed, fingerprint, numbers, owner, run, same
from tests.support.tiny_models import (
    adamw,
    add_lora,
    load_base,
    lora_checkpoint,
    save_base,
    save_checkpoint,
    take_steps,
    tiny_experts,
    trainer_checkpoint,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def constant(prompts, completions, **columns):
    return [1.0] * len(completions)


def broken(prompts, completions, **columns):
    raise ValueError("no such thing")


def test_every_key_is_there_and_is_plain(config):
    results = run(config)
    numbers = (
        "bars_dot",
        "deltaH1",
        "pathwise",
        "score",
        "H_orig",
        "H_upd",
        "deltaH_true",
        "residual",
        "deltaH2",
    )
    with_token = [key for key in RESULT_KEYS if key.startswith((*numbers, "eta_10"))]
    per_token = {
        key.replace(name, f"{name}_tok", 1) for key in with_token for name in numbers if owner(key) == name
    }
    asked = {"attribution", "what_if"}
    assert set(results) == (set(RESULT_KEYS) - asked) | per_token | {"eta_10_tok"}
    differences = {"difference_scale", "difference_error"}  # forward mode needs none
    of_others = {"clipped_fraction", "dropout", "base_recorded", "base_given", "tokens_per_microbatch"}
    of_others |= {key for key in DIAGNOSTIC_KEYS if key.startswith("rounded_")}
    assert set(results["diagnostics"]) == set(DIAGNOSTIC_KEYS) - differences - of_others
    assert set(results["timing"]) == {"load", *PHASES[:-1], "total"} - asked
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert results["deltaH1"] == pytest.approx(results["learning_rate"] * results["bars_dot"])
    assert results["deltaH1"] == pytest.approx(results["pathwise"] + results["score"])
    assert results["deltaH_true"] == pytest.approx(results["H_upd"] - results["H_orig"])
    rows = {(r["quantity"], r["estimator"], r["estimand"]): r for r in results["estimates"]}
    for suffix, estimand in (("", "sequence"), ("_tok", "token")):
        matched, snis = rows["deltaH1", "matched", estimand], rows["deltaH_true", "snis", estimand]
        assert results[f"residual{suffix}"] == pytest.approx(matched["value"] - snis["value"])
        assert results[f"residual{suffix}_se"] < 0.5 * snis["se"]
    assert (results["B_E"], results["B_U"], results["G"]) == (24, 4, 4)
    assert results["diagnostics"]["bias_flags"] == []
    assert results["batch_statistics"]["avg_generation_length"] <= 8
    assert results["batch_statistics"]["avg_reward"] >= 0


def test_same_seed_same_numbers_and_other_seed_other_numbers(config):
    first = numbers(run(config))
    assert numbers(run(config)) == first
    assert numbers(run(config, probe_rework={"master_seed": 42})) == first
    other = numbers(run({**config, "seed_everything": 1}))
    assert other["H_orig"] != first["H_orig"]


def test_memory_settings_change_the_last_digits_only(config):
    first = run(config)
    second = run(
        config, memory_config={"microbatch_size": 3, "head_chunk_tokens": 5}, generation={"batch_size": 5}
    )
    for key in ("H_orig", "H_upd", "bars_dot_tok"):
        assert second[key] == pytest.approx(first[key], rel=1e-4), key
    for key in ("deltaH1", "deltaH_true"):
        assert second[key] == pytest.approx(first[key], rel=2e-2, abs=1e-5), key
    assert second["batch_statistics"]["E"]["length"] == first["batch_statistics"]["E"]["length"]


def test_matched_weights_agree_with_the_measurement_on_the_same_responses(config):
    """Sampling error is shared, so at a small step the two agree far better than either knows the truth."""
    same_E = {
        "probe_rework": {"weighting": "matched", "learning_rate": 1e-4},
        "importance": {"is_mode": "snis"},
    }
    results = run(config, **same_E)
    for suffix in ("", "_tok"):
        assert results[f"deltaH1{suffix}"] == pytest.approx(
            results[f"deltaH_true{suffix}"], rel=0.02, abs=0.1 * results[f"deltaH_true{suffix}_se"]
        )
    assert abs(results["residual"]) < 0.1 * results["deltaH_true_se"]


def test_phases_can_be_left_out(config):
    measured = run(config, probe_rework={"compute_delta_h1": False})
    assert not {"deltaH1", "bars_dot", "pathwise", "score", "residual"} & set(measured)
    assert {"deltaH_true", "H_orig", "H_upd", "learning_rate"} <= set(measured)
    assert not {"entropy_gradient", "prediction"} & set(measured["timing"])
    predicted = run(config, importance={"enabled": False})
    assert not {"deltaH_true", "H_orig", "H_upd", "residual"} & set(predicted)
    assert "ESS" not in predicted["diagnostics"]
    both = run(config)
    assert measured["deltaH_true"] == both["deltaH_true"]
    assert predicted["deltaH1"] == both["deltaH1"]
    per_response = run(config, importance={"report_per_token": False})
    assert "deltaH_true_tok" not in per_response
    assert "H_orig_tok" not in per_response
    assert per_response["deltaH_true"] == both["deltaH_true"]


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "reinforce"])
def test_losses_and_the_closed_form(config, loss):
    real = run(config, probe_rework={"loss": loss}, importance={"enabled": False})
    closed = run(config, probe_rework={"loss": loss, "step": "closed_form"}, importance={"enabled": False})
    assert closed["deltaH1"] == pytest.approx(real["deltaH1"], rel=1e-4)


def test_the_preconditioned_step_is_flagged(config):
    results = run(config, probe_rework={"step": "preconditioned"})
    assert results["diagnostics"]["bias_flags"] == ["preconditioned_step"]
    assert results["deltaH1"] != run(config)["deltaH1"]


def test_loss_terms_change_the_step(config):
    plain = run(config, importance={"enabled": False})["deltaH1"]
    bonus = run(config, probe_rework={"entropy_coef": 1.0}, importance={"enabled": False})["deltaH1"]
    penalty = run(config, probe_rework={"kl_coef": 1.0}, importance={"enabled": False})["deltaH1"]
    assert bonus > plain  # an entropy bonus raises entropy
    assert penalty != plain


def test_learning_rate_has_one_source(config):
    saved = run(config)
    assert saved["learning_rate"] == 1e-3
    assert saved["diagnostics"]["step_norm"] > 0
    double = run(config, probe_rework={"learning_rate": 2e-3})
    assert double["learning_rate"] == 2e-3
    assert double["diagnostics"]["step_norm"] == pytest.approx(
        2 * saved["diagnostics"]["step_norm"], rel=1e-3
    )
    assert double["bars_dot"] == pytest.approx(saved["bars_dot"], rel=1e-3)


def test_a_run_changes_nothing(config, checkpoint):
    files = {p: p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}
    probe = OfflineEntropyProbe(config)
    first = probe.run_mixed_probe()
    before = fingerprint(probe)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    generators = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    second = probe.run_mixed_probe()
    assert same(fingerprint(probe), before)
    assert random.getstate() == generators[0]
    assert np.array_equal(np.random.get_state()[1], generators[1])
    assert torch.equal(torch.get_rng_state(), generators[2])
    assert numbers(second) == numbers(first)
    assert {p: p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()} == files


class Fail(ProbeCallback):
    """Raises in the middle of a pass."""

    def __init__(self, what: str, error: type[BaseException]) -> None:
        self.what, self.error, self.armed, self.seen = what, error, False, None

    def on_progress(self, runner, phase, done, total, what):
        if self.armed and what == self.what:
            raise self.error("injected")

    def on_exception(self, runner, module, exception):
        self.seen = exception


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("what", ["score E after the step", "gradient on U", "sample E"])
def test_an_exception_leaves_everything_as_it_was(config, what, error):
    fail = Fail(what, error)
    probe = OfflineEntropyProbe(config)
    probe.runner.extra_callbacks.append(fail)
    first = probe.run_mixed_probe()
    before, generator = fingerprint(probe), torch.get_rng_state()
    fail.armed = True
    with pytest.raises(error, match="injected"):
        probe.run_mixed_probe()
    assert isinstance(fail.seen, error)
    assert same(fingerprint(probe), before)
    assert torch.equal(torch.get_rng_state(), generator)
    fail.armed = False
    assert numbers(probe.run_mixed_probe()) == numbers(first)


def test_log_files_and_the_result_file(config, tmp_path):
    results = run(
        config,
        detailed_logging={"enabled": True, "level": "debug", "output_directory": str(tmp_path / "logs")},
        output={"results_path": str(tmp_path / "out" / "results.json")},
    )
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    files = sorted(p.name for p in (tmp_path / "logs").glob("*/*"))
    assert len(files) == 3
    main = next((tmp_path / "logs").glob("*/*.json.gz"))
    log = load_log(main)
    assert log["results"]["deltaH1"] == pytest.approx(results["deltaH1"])
    saved = yaml.safe_load(next((tmp_path / "logs").glob("*/*_config.yaml")).read_text())
    assert saved["batch_config"]["B_E"] == 24
    assert saved["seed_everything"] == 42
    again = OfflineEntropyProbe(changed(saved, detailed_logging={"enabled": False})).run_mixed_probe()
    assert numbers(again) == numbers(results)


def test_a_full_disk_does_not_lose_the_results(config, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    probe = OfflineEntropyProbe(changed(config, output={"results_path": str(tmp_path / "results.json")}))
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(LogError, match="No space left") as caught:
        probe.run_mixed_probe()
    assert caught.value.results["deltaH1"] == probe.result.values["deltaH1"]
    assert "deltaH_true" in capsys.readouterr().out


def test_full_model_written_by_the_trainer(config, tmp_path, base):
    folder, _, _ = trainer_checkpoint(tmp_path / "run", load_base(base))
    results = run(config, checkpoint={"checkpoint_path": str(folder)}, probe_rework={"learning_rate": 1e-4})
    assert abs(results["deltaH1"]) > 0
    assert results["diagnostics"]["derivative_check_error"] < 0.05
    with pytest.raises(ConfigError, match="expected 0 for a full model"):
        run(config, checkpoint={"checkpoint_path": str(folder)}, probe_rework={"kl_coef": 0.1})


def test_a_norm_that_is_taken_as_constant(config, tmp_path, base):
    """DoRA's derivatives by autograd are not those of its forward: forwards are believed, or asked for."""
    model = add_lora(load_base(base), use_dora=True, lora_dropout=0.0)
    optimizer = adamw(model)
    take_steps(model, optimizer, 3)
    folder = save_checkpoint(tmp_path / "dora", model, optimizer)
    changes = {
        "checkpoint": {"checkpoint_path": str(folder)},
        "importance": {"is_mode": "snis"},
        "probe_rework": {"weighting": "matched", "learning_rate": 1e-3},
    }
    results = run(config, **changes)
    found = results["diagnostics"]
    assert found["derivative_mode"] == "finite_difference"
    assert results["verdict"] != "invalid"
    for suffix in ("", "_tok"):
        known = abs(results[f"deltaH2{suffix}"]) + 0.03 * abs(results[f"deltaH1{suffix}"])
        assert abs(results[f"residual{suffix}"]) <= 4 * results[f"residual{suffix}_se"] + known
    for mode in ("jvp", "reverse"):
        changes["probe_rework"]["derivative_mode"] = mode
        with pytest.raises(NumericalError, match="derivative_mode: finite_difference"):
            run(config, **changes)
    changes["probe_rework"] |= {"derivative_mode": "jvp", "derivative_check": False}
    assert "step_difference" not in run(config, **changes)["diagnostics"]


def some(prompts, completions, **columns):
    """A reward that does not apply to every response."""
    return [None if len(c) % 2 else float(len(c)) for c in completions]


def test_several_rewards(config):
    names = ["tests.support.runs:digits", "tests.phases.test_end_to_end:some"]
    off = {"importance": {"enabled": False}, "probe_rework": {"curvature": "off"}}
    one = run(config, batch_config={"reward": names[:1]}, **off)
    both = run(config, batch_config={"reward": names, "reward_weights": [1.0, 0.0]}, **off)
    assert numbers(both) == numbers(one)
    other = run(config, batch_config={"reward": names[1:]}, **off)
    assert math.isfinite(other["deltaH1"])
    assert other["deltaH1"] != one["deltaH1"]
    with pytest.raises(ConfigError, match="reward_weights: expected one for each of 2 rewards, found 1"):
        run(config, batch_config={"reward": names, "reward_weights": [1.0]}, **off)


@pytest.mark.parametrize("kind", ["adapter", "attention", "switched off"])
def test_dropout_in_training_marks_the_update(config, tmp_path, base, kind):
    if kind == "attention":
        folder = save_base(tmp_path / "attention", attention_dropout=0.2)
        model = load_base(folder)
    else:
        model = add_lora(load_base(base), lora_dropout=0.1)
    optimizer = adamw(model)
    take_steps(model, optimizer, 2)
    folder = save_checkpoint(tmp_path / "checkpoint-2", model, optimizer, layout="flat")
    if kind == "switched off":
        from tests.from_checkpoint.test_from_checkpoint import grpo_args

        sizes = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 8}
        torch.save(grpo_args(disable_dropout=True, **sizes), folder / "training_args.bin")
    results = run(config, checkpoint={"checkpoint_path": str(folder)})
    found = results["diagnostics"]
    if kind == "switched off":
        assert "dropout" not in found["bias_flags"]
        return
    assert "dropout" in found["bias_flags"]
    assert found["dropout"] == (0.2 if kind == "attention" else 0.1)
    assert any("draws dropout of 0." in reason for reason in results["verdict_reasons"])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_mixture_of_experts(config, tmp_path, dtype):
    model = tiny_experts()
    optimizer = adamw(model)
    take_steps(model, optimizer, 2)
    folder = save_checkpoint(tmp_path / "experts", model, optimizer)
    results = run(config, checkpoint={"checkpoint_path": str(folder), "dtype": dtype})
    found = results["diagnostics"]
    assert found["derivative_mode"] == "jvp"
    assert found["derivative_agreement"] < 1e-5
    assert found["step_difference"] < 0.05


@pytest.mark.parametrize(
    "settings", [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"load_in_4bit": True}, {"dtype": "float64"}]
)
def test_other_precisions(config, settings):
    # An entropy bonus makes a step whose effect stands far above the rounding of half precision.
    rework = {"weighting": "matched", "learning_rate": 1e-3, "entropy_coef": 10.0}
    changes = {"probe_rework": rework, "importance": {"is_mode": "snis"}, "batch_config": {"B_E": 64}}
    results = run(config, checkpoint=settings, **changes)
    assert results["deltaH_true_tok"] > 3 * results["deltaH_true_tok_se"]
    for suffix in ("", "_tok"):
        # same E, matched against snis: what differs is rounding, curvature, and a third order of a percent
        floor = results["diagnostics"][f"noise_floor{suffix}"]
        error = 4 * math.hypot(results[f"residual{suffix}_se"], floor)
        known = abs(results[f"deltaH2{suffix}"]) + 0.01 * abs(results[f"deltaH1{suffix}"])
        assert abs(results[f"residual{suffix}"]) <= error + known
    assert results["diagnostics"]["derivative_check_error"] < 0.25


def same_but_for_rounding(found, expected, keys):
    """The gradient of U is summed in another order, and a change of E is known up to the noise floor."""
    floor = max(result["diagnostics"]["noise_floor"] for result in (found, expected))
    for key in keys:
        assert found[key] == pytest.approx(expected[key], rel=1e-5, abs=floor), key


def test_rollouts_from_files_give_the_numbers_of_the_sampled_ones(config, tmp_path):
    probe = OfflineEntropyProbe(config)
    sampled = probe.run_mixed_probe()
    state = probe.runner.state
    write_rollouts(tmp_path / "E.jsonl", state.E)
    write_rollouts(tmp_path / "U.parquet", state.U)
    files = {"E_rollouts": str(tmp_path / "E.jsonl"), "U_rollouts": str(tmp_path / "U.parquet")}
    read = run(config, batch_config=files)
    same_but_for_rounding(read, sampled, ("deltaH1", "deltaH_true", "H_orig", "bars_dot_tok"))
    assert read["B_U"] == 4
    assert read["diagnostics"]["bias_flags"] == []


def test_a_file_without_rewards_is_rewarded_by_the_configuration(config, tmp_path):
    probe = OfflineEntropyProbe(config)
    probe.run_mixed_probe()
    U = probe.runner.state.U
    write_rollouts(tmp_path / "U.jsonl", replace(U, rewards=None, advantages=None))
    read = OfflineEntropyProbe(changed(config, batch_config={"U_rollouts": str(tmp_path / "U.jsonl")}))
    read.run_mixed_probe()
    found = read.runner.state.U
    assert found.rewards.tolist() == U.rewards.tolist()
    assert found.advantages.tolist() == U.advantages.tolist()


def test_one_file_for_both_batches_is_refused_before_the_model_is_loaded(config, tmp_path, monkeypatch):
    """The step would be made from the very sample that it is judged on."""
    probe = OfflineEntropyProbe(config)
    probe.run_mixed_probe()
    file = write_rollouts(tmp_path / "U.jsonl", probe.runner.state.U)
    (tmp_path / "link.jsonl").symlink_to(file)
    monkeypatch.setattr("probe.module.load_policy_model", lambda *_: pytest.fail("loaded"))
    for other in ("U.jsonl", "link.jsonl"):
        with pytest.raises(DataError, match="expected responses that the update is not made from, found"):
            run(config, batch_config={"E_rollouts": str(tmp_path / other), "U_rollouts": str(file)})


def test_a_copy_of_the_rows_of_the_update_is_invalid(config, tmp_path):
    probe = OfflineEntropyProbe(config)
    probe.run_mixed_probe()
    U = probe.runner.state.U
    write_rollouts(tmp_path / "U.jsonl", U)
    write_rollouts(tmp_path / "E.parquet", U.subset(torch.arange(4, len(U))))
    files = {"E_rollouts": str(tmp_path / "E.parquet"), "U_rollouts": str(tmp_path / "U.jsonl")}
    results = run(config, batch_config=files)
    assert "E_shares_U" in results["diagnostics"]["bias_flags"]
    assert results["verdict"] == "invalid"
    assert results["diagnostics"]["prompts_E"] == 3


def test_responses_that_are_shared_by_chance_change_nothing(config, tmp_path):
    """Short responses to few prompts are often the same, in files as when sampled."""
    rows = [{"prompt": f"{i} apples", "answer": "2"} for i in range(5)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = {"batch_config": {"dataset_name": str(tmp_path / "few.jsonl"), "disjoint": False, "B_E": 64}}
    few["generation"] = {"max_new_tokens": 2, "temperature": 0.4}
    probe = OfflineEntropyProbe(changed(config, **few))
    sampled = probe.run_mixed_probe()
    E, U = probe.runner.state.E, probe.runner.state.U
    shared = set(zip(E.prompt_ids, E.completions, strict=True)) & set(
        zip(U.prompt_ids, U.completions, strict=True)
    )
    assert shared
    write_rollouts(tmp_path / "E.jsonl", E)
    write_rollouts(tmp_path / "U.jsonl", U)
    few["batch_config"] |= {f"{name}_rollouts": str(tmp_path / f"{name}.jsonl") for name in "EU"}
    read = run(config, **few)
    assert read["verdict"] == sampled["verdict"] != "invalid", sampled["verdict_reasons"]
    assert read["verdict_reasons"] == sampled["verdict_reasons"]
    same_but_for_rounding(read, sampled, ("deltaH1", "deltaH_true", "H_orig"))


@pytest.mark.parametrize("level", ["detailed", "debug"])
def test_the_log_of_a_run_is_a_rollout_file(config, tmp_path, level):
    logged = {"enabled": True, "level": level, "output_directory": str(tmp_path / "logs")}
    probe = OfflineEntropyProbe(changed(config, detailed_logging=logged))
    sampled = probe.run_mixed_probe()
    (log,) = (p for p in (tmp_path / "logs").rglob("*.json*") if "summary" not in p.name)
    read = run(config, batch_config={"E_rollouts": str(log), "U_rollouts": str(log)})
    assert read["diagnostics"]["bias_flags"] == []
    same_but_for_rounding(read, sampled, ("deltaH1", "deltaH_true", "H_orig", "bars_dot_tok"))
    if level == "debug":  # a record is a row
        records = load_log(log)["sequences"]["U"]
        (tmp_path / "U.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        found = run(config, batch_config={"E_rollouts": str(log), "U_rollouts": str(tmp_path / "U.jsonl")})
        same_but_for_rounding(found, sampled, ("deltaH1",))


def test_texts_that_a_stop_string_ended_give_the_numbers_of_their_tokens(config, tmp_path):
    """No EOS is scored that was not sampled, neither in E nor in U."""
    stops = {"max_new_tokens": 24, "stop_strings": ["7", "x", "B"]}
    probe = OfflineEntropyProbe(changed(config, generation=stops, batch_config={"B_E": 96, "G": 16}))
    probe.run_mixed_probe()
    tokenizer = probe._module.tokenizer
    found = {}
    for name, batch in (("E", probe.runner.state.E), ("U", probe.runner.state.U)):
        back = tokenizer(list(batch.completions))["input_ids"]
        sampled = [ids[m].tolist() for ids, m in zip(batch.completion_ids, batch.mask, strict=True)]
        kept = torch.tensor([i for i, ids in enumerate(sampled) if ids == back[i]])
        assert len(kept) > 20
        found[name] = batch.subset(kept)
        write_rollouts(tmp_path / f"{name}.ids.jsonl", found[name])
        rows = [json.loads(line) for line in (tmp_path / f"{name}.ids.jsonl").read_text().splitlines()]
        kept_columns = ("prompt", "completion", "group", "reward", "advantage")
        lines = [json.dumps({key: row[key] for key in kept_columns if key in row}) for row in rows]
        (tmp_path / f"{name}.texts.jsonl").write_text("\n".join(lines))
    files = [
        {f"{name}_rollouts": str(tmp_path / f"{name}.{kind}.jsonl") for name in "EU"}
        for kind in ("ids", "texts")
    ]
    exact, texts = (run(config, generation=stops, batch_config=given) for given in files)
    for key in ("deltaH1", "deltaH_true", "H_orig", "H_orig_tok"):
        assert texts[key] == pytest.approx(exact[key], rel=1e-9), key
    assert exact["diagnostics"]["bias_flags"] == []
    assert texts["diagnostics"]["bias_flags"] == ["retokenized"]


@pytest.mark.parametrize("mode", ["auto", "jvp", "reverse", "finite_difference"])
def test_a_policy_without_any_choice_left_has_entropy_0_and_keeps_it(config, tmp_path, mode):
    """Every token has probability 1 in the arithmetic at hand: nothing to differentiate is no error."""
    folder = save_base(tmp_path / "sure", tied=False)
    model = load_base(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e8)
    model.save_pretrained(folder)
    sure = {"checkpoint_path": str(lora_checkpoint(tmp_path / "step_60", folder)[0])}
    found = run(config, checkpoint=sure, probe_rework={"derivative_mode": mode})
    for name in ("H_orig", "H_upd", "deltaH1", "deltaH_true", "deltaH2", "bars_dot", "residual"):
        for suffix in ("", "_tok"):
            assert found[name + suffix] == 0, name
    assert found["verdict"] == "unresolved"
    assert "no choice left" in found["diagnostics"]["derivative_reason"]


def test_tokens_and_lengths_that_the_model_has_no_room_for_are_refused_in_files(config, tmp_path):
    row = {"prompt": "2 apples", "completion_ids": [5, 1], "reward": 1.0}
    for change, message in (
        ({"completion_ids": [5, 104]}, "row 1: expected completion_ids below the 104 tokens"),
        ({"completion_ids": [5] * 125}, r"sequence 1 .*fit into the 128 positions .*found 8 and 125 tokens"),
        ({"completion_ids": [5] * 8, "prompt_ids": [6] * 121}, "found 121 and 8 tokens"),
    ):
        row0 = {**row, "prompt_ids": [5]} if "prompt_ids" in change else row
        (tmp_path / "U.jsonl").write_text(json.dumps(row0) + "\n" + json.dumps({**row, **change}) + "\n")
        with pytest.raises(DataError, match=message):
            run(config, batch_config={"U_rollouts": str(tmp_path / "U.jsonl"), "B_E": 2})


def test_a_learning_rate_measured_afterwards_is_the_run_at_that_rate(config):
    """`measure_at` changes no parameter and gives what a run of its own would."""
    probe = OfflineEntropyProbe(changed(config, checkpoint={"dtype": "float64"}))
    base = probe.run_mixed_probe()
    module, eta = probe._module, 0.5 * base["learning_rate"]
    before = {n: p.detach().clone() for n, p in module.model.named_parameters()}
    found = measure_at(probe.runner, module, eta).values
    assert all(torch.equal(p, before[n]) for n, p in module.model.named_parameters())
    own = run(config, checkpoint={"dtype": "float64"}, probe_rework={"learning_rate": eta})
    for key in (
        "deltaH1",
        "deltaH_true",
        "deltaH2",
        "deltaH1_se",
        "deltaH_true_tok_se",
        "residual_tok",
    ):
        # the even part of a change has fourth orders in it, which do not scale like the second
        rel = 2e-2 if key == "deltaH2" else 1e-6
        assert found[key] == pytest.approx(own[key], rel=rel, abs=1e-12), key


@pytest.mark.parametrize("mode", ["jvp", "reverse", "finite_difference"])
def test_every_way_to_the_derivative_gives_one_number(config, mode):
    found = run(config, probe_rework={"derivative_mode": mode})
    other = run(config)
    assert found["diagnostics"]["derivative_mode"] == mode
    for suffix in ("", "_tok"):
        assert found[f"deltaH1{suffix}"] == pytest.approx(other[f"deltaH1{suffix}"], rel=2e-2, abs=1e-6)
        assert found[f"deltaH1{suffix}_se"] == pytest.approx(other[f"deltaH1{suffix}_se"], rel=2e-2)
    assert found["deltaH1_sd_U"] == pytest.approx(other["deltaH1_sd_U"], rel=2e-2)
    assert ("difference_scale" in found["diagnostics"]) == (mode != "jvp")


def test_resampling_measures_with_a_fresh_sample(config):
    found = run(config, importance={"is_mode": "resample"}, batch_config={"G_E": 2})
    rows = {r["estimator"]: r for r in found["estimates"] if r["estimand"] == "token"}
    assert rows["resample"]["reported"]
    assert found["deltaH_true_tok_se"] == rows["resample"]["se"] > rows["snis"]["se"]
    assert found["B_E"] == 48
    assert found["diagnostics"]["prompts_E"] == 24
    assert found["diagnostics"]["is_mode"] == "resample"


def test_nothing_is_sampled_on_threads_that_a_trial_has_chosen(config, monkeypatch):
    """What the clock says must not reach a sampled token: not of a fresh sample, and not of a second run."""
    seen = []

    def sample(*args, **options):
        seen.append(("sampled", torch.get_num_threads()))
        return sample_rollouts(*args, **options)

    def scores(*args, **options):
        seen.append(("scored", torch.get_num_threads()))
        return score_tokens(*args, **options)

    monkeypatch.setattr(phase_of_sampling, "sample_rollouts", sample)
    monkeypatch.setattr(phase_of_measuring, "score_tokens", scores)
    monkeypatch.setattr(phase_of_sampling, "tuned", lambda *_: Tuned(2048, 1))
    probe = OfflineEntropyProbe(changed(config, importance={"is_mode": "resample"}))
    with operator_threads(2):
        for _ in range(2):
            assert probe.run_mixed_probe()["diagnostics"]["threads"] == 1
        assert torch.get_num_threads() == 2
    assert set(seen) == {("sampled", 2), ("scored", 1)}


def test_clipped_weights_are_a_row_of_their_own(config):
    found = run(config, importance={"clip_log_weight": 1e-6})
    rows = {r["estimator"]: r for r in found["estimates"] if r["estimand"] == "token"}
    assert found["diagnostics"]["clipped_fraction"] > 0.5
    assert not rows["snis_clipped"]["reported"]
    assert rows["snis_clipped"]["value"] != rows["snis"]["value"]


def test_control_variates_learn_from_earlier_batches(config, tmp_path):
    path = tmp_path / "taught.safetensors"
    rework = {"control_variates": "on", "control_variates_path": str(path)}
    first = run(config, probe_rework=rework)
    assert first["diagnostics"]["control_variates"] == "on: fitted on other prompts"
    again = run(config, probe_rework=rework)  # the same draw teaches itself nothing
    assert again["deltaH1"] == first["deltaH1"]
    other = run({**config, "seed_everything": 7}, probe_rework=rework)
    assert "1 earlier batches" in other["diagnostics"]["control_variates"]
    alone = run({**config, "seed_everything": 7}, probe_rework={"control_variates": "on"})
    assert other["deltaH1"] != alone["deltaH1"]
    with pytest.raises(DataError, match="one file per checkpoint"):
        run(config, checkpoint={"checkpoint_path": str(copy_of(config, tmp_path))}, probe_rework=rework)


def test_the_file_of_the_control_variates_is_tried_before_the_work(config, tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    probe = OfflineEntropyProbe(
        changed(config, probe_rework={"control_variates_path": str(tmp_path / "file" / "taught.safetensors")})
    )
    with pytest.raises(LogError, match="a file of that name is in the way"):
        probe.run_mixed_probe()
    assert probe.runner.state.E is None


def test_a_full_disk_under_the_control_variates_does_not_lose_the_results(config, tmp_path, monkeypatch):
    path = tmp_path / "taught.safetensors"
    rework = {"control_variates": "on", "control_variates_path": str(path)}
    real = os.replace

    def full(source, target):
        if str(target) == str(path):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(LogError, match=r"cannot write .*taught\.safetensors: No space left") as caught:
        run(config, probe_rework=rework)
    assert caught.value.results["deltaH1"] != 0
    assert list(tmp_path.glob("*.safetensors")) == []


def copy_of(config, tmp_path):
    """The same checkpoint in another place."""
    return shutil.copytree(config["checkpoint"]["checkpoint_path"], tmp_path / "copy")


def test_responses_of_another_policy_are_flagged(config, tmp_path):
    probe = OfflineEntropyProbe(changed(config, generation={"temperature": 0.2}, batch_config={"B_E": 64}))
    probe.run_mixed_probe()
    write_rollouts(tmp_path / "E.jsonl", probe.runner.state.E)
    results = run(config, batch_config={"E_rollouts": str(tmp_path / "E.jsonl")})
    assert "E_not_from_this_policy" in results["diagnostics"]["bias_flags"]


def test_truncated_support_is_flagged(config):
    results = run(config, generation={"top_p": 0.9, "allow_truncated_support": True})
    assert "truncated_support" in results["diagnostics"]["bias_flags"]


def test_other_checkpoint_by_argument(config, tmp_path, base):
    other, _, _ = lora_checkpoint(tmp_path / "step_90", base, steps=9)
    probe = OfflineEntropyProbe(config)
    first, second = probe.run_mixed_probe(), probe.run_mixed_probe(other)
    assert first["deltaH1"] != second["deltaH1"]
    assert probe.result.checkpoint_name == "step_90"
    assert probe.config["checkpoint"]["checkpoint_path"] == str(other)


def test_refusals(config, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="expected a checkpoint folder"):
        run(config, checkpoint={"checkpoint_path": None})
    with pytest.raises(DataError, match="no such thing"):
        run(config, batch_config={"reward": "tests.phases.test_end_to_end:broken"})
    with pytest.raises(DataError, match="B_U"):
        run(config, batch_config={"B_U": 1000})
    with pytest.raises(ConfigError, match=r"trainer\.strategy: expected ddp"):
        run(config, trainer={"devices": 2, "strategy": "ddp_spawn"})
    (tmp_path / "U.jsonl").write_text(
        '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "c"}\n'
    )
    with pytest.raises(DataError, match="column with rewards"):
        run(config, batch_config={"U_rollouts": str(tmp_path / "U.jsonl"), "reward": None})
    with pytest.raises(
        DataError, match=r"^batch_config\.E_rollouts: .*expected a rollout file, found nothing"
    ):
        run(config, batch_config={"E_rollouts": str(tmp_path / "none.jsonl")})
    probe = OfflineEntropyProbe(changed(config, probe_rework={"step": "preconditioned"}))
    probe.runner.extra_callbacks.append(ForgetMoments())
    with pytest.raises(OptimizerStateError, match="preconditioned"):
        probe.run_mixed_probe()
    monkeypatch.setattr("probe.rollouts.generation.SAMPLING_GAP_LIMIT", {torch.float32: -1.0})
    with pytest.raises(RolloutError, match="sampling and scoring to see the same policy"):
        run(config)
    probe = OfflineEntropyProbe(config)
    probe.runner.extra_callbacks.append(DistortGradients(monkeypatch))
    with pytest.raises(NumericalError, match="derivative"):
        probe.run_mixed_probe()


def test_mistakes_in_the_data_show_before_the_model_is_loaded(config, monkeypatch):
    monkeypatch.setattr("probe.module.load_policy_model", lambda *args: pytest.fail("the model was loaded"))
    for mistake in (
        {"prompt_column": "text"},
        {"B_U": 1000},
        {"reward": "nothing"},
        {"dataset_name": "no.jsonl"},
    ):
        with pytest.raises(DataError):
            run(config, batch_config=mistake)


def test_an_update_without_reward_signal_is_flagged(config):
    results = run(config, batch_config={"reward": "tests.phases.test_end_to_end:constant"})
    assert results["diagnostics"]["bias_flags"] == ["no_reward_signal"]
    assert results["diagnostics"]["zero_advantage_groups"] == 4
    assert results["deltaH1"] != 0.0  # momentum and decay


class ForgetMoments(ProbeCallback):
    """Empties the optimizer's state before the update."""

    def on_update_start(self, runner, module):
        module.optimizer.optimizer.state.clear()


class DistortGradients(ProbeCallback):
    """A layer whose backward keeps a third of the gradient."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr("probe.rollouts.generation.SAMPLING_GAP_LIMIT", {torch.float32: 1.0})

    def on_entropy_gradient_start(self, runner, module):
        from tests.estimators.test_derivative_check import Distort

        layer = module.model.get_base_model().model.layers[0]
        layer.register_forward_hook(lambda m, args, output: Distort.apply(output))


class LittleMemory(ProbeCallback):
    """From a phase on, a layer has no memory for some passes; for a backward pass it has some again for the update."""

    def __init__(self, phase, *too_much):
        setattr(self, f"on_{phase}_start", self.shrink)
        self.too_much = too_much

    def shrink(self, runner, module):
        layer = module.model.get_base_model().model.layers[0].mlp
        self.hook = without_memory_for(layer, *self.too_much)

    def on_entropy_gradient_end(self, runner, module):
        if backward in self.too_much:
            self.hook.remove()


def with_little_memory(config, phase, *too_much, **rework):
    """A run whose memory becomes short when a phase starts."""
    probe_run = OfflineEntropyProbe(changed(config, probe_rework=rework))
    probe_run.runner.extra_callbacks.append(LittleMemory(phase, *too_much))
    return probe_run.run_mixed_probe()


@pytest.mark.parametrize("phase", ["entropy_gradient", "update", "prediction"])
def test_a_run_without_memory_for_forward_mode_goes_on_by_differences(config, phase):
    if phase == "prediction":
        expected = run(config, probe_rework={"derivative_mode": "finite_difference"})
        assert expected["diagnostics"]["derivative_mode"] == "finite_difference"
    found = with_little_memory(config, phase, forward_mode)
    assert found["diagnostics"]["derivative_mode"] == "finite_difference"
    assert "forward mode needs more memory" in found["diagnostics"]["derivative_reason"]
    if phase == "prediction":
        assert found["deltaH1"] == expected["deltaH1"]
    with pytest.raises(MemoryExhaustedError, match="derivative_mode: expected memory for forward mode"):
        with_little_memory(config, phase, forward_mode, derivative_mode="jvp")


def test_a_run_without_memory_for_the_gradient_on_e(config):
    """Differences take its place; the loss's gradient has memory again."""
    found = with_little_memory(config, "entropy_gradient", backward)
    assert found["diagnostics"]["derivative_mode"] == "finite_difference"
    with pytest.raises(MemoryExhaustedError, match="expected memory for a backward pass"):
        with_little_memory(config, "entropy_gradient", backward, derivative_mode="reverse")


def test_the_gradient_on_all_of_e_without_memory(config, monkeypatch, caplog):
    """The first microbatch had some: in forward mode only the spread over U needs it."""

    def too_much(*args, **kwargs):
        raise torch.OutOfMemoryError(MESSAGE)

    assert "deltaH1_sd_U" in run(config)
    monkeypatch.setattr("probe.phases.entropy_gradient.gradient_of_entropy", too_much)
    found = run(config)
    assert found["diagnostics"]["derivative_mode"] == "jvp"
    assert "deltaH1_sd_U is left out" in caplog.text
    assert "deltaH1_sd_U" not in found
    with pytest.raises(MemoryExhaustedError, match="expected memory for a backward pass"):
        run(config, probe_rework={"derivative_mode": "reverse"})


def test_nested_forward_mode_without_memory_gives_way_to_differences(config, monkeypatch):
    def too_much(*args, **kwargs):
        raise torch.OutOfMemoryError(MESSAGE)

    monkeypatch.setattr("probe.phases.curvature.second_order_tangents", too_much)
    found = run(config)
    assert found["diagnostics"]["derivative_mode"] == "jvp"
    assert found["diagnostics"]["second_order_mode"] == "finite_difference"
    with pytest.raises(MemoryExhaustedError, match=r"probe_rework\.curvature: expected memory"):
        run(config, probe_rework={"curvature": "jvp"})


class Recorder(ProbeCallback):
    """Notes the hooks that were called."""

    def __init__(self):
        self.called = []

    def __getattribute__(self, name):
        if name.startswith("on_") and name != "on_progress":
            object.__getattribute__(self, "called").append(name)
        return object.__getattribute__(self, name)


def test_hooks_are_called_in_order_and_all_are_declared(config):
    import probe.callbacks

    probe_run = OfflineEntropyProbe(config)
    recorder = Recorder()
    probe_run.runner.extra_callbacks.append(recorder)
    probe_run.run_mixed_probe()
    called = list(dict.fromkeys(recorder.called))
    expected = ["on_probe_start"]
    for phase in PHASES:
        if phase not in ("attribution", "what_if"):  # which nobody asked for
            expected += [f"on_{phase}_start", f"on_{phase}_end"]
    assert called == [*expected, "on_probe_end"]
    declared = {name for name in vars(ProbeCallback) if name.startswith("on_")}
    for name in probe.callbacks.__all__:
        value = getattr(probe.callbacks, name)
        if isinstance(value, type):
            hooks = {n for n in vars(value) if n.startswith("on_")}
            assert hooks <= declared, name

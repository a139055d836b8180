"""Attribution and interventions in whole runs on tiny checkpoints."""

from __future__ import annotations

import gzip
import json
import math

import pytest
import torch

from probe import OfflineEntropyProbe, load_log
from probe.attribution.interventions import INTERVENTIONS
from probe.attribution.predictors import PREDICTORS
from probe.callbacks import ProbeCallback
from probe.cli.main import main
from probe.errors.exceptions import ConfigError, DataError, NumericalError
from probe.report.drawing import pixels
from probe.report.figures import result_figures
from probe.report.markdown import report_markdown
from probe.report.tags import scalar_tags
from probe.report.terminal import report
from probe.report.token_figure import shaded_responses, tokens_figure
from tests.support.runs import changed, fingerprint, numbers, run, same
from tests.support.tiny_models import (
    adamw,
    load_base,
    save_checkpoint,
    take_steps,
    tiny_experts,
    trainer_checkpoint,
)

pytestmark = [pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")]

SMALL = {"enabled": True, "blocks": 4, "states": 6, "responses": 3, "top": 4}
FLOAT64 = {"checkpoint": {"dtype": "float64"}}


def none_applies(prompts, completions, **columns):
    return [None] * len(completions)


def no_reward_of_24(prompts, completions, **columns):
    if len(completions) == 24:
        raise ValueError("not these")
    return [float(len(text)) for text in completions]


@pytest.fixture
def attributed(config):
    config["attribution"] = dict(SMALL)
    return config


def total_of(entry, key):
    return sum(one[key] for one in entry)


def test_the_parts_add_up_to_what_is_reported(attributed):
    results = run(attributed)
    found = results["attribution"]
    for key in ("deltaH1", "deltaH1_tok"):
        parts = sum(found[name][key] for name in ("momentum", "decay", "tokens"))
        assert parts == pytest.approx(found["total"][key], rel=1e-9)
        reported = parts + found.get("control_variates", {}).get(key, 0.0)
        size = max(abs(found[name][key]) for name in ("momentum", "tokens"))
        assert reported == pytest.approx(results[key], abs=1e-4 * size)
    assert found["completeness"] < 1e-4
    assert found["agreement"] < 1e-4
    assert found["without_reward"] is None
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_sums_over_classes_are_the_tokens(attributed):
    found = run(attributed)["attribution"]
    for way in ("advantage", "outcome", "entropy", "kind", "position", "prompt", "sequence"):
        rows = found[f"by_{way}"]
        for key in ("deltaH1", "deltaH1_tok", "state_fixed_tok", "deltaR1"):
            size = sum(abs(one[key]) for one in rows)
            assert total_of(rows, key) == pytest.approx(found["tokens"][key], abs=1e-9 * size)
    for way in ("layer", "matrix"):
        rows = found[f"by_{way}"]
        assert total_of(rows, "deltaH1") == pytest.approx(found["total"]["deltaH1"], rel=1e-4)
    assert {one["name"] for one in found["by_layer"]} == {"layer 0", "layer 1"}


def test_the_spread_over_update_batches_is_a_sum_of_contributions(attributed):
    """The same number as without an attribution, which takes X from a part of E: here that is all of it."""
    with_it = run(attributed)
    without = run(changed(attributed, attribution={"enabled": False}, detailed_logging={"enabled": False}))
    assert with_it["deltaH1_sd_U"] == pytest.approx(without["deltaH1_sd_U"], rel=0.05)
    assert "attribution" not in without
    left = (
        "deltaH1_sd_U",
        "deltaH1_tok_sd_U",
        "attribution",
        "diagnostics",
        "batch_statistics",
        "verdict_reasons",
    )
    assert {k: v for k, v in numbers(with_it).items() if k not in left} == {
        k: v for k, v in numbers(without).items() if k not in left
    }


def test_in_float64_the_identity_holds_as_far_as_the_models_norms_do(attributed):
    found = run(changed(attributed, **FLOAT64))["attribution"]
    assert found["completeness"] < 1e-6
    assert found["coupling"]["states"]["completeness"] < 1e-6


def test_a_run_changes_nothing(attributed):
    attributed["whatif"] = {"enabled": True, "exact": ["positive_advantage"], "target_deltaH": -1e-4}
    probe = OfflineEntropyProbe(attributed)
    probe.run_mixed_probe()
    before, state = fingerprint(probe), torch.get_rng_state()
    probe.run_mixed_probe()
    assert same(fingerprint(probe), before)
    assert torch.equal(torch.get_rng_state(), state)


class Interrupt(ProbeCallback):
    """Ctrl-C when a phase reports progress."""

    def __init__(self, phase, what):
        self.phase, self.what = phase, what

    def on_progress(self, runner, phase, done, total, what):
        if phase == self.phase and self.what in what:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("phase", "what"),
    [
        ("attribution", "gradient on E"),
        ("attribution", "U"),
        ("attribution", "coupling"),
        ("what_if", "gradient on U"),
        ("what_if", "score E"),
    ],
)
def test_an_interrupt_leaves_everything_as_it_was(attributed, phase, what):
    attributed["whatif"] = {"enabled": True, "exact": ["positive_advantage"]}
    attributed["trainer"]["callbacks"] = None
    probe = OfflineEntropyProbe(attributed)
    probe.run_mixed_probe()
    before = fingerprint(probe)
    probe.runner.extra_callbacks = [Interrupt(phase, what)]
    with pytest.raises(KeyboardInterrupt):
        probe.run_mixed_probe()
    assert same(fingerprint(probe), before)


def test_states_responses_and_league_can_be_left_out(attributed):
    found = run(changed(attributed, attribution={"states": 0, "responses": 0, "league": False, "top": 0}))
    assert {"coupling", "league"}.isdisjoint(found["attribution"])
    assert found["attribution"]["top_tokens"] == []


def test_the_league_has_every_predictor(attributed):
    league = run(attributed)["attribution"]["league"]
    assert set(PREDICTORS) <= {row["predictor"] for row in league}


@pytest.mark.parametrize(
    ("reward", "reason"), [({"attribution": {"reward": False}}, "attribution.reward is off")]
)
def test_without_a_reward_there_is_none(attributed, reward, reason):
    found = run(changed(attributed, **reward))["attribution"]
    assert found["without_reward"] == reason
    assert "deltaR1" not in found["total"]


def test_a_reward_that_cannot_be_had_of_the_evaluation_batch_is_an_error(attributed):
    reward = f"{__name__}:no_reward_of_24"
    with pytest.raises(DataError, match=r"not these.*attribution\.reward: false"):
        run(changed(attributed, batch_config={"reward": reward}))


@pytest.mark.parametrize("mode", ["finite_difference", "reverse"])
def test_other_ways_to_differentiate(attributed, mode):
    exact = run(attributed)["attribution"]
    found = run(changed(attributed, probe_rework={"derivative_mode": mode}))["attribution"]
    assert found["completeness"] < 0.05
    for name in ("momentum", "tokens"):
        assert found[name]["deltaH1"] == pytest.approx(exact[name]["deltaH1"], rel=0.05)


def test_a_full_model(attributed, tmp_path, base):
    folder, _, _ = trainer_checkpoint(tmp_path / "full", load_base(base))
    rate = {"learning_rate": 1e-4}
    found = run(changed(attributed, checkpoint={"checkpoint_path": str(folder)}, probe_rework=rate))[
        "attribution"
    ]
    assert found["completeness"] < 1e-3
    assert "outside of layers" in {one["name"] for one in found["by_layer"]}


@pytest.mark.parametrize(
    ("settings", "off"),
    [({"dtype": "bfloat16"}, 0.1), ({"dtype": "float16"}, 0.1), ({"load_in_4bit": True}, 0.05)],
)
def test_other_precisions(attributed, settings, off):
    """Where forwards are coarse, differences or derivatives of coarse forwards: the identity as far as these allow."""
    rework = {"learning_rate": 1e-3, "entropy_coef": 10.0}
    sections = {"probe_rework": rework, "batch_config": {"B_E": 64}}
    exact = run(changed(attributed, **sections))["attribution"]
    attributed["whatif"] = {"enabled": True, "interventions": ["entropy_bonus(coef=1.0)"]}
    results = run(changed(attributed, checkpoint=settings, **sections))
    found = results["attribution"]
    assert found["completeness"] < off
    if settings != {"load_in_4bit": True}:  # whose weights are others
        bonus = found["entropy_bonus"]["deltaH1"]
        assert bonus == pytest.approx(exact["entropy_bonus"]["deltaH1"], rel=0.2)
    (one,) = results["what_if"]["interventions"]
    assert math.isfinite(one["difference"]["deltaH1"])


def test_the_load_balancing_loss_of_experts_is_a_part_of_its_own(attributed, tmp_path):
    model = tiny_experts()
    optimizer = adamw(model)
    take_steps(model, optimizer, 2)
    folder = save_checkpoint(tmp_path / "experts", model, optimizer)
    rework = {"router_aux_loss_coef": 0.1}
    attributed["whatif"] = {"enabled": True, "interventions": ["steer"]}
    results = run(changed(attributed, checkpoint={"checkpoint_path": str(folder)}, probe_rework=rework))
    found = results["attribution"]
    assert found["router"]["deltaH1"] != 0
    assert found["completeness"] < 1e-3
    assert found["coupling"]["states"]["completeness"] < 1e-3
    assert results["what_if"]["as_it_is"]["shortcut"]["error"]["deltaH1"] == pytest.approx(
        0.0, abs=1e-3 * abs(results["what_if"]["as_it_is"]["deltaH1"])
    )


def test_terms_of_the_loss_are_parts_of_their_own(attributed):
    found = run(changed(attributed, probe_rework={"kl_coef": 0.1, "entropy_coef": 0.01}))["attribution"]
    assert found["kl"]["deltaH1"] != 0
    assert found["entropy_bonus"]["deltaH1"] > 0  # it is what raises the entropy
    assert found["completeness"] < 1e-4


def test_a_single_prompt_in_the_update_has_no_spread(attributed):
    text, probe = report_of(attributed, batch_config={"B_U": 1, "B_E": 2, "G_E": 8})
    results = probe.result.values
    assert results["attribution"]["blocks"] == 2
    assert results["attribution"]["total"]["deltaH1_se"] > 0
    assert "deltaH1_sd_U" not in results
    assert "Which tokens did it?" in text


def report_of(config, **sections):
    probe = OfflineEntropyProbe(changed(config, **sections))
    probe.run_mixed_probe()
    return report(probe.result), probe


def test_rewards_that_are_all_equal_give_zeros(attributed):
    reward = "tests.phases.test_end_to_end:constant"
    found = run(changed(attributed, batch_config={"reward": reward}))["attribution"]
    assert found["tokens"]["deltaH1"] == 0.0
    assert "deltaR1" not in found["total"]
    assert "all rewards of E are equal" in found["without_reward"]
    assert "by_outcome" not in found
    assert "league" not in found


def test_rewards_that_do_not_apply(attributed):
    with pytest.raises(DataError, match="expected a number for some response"):
        run(changed(attributed, batch_config={"reward": f"{__name__}:none_applies"}))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"probe_rework": {"compute_delta_h1": False}},
            "attribution.enabled: expected probe_rework.compute_delta_h1",
        ),
        ({"probe_rework": {"step": "preconditioned"}}, "attribution.enabled: expected probe_rework.step"),
        ({"attribution": {"blocks": 1}}, "attribution.blocks: expected an integer of at least 2, found 1"),
        ({"attribution": {"states": -1}}, "attribution.states: expected an integer of at least 0, found -1"),
        (
            {"attribution": {"enabled": False}, "whatif": {"enabled": True}},
            "whatif.enabled: expected attribution.ena",
        ),
        (
            {"whatif": {"enabled": True, "target_deltaH": 0.0}},
            "whatif.target_deltaH: expected a number other than 0",
        ),
        ({"whatif": {"enabled": True, "interventions": ["clip_kov"]}}, "did you mean clip_cov"),
        ({"whatif": {"enabled": True, "exact": ["clip_kov"]}}, "did you mean clip_cov"),
        (
            {"whatif": {"enabled": True, "interventions": ["steer(w_min=0.0)"]}},
            "expected steer.w_min=.... in",
        ),
        ({"whatif": {"interventions": ["steer"]}}, "whatif.interventions: expected whatif.enabled true"),
        ({"whatif": {"target_deltaH": -0.1}}, "whatif.target_deltaH: expected whatif.enabled true"),
        (
            {"whatif": {"enabled": True, "interventions": ["drop(tokens_of=left)"]}},
            "which U has, found 'left'",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(attributed, sections, message):
    with pytest.raises(ConfigError, match=message):
        run(changed(attributed, **sections))


def test_layers_that_drop_derivatives_are_found_out(attributed, monkeypatch):
    import probe.phases.step_in_parts as phase

    real = phase.forward_tangents

    def wrong(*args, **options):
        return real(*args, **options).scaled(1.5)

    monkeypatch.setattr(phase, "forward_tangents", wrong)
    with pytest.raises(NumericalError, match="expected the tokens of U to add up"):
        run(attributed)


# ---------------------------------------------------------------- interventions


def test_interventions_are_compared(attributed):
    attributed["whatif"] = {"enabled": True}
    found = run(attributed)["what_if"]
    named = {one["name"].partition("(")[0] for one in found["interventions"]}
    assert named == set(INTERVENTIONS)
    assert found["as_it_is"]["tokens"] == 0
    half = next(one for one in found["interventions"] if one["name"] == "learning_rate(factor=0.5)")
    assert half["deltaH1_tok"] == pytest.approx(found["as_it_is"]["deltaH1_tok"] / 2)


def test_steps_are_taken_and_targets_met(attributed):
    """The update as it is is the update; a halved rate is half of it; targets are met, and measured."""
    first = run(attributed)
    target = first["attribution"]["total"]["deltaH1_tok"] / 2
    attributed["whatif"] = {
        "enabled": True,
        "interventions": ["positive_advantage", "learning_rate(factor=0.5)"],
        "exact": ["all"],
        "target_deltaH": target,
    }
    found = run(attributed)["what_if"]
    asis = found["as_it_is"]
    assert asis["deltaH1_tok"] == pytest.approx(first["attribution"]["total"]["deltaH1_tok"], rel=1e-4)
    plain = next(
        e for e in first["estimates"] if (e["estimator"], e["estimand"]) == ("per_decision", "token")
    )
    assert asis["exact"]["deltaH_true_tok"] == pytest.approx(plain["value"], rel=1e-6)
    by_name = {one["name"]: one for one in found["interventions"]}
    half = by_name["learning_rate(factor=0.5)"]
    assert half["deltaH1_tok"] == pytest.approx(asis["deltaH1_tok"] / 2, rel=1e-5)
    assert half["shortcut"]["error"]["deltaH1_tok"] == pytest.approx(0.0, abs=1e-4 * abs(target))
    assert all("exact" in one for one in found["interventions"])
    assert len(found["solutions"]) == 2
    for one in found["solutions"]:
        if one["setting"] is None:
            assert one["reason"]
        else:
            assert by_name[one["intervention"]]["deltaH1_tok"] == pytest.approx(target, rel=0.02)
    rate = next(one for one in found["solutions"] if one["solver"] == "learning_rate")
    if rate["setting"] is not None:
        assert rate["setting"]["value"] == pytest.approx(0.5)


def test_the_optimizer_takes_back_what_only_rescales_a_gradient(attributed):
    """All weights doubled where the gradient is clipped: the shortcut sees twice the tokens, the optimizer none."""
    tight = {"max_grad_norm": 1e-3}
    attributed["whatif"] = {
        "enabled": True,
        "interventions": ["positive_advantage(weight=2)+negative_advantage(weight=2)"],
    }
    (one,) = run(changed(attributed, probe_rework=tight))["what_if"]["interventions"]
    size = abs(one["shortcut"]["difference"]["deltaH1_tok"])
    assert size > 0
    assert abs(one["difference"]["deltaH1_tok"]) < 1e-3 * size
    assert abs(one["shortcut"]["error"]["deltaH1_tok"]) == pytest.approx(size, rel=1e-2)


def test_without_steps_effects_are_sums_of_contributions(attributed):
    attributed["whatif"] = {"enabled": True, "interventions": ["steer"]}
    with_steps = run(attributed)["what_if"]["interventions"][0]
    without = run(changed(attributed, whatif={"steps": False}))["what_if"]["interventions"][0]
    assert "shortcut" not in without
    assert without["deltaH1_tok"] == pytest.approx(with_steps["shortcut"]["deltaH1_tok"], rel=1e-9)


def test_gradients_of_too_many_numbers_leave_no_errors_of_steps(attributed, monkeypatch):
    monkeypatch.setattr("probe.phases.step_in_parts.MOST_HELD", 10)
    attributed["whatif"] = {"enabled": True, "interventions": ["steer"]}
    one = run(attributed)["what_if"]["interventions"][0]
    assert one["deltaH1_tok_se"] is None
    assert one["shortcut"]["deltaH1_tok_se"] > 0


def test_what_was_asked_for_and_cannot_be_had_is_an_error(attributed):
    sections = {"whatif": {"enabled": True, "exact": ["clip_higher"]}, "probe_rework": {"loss": "cispo"}}
    with pytest.raises(ConfigError, match="clip_higher: expected a loss that clips the ratios of tokens"):
        run(changed(attributed, **sections))
    found = run(changed(attributed, whatif={"enabled": True}, probe_rework={"loss": "cispo"}))["what_if"]
    assert {"clip_higher", "kl_cov", "ce_gppo"} == set(found["skipped"])


def test_advantages_without_rewards_leave_those_interventions_out(attributed, tmp_path):
    from probe.rollouts.write import write_rollouts

    first = OfflineEntropyProbe(attributed)
    first.run_mixed_probe()
    U = first.runner.state.U
    from dataclasses import replace

    path = tmp_path / "U.jsonl"
    write_rollouts(path, replace(U, rewards=None))
    attributed["whatif"] = {"enabled": True}
    results = run(changed(attributed, batch_config={"U_rollouts": str(path)}))
    assert set(results["what_if"]["skipped"]) == {"quantile_baseline", "advantage"}


# ---------------------------------------------------------------- what a person and a file get


def test_report_loggers_and_log(attributed, tmp_path):
    attributed["whatif"] = {"enabled": True, "exact": ["positive_advantage"], "target_deltaH": -1e-3}
    attributed["detailed_logging"] = {
        "enabled": True,
        "level": "debug",
        "output_directory": str(tmp_path / "logs"),
    }
    text, probe = report_of(attributed)
    for head in (
        "Which tokens did it?",
        "Whose doing",
        "League table",
        "What if?",
        "Steps that were measured",
    ):
        assert head in text
        assert head in report_markdown(probe.result).replace("&#45;", "-")
    assert max(map(len, text.splitlines())) <= 160
    tags = scalar_tags(probe.result.values)
    assert "entropy_probe_attribution/deltaH1_tok/momentum" in tags
    assert "entropy_probe_attribution_coupling/states/own" in tags
    assert "entropy_probe_what_if/deltaH1_tok/positive_advantage_weight_0.1" in tags
    assert all(math.isfinite(value) for value in tags.values())
    assert [name[0] for name in result_figures(probe.result.values)] == ["1", "2", "3", "4", "5"]
    shaded = shaded_responses(probe.runner.state, None)
    largest = min(one["deltaH1_tok"] for one in probe.result.values["attribution"]["by_sequence"])
    assert sum(shaded[0].changes) == pytest.approx(largest, rel=1e-6)
    assert pixels(tokens_figure(shaded)).size
    (path,) = (tmp_path / "logs").rglob("*.json.gz")
    log = load_log(path)
    record = log["sequences"]["U"][0]
    tokens = log["tokens"]["U"][0]
    assert record["contribution_deltaH1_tok"] == pytest.approx(
        sum(tokens["contribution_deltaH1_tok"]), rel=1e-5
    )
    assert len(log["influence"]["nats"]) == len(log["influence"]["responses_of_E"]) == 3
    assert log["results"]["attribution"]["momentum"] == probe.result.values["attribution"]["momentum"]
    assert json.loads(gzip.decompress(path.read_bytes()))["level"] == "debug"


def test_the_log_with_contributions_is_a_rollout_file(attributed, tmp_path):
    attributed["detailed_logging"] = {
        "enabled": True,
        "level": "debug",
        "output_directory": str(tmp_path / "logs"),
    }
    first = run(attributed)
    (path,) = (tmp_path / "logs").rglob("*.json.gz")
    again = run(
        changed(attributed, batch_config={"U_rollouts": str(path)}, detailed_logging={"enabled": False})
    )
    assert again["batch_statistics"]["avg_reward"] == pytest.approx(first["batch_statistics"]["avg_reward"])
    assert again["diagnostics"]["gradient_norm"] == pytest.approx(
        first["diagnostics"]["gradient_norm"], rel=1e-5
    )


@pytest.mark.parametrize("command", ["sweep", "plan"])
def test_commands_without_a_place_for_it_refuse_it(attributed, tmp_path, command, capsys):
    import yaml

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(attributed))
    assert main([command, "--config", str(tmp_path / "run.yaml")]) == 2
    assert "attribution.enabled: expected false" in capsys.readouterr().err


def test_a_target_that_no_bonus_reaches_is_said_with_what_is_near(attributed):
    """Clipped to nearly nothing, no bonus moves the step further than clipping lets it."""
    attributed["whatif"] = {"enabled": True, "interventions": ["steer"], "target_deltaH": 2.0}
    attributed["whatif"]["solve_for"] = ["entropy_bonus"]
    (one,) = run(attributed)["what_if"]["solutions"]
    assert one["setting"] is None
    assert "the optimizer's steps do not come nearer than" in one["reason"]
    coefficient = float(one["reason"].split("coefficient of ")[1].split(" ")[0])
    assert coefficient >= 0


def test_a_target_below_an_entropy_of_0_is_refused_in_words(attributed):
    attributed["whatif"] = {"enabled": True, "interventions": ["steer"], "target_deltaH": -100.0}
    for one in run(attributed)["what_if"]["solutions"]:
        assert one["setting"] is None
        assert "it cannot fall by 100" in one["reason"]


@pytest.mark.parametrize("command", ["attribute", "whatif"])
def test_the_commands_are_runs_with_their_sections_on(attributed, tmp_path, command, capsys):
    import yaml

    attributed["attribution"].pop("enabled")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(attributed))
    out = tmp_path / "results.json"
    asked = [command, "--config", str(tmp_path / "run.yaml"), "--output.results_path", str(out)]
    more = ["--exact", "positive_advantage", "--target_deltaH", "-0.001"] if command == "whatif" else []
    assert main([*asked, *more]) == 0, capsys.readouterr().err
    results = json.loads(out.read_text())
    assert "attribution" in results
    assert ("what_if" in results) == (command == "whatif")
    if command == "whatif":
        assert [one["name"] for one in results["what_if"]["interventions"] if "exact" in one][:1]

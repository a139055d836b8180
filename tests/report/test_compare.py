"""Two runs compared by their logs: real ones of tiny checkpoints, and logs that do not fit."""

from __future__ import annotations

import copy
import gzip
import json
import math
from pathlib import Path

import pytest
import torch

import probe
from probe.errors.exceptions import LogError
from probe.estimators.estimate import Estimate
from probe.report.comparison import COMPARISON_SCHEMA, WIDTH
from tests.support.runs import changed
from tests.support.tiny_models import lora_checkpoint, save_base

SHARED = {
    "batch_config": {"split": "train", "reward": "tests.support.runs:digits", "B_E": 70, "B_U": 4, "G": 4},
    "generation": {"max_new_tokens": 8, "batch_size": 64},
    "trainer": {"accelerator": "cpu", "logger": False},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Logs by name: `a`; `rate` and `other_U` on its E; `other_E`; `policy` on its E; `groups` of two responses."""
    folder = tmp_path_factory.mktemp("runs")
    base = save_base(folder / "base")
    first = lora_checkpoint(folder / "step_60", base)[0]
    second = lora_checkpoint(folder / "other" / "step_60", base, steps=8)[0]
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i} apples", "answer": str(i)}) + "\n" for i in range(90))
    )

    def run(name, checkpoint=first, **sections):
        config = changed(
            SHARED,
            checkpoint={"checkpoint_path": str(checkpoint)},
            batch_config={"dataset_name": str(folder / "prompts.jsonl")},
            detailed_logging={
                "level": "detailed",
                "output_directory": str(folder / name),
                "filename_template": name,
            },
        )
        probe.OfflineEntropyProbe(changed(config, **sections)).run_mixed_probe()
        (log,) = (folder / name).glob("*/*.json.gz")
        return log

    found = {"a": run("a")}
    on_a = {"E_rollouts": str(found["a"])}
    return found | {
        "rate": run("rate", probe_rework={"learning_rate": 2e-3}),
        "other_U": run("other_U", batch_config={**on_a, "B_U": 6}),
        "other_E": run("other_E", probe_rework={"master_seed": 5}),
        "policy": run("policy", second, batch_config=on_a),
        "own_E": run("own_E", second),
        "groups": run("groups", batch_config={"B_E": 35, "G_E": 2}),
        "groups_rate": run("groups_rate", probe_rework={"learning_rate": 2e-3}, batch_config={"B_E": 35, "G_E": 2}),
    }  # fmt: skip


@pytest.fixture
def logs(runs):
    """The same as documents that a test may change."""
    return {name: copy.deepcopy(probe.load_log(path)) for name, path in runs.items()}


def estimate_of(log, key):
    """The estimate of a key, from the columns of a log alone."""
    records = log["sequences"]["E"]
    group = torch.tensor([record["group"] for record in records])
    shares = torch.tensor([record[f"influence_{key}"] for record in records], dtype=torch.float64)
    fit = torch.tensor(log["sequences"]["influence_fit"].get(key, []), dtype=torch.float64)
    return Estimate.from_responses(log["results"][key], shares, group, fit)


def weights(a, b):
    """What a response of A's counts under B's policy, not normalised."""
    pairs = zip(a["sequences"]["E"], b["sequences"]["E"], strict=True)
    return torch.tensor([y["logprob_before"] - x["logprob_before"] for x, y in pairs]).double().exp()


@pytest.mark.parametrize("name", ["a", "rate", "other_U", "groups"])
@pytest.mark.parametrize("quantity", ["H_orig", "deltaH1", "deltaH_true"])
@pytest.mark.parametrize("suffix", ["", "_tok"])
def test_influences_in_the_log_give_the_reported_error(logs, name, quantity, suffix):
    key, results = f"{quantity}{suffix}", logs[name]["results"]
    found = estimate_of(logs[name], key)
    assert found.se == pytest.approx(results[f"{key}_se"], rel=1e-7)
    assert found.df == pytest.approx(results[f"{key}_df"], rel=1e-6)
    assert found.ci95 == pytest.approx(results[f"{key}_ci95"], rel=1e-6)
    with_fit = quantity != "H_orig" and results["diagnostics"]["control_variates"].startswith("on")
    assert bool(len(found.fit)) == with_fit


def test_control_variates_are_in_some_of_these_runs(logs):
    """Else the test above would say nothing about fits."""
    assert logs["a"]["results"]["diagnostics"]["control_variates"].startswith("on")
    assert logs["groups"]["results"]["diagnostics"]["control_variates"].startswith("off")


def test_two_learning_rates(runs, logs):
    found = probe.compare(runs["a"], str(runs["rate"]))
    assert (found.how, found.same_policy, found.responses, found.prompts) == ("paired", True, 70, 70)
    ratio = logs["rate"]["results"]["learning_rate"] / logs["a"]["results"]["learning_rate"]
    row = found.row("deltaH1_tok")
    assert row.difference.value == pytest.approx((ratio - 1) * row.a.value, rel=1e-4)
    assert row.difference.se == pytest.approx(
        abs(ratio - 1) * row.a.se, rel=1e-4
    )  # proportional: all is shared
    assert row.unpaired_se == pytest.approx(math.hypot(1, ratio) * row.a.se, rel=1e-4)
    assert row.gain == pytest.approx(math.hypot(1, ratio) / abs(ratio - 1), rel=1e-3)
    low, high = row.difference.ci95
    assert low < row.difference.value < high
    level = found.row("H_orig_tok")
    assert level.a == level.b
    assert level.difference is None
    assert "one policy" in level.note
    after, change = found.row("H_upd"), found.row("deltaH_true")
    assert after.difference.value == pytest.approx(change.difference.value)
    assert after.difference.se == pytest.approx(change.difference.se, rel=1e-6)
    assert after.a.se == pytest.approx(
        (estimate_of(logs["a"], "H_orig") + estimate_of(logs["a"], "deltaH_true")).se
    )
    with pytest.raises(KeyError, match=r"expected one of .*deltaH1_tok.*, found 'deltaH'"):
        found.row("deltaH")


def test_two_updates_on_the_same_rollouts(runs, logs):
    found = probe.compare(logs["a"], logs["other_U"])
    assert found.same_policy
    for key in ("deltaH1", "deltaH_true", "deltaH1_tok", "deltaH_true_tok"):
        mine, other = (estimate_of(logs[name], key) for name in ("a", "other_U"))
        expected, row = other - mine, found.row(key)
        assert row.difference.value == pytest.approx(expected.value)
        assert row.difference.se == pytest.approx(expected.se)
        assert row.difference.df == pytest.approx(expected.df)
    back = probe.compare(logs["other_U"], logs["a"])
    assert back.row("deltaH1").difference.value == pytest.approx(-found.row("deltaH1").difference.value)
    assert back.row("deltaH1").difference.se == pytest.approx(found.row("deltaH1").difference.se)


@pytest.mark.parametrize("pair", [("a", "rate"), ("groups", "groups_rate")])
def test_the_order_of_the_responses_does_not_matter(logs, pair):
    """Groups are matched by content; what fits add to errors is no longer of the same folds, and then independent."""
    a, b = (logs[name] for name in pair)
    expected = probe.compare(a, b)
    records = b["sequences"]["E"]
    b["sequences"]["E"] = [{**record, "group": 100 - record["group"]} for record in reversed(records)]
    found = probe.compare(a, b)
    for row, other in zip(found.rows, expected.rows, strict=True):
        assert row.key == other.key
        if row.difference is not None:
            assert row.difference.value == pytest.approx(other.difference.value, rel=1e-9)
            if not a["sequences"]["influence_fit"]:
                assert row.difference.se == pytest.approx(other.difference.se, rel=1e-9)
            else:
                assert row.difference.se >= other.difference.se * (1 - 1e-9)


def test_responses_in_other_groups_are_another_e(logs):
    a, b = logs["groups"], logs["groups_rate"]
    for i, record in enumerate(b["sequences"]["E"]):
        record["group"] = i % 35
    with pytest.raises(LogError, match="found the same responses in other groups; rerun B with"):
        probe.compare(a, b)


def test_two_policies_on_one_e(runs, logs):
    """Levels and changes of both are weighted, whatever the flags say; see `test_compare_two_policies`."""
    found = probe.compare(runs["a"], runs["policy"])
    assert found.same_policy is False
    w = weights(logs["a"], logs["policy"])
    a, b = (logs[name]["sequences"]["E"] for name in ("a", "policy"))
    assert [r["completion_ids"] for r in a] == [r["completion_ids"] for r in b]
    assert f"B before ESS {float(w.sum() ** 2 / w.square().sum()):.0f} of 70" in found.notes[0]
    N = torch.tensor([y["entropy_before"] for y in b]).double()
    assert found.row("H_orig").b.value == pytest.approx(float((w * N).sum() / w.sum()), rel=1e-6)
    assert {row.quantity for row in found.rows} == {"H_orig", "H_upd", "deltaH_true"}


def near(log, size):
    """The same run of a policy that is near: log-probs and entropies moved a little, E read from the first one's."""
    other = copy.deepcopy(log)
    g = torch.Generator().manual_seed(0)
    for record in other["sequences"]["E"]:
        record["logprob_before"] += size * float(torch.randn((), generator=g))
        record["entropy_before"] += size
    other["sequences"]["E_rollouts"] = "a.json.gz"
    return other


def test_a_near_policy_has_weighted_levels(logs):
    a, b = logs["a"], near(logs["a"], 0.05)
    found = probe.compare(a, b)
    assert found.same_policy is False
    row = found.row("H_orig")
    w = weights(a, b)
    N = torch.tensor([y["entropy_before"] for y in b["sequences"]["E"]]).double()
    assert row.b.value == pytest.approx(float((w * N).sum() / w.sum()), rel=1e-6)
    assert row.difference.value == pytest.approx(row.b.value - a["results"]["H_orig"], rel=1e-6)
    assert row.difference.se < math.hypot(row.a.se, row.b.se) / 3


def test_policies_that_are_far_apart_are_refused(logs):
    with pytest.raises(
        LogError, match=r"weights that are too uneven \(B before ESS .*an E of each one's own"
    ):
        probe.compare(logs["a"], near(logs["a"], 5.0))


def test_an_e_that_neither_has_drawn(logs):
    a, b = near(logs["a"], 0.0), near(logs["a"], 0.05)
    with pytest.raises(
        LogError, match="expected an E that one of the two policies has drawn, found one that both"
    ):
        probe.compare(a, b)
    b["results"]["diagnostics"]["bias_flags"] = ["E_not_from_this_policy"]
    found = probe.compare(a, b)
    assert "E was drawn from A's" in found.notes[0]
    assert "B is flagged: E_not_from_this_policy." in found.notes


@pytest.mark.parametrize("key", ["derivative_agreement", "step_difference", "difference_error"])
def test_differences_that_the_derivatives_do_not_know_are_not_resolved(logs, key):
    """The same update with other batch shapes: what is left is rounding, with hardly any error of sampling."""
    a = logs["a"]
    for name in ("derivative_agreement", "step_difference", "difference_error", "noise_floor_tok"):
        a["results"]["diagnostics"].pop(name, None)
    b = copy.deepcopy(a)
    b["results"]["deltaH1_tok"] *= 1 + 1e-3
    for i, record in enumerate(b["sequences"]["E"]):
        record["influence_deltaH1_tok"] *= 1 + 1e-5 * (i % 3)
    row = probe.compare(a, b).row("deltaH1_tok")
    assert abs(row.difference.value) > 10 * row.difference.se
    b["results"]["diagnostics"][key] = 5e-3
    floor = 5e-3 * abs(b["results"]["deltaH1_tok"])
    row = probe.compare(a, b).row("deltaH1_tok")
    assert row.difference is None
    assert row.note == f"B - A is below the error of the derivatives ({floor:.2g})"
    assert row.unpaired_se is not None
    a["results"]["diagnostics"][key] = 5e-3
    assert (
        f"({math.hypot(floor, 5e-3 * abs(row.a.value)):.2g})" in probe.compare(a, b).row("deltaH1_tok").note
    )


def test_in_16_bits_the_noise_floor_is_one_of_derivatives_too(logs):
    a, b = logs["a"], logs["rate"]
    size = abs(probe.compare(a, b).row("deltaH1_tok").difference.value)
    b["results"]["diagnostics"]["noise_floor_tok"] = 2 * size
    assert probe.compare(a, b).row("deltaH1_tok").difference is not None
    b["results"]["diagnostics"]["bias_flags"] = ["half_precision"]
    assert probe.compare(a, b).row("deltaH1_tok").difference is None


def test_h_after_of_one_policy_differs_by_what_the_changes_differ_by(logs):
    """However rounding shows the entropy that both start from."""
    a, b = logs["a"], logs["rate"]
    expected = probe.compare(a, b).row("deltaH_true_tok").difference
    for name in ("H_orig_tok", "H_upd_tok"):
        b["results"][name] += 1e-3
    found = probe.compare(a, b)
    assert found.same_policy is True
    assert found.row("H_upd_tok").difference == expected
    assert found.row("H_upd_tok").b.value == b["results"]["H_upd_tok"]


def test_reasons_of_verdicts_and_few_degrees_of_freedom_are_said(logs):
    a, b = logs["a"], logs["other_U"]
    a["results"] |= {"verdict": "trustworthy", "verdict_reasons": ["All is well."]}
    b["results"] |= {"verdict": "unresolved", "verdict_reasons": ["It is too noisy.", "And small."]}
    shares = [0.0] * 70
    shares[3], shares[9] = 1.0, -1.0
    for record, x in zip(b["sequences"]["E"], shares, strict=True):
        record["influence_deltaH1"] += x
    for unpaired in (False, True):
        notes = probe.compare(a, b, unpaired=unpaired).notes
        assert "B is unresolved: It is too noisy." in notes
        assert not any("A is" in note for note in notes)
    found = probe.compare(a, b)
    df = found.row("deltaH1").difference.df
    assert df < 5 <= found.row("deltaH1_tok").difference.df
    (note,) = (note for note in found.notes if note.startswith("A few prompts carry the error of B - A"))
    assert f"deltaH1 per response ({df:.2g})" in note
    assert "deltaH1 per token" not in note


def test_a_run_beside_itself_is_called_one(runs, logs):
    one = "A and B are one run: that they do not differ says nothing."
    assert one in probe.compare(runs["a"], logs["a"]).notes
    assert one not in probe.compare(runs["a"], runs["rate"]).notes


def test_two_checkpoints_on_the_same_prompts(runs, logs):
    """Each with responses of its own: influences are subtracted prompt by prompt, whatever the order of the log."""
    found = probe.compare(runs["a"], runs["own_E"])
    assert (found.how, found.same_policy, found.responses, found.prompts) == ("by prompt", None, None, 70)
    assert {row.key for row in found.rows} == {
        f"{name}{suffix}" for name in ("H_orig", "H_upd", "deltaH1", "deltaH_true") for suffix in ("", "_tok")
    }
    a, b = logs["a"], logs["own_E"]
    for row in found.rows:
        if row.quantity == "H_upd" or row.difference is None:
            continue
        by_prompt = []
        for log in (a, b):
            prompts = log["sequences"]["prompts"]
            sums: dict[str, list[float]] = {}
            for one in log["sequences"]["E"]:
                sums.setdefault(prompts[one["prompt"]]["text"], []).append(one[f"influence_{row.key}"])
            by_prompt.append(sums)
        assert by_prompt[0].keys() == by_prompt[1].keys()
        pairs = [
            y - x for text in by_prompt[0] for x, y in zip(*(sums[text] for sums in by_prompt), strict=True)
        ]
        fits = [log["sequences"].get("influence_fit", {}).get(row.key, []) for log in (a, b)]
        variance = 70 / 69 * math.fsum(x * x for x in pairs) + math.fsum(x * x for fit in fits for x in fit)
        assert row.difference.value == pytest.approx(row.b.value - row.a.value)
        assert row.difference.se == pytest.approx(math.sqrt(variance), rel=1e-6)
        assert row.unpaired_se == pytest.approx(math.hypot(row.a.se, row.b.se))
    records = b["sequences"]["E"]
    b["sequences"]["E"] = records[::-1]
    again = probe.compare(a, b)
    for row in found.rows:
        if row.difference is not None and len(set(map(str, (one["prompt"] for one in records)))) == 70:
            assert again.row(row.key).difference.se == pytest.approx(row.difference.se)
    assert "on the same 70 prompts" in str(found)
    assert probe.compare(runs["a"], runs["own_E"], unpaired=True).how == "unpaired"


def test_another_e_is_refused_or_has_independent_errors(runs, logs):
    with pytest.raises(LogError, match=r"found 70 and 70 responses, \d+ of them in common; rerun B with "
                                       r"--batch_config.E_rollouts \S+a.json.gz, or with A's.*--unpaired"):  # fmt: skip
        probe.compare(runs["a"], runs["other_E"])
    logs["other_E"]["results"]["training_step"] = 80
    with pytest.raises(
        LogError,
        match=r"checkpoints of different steps \(60 and 80\) draw responses of their own: give both runs the same",
    ):
        probe.compare(runs["a"], logs["other_E"])
    found = probe.compare(runs["a"], runs["other_E"], unpaired=True)
    assert (found.how, found.same_policy, found.responses) == ("unpaired", None, None)
    row = found.row("deltaH1")
    assert row.difference.se == pytest.approx(math.hypot(row.a.se, row.b.se))
    assert row.gain is None
    after = found.row("H_upd")  # its errors are in no result, but in the influences
    parts = [
        (estimate_of(logs[name], "H_orig") + estimate_of(logs[name], "deltaH_true")).se
        for name in ("a", "other_E")
    ]
    assert after.difference.value == pytest.approx(after.b.value - after.a.value)
    assert after.difference.se == pytest.approx(math.hypot(*parts))
    same = probe.compare(runs["a"], runs["rate"], unpaired=True)
    assert same.how == "paired"  # what can be paired is


def test_logs_without_responses_can_be_compared_unpaired_only(logs):
    a, b = logs["a"], logs["rate"]
    for log in (a, b):
        del log["sequences"]
        log["level"] = "standard"
    with pytest.raises(
        LogError, match=r"found level 'standard' without them; run it again with --detailed_logging.level"
    ):
        probe.compare(a, b)
    found = probe.compare(a, b, unpaired=True)
    assert found.how == "unpaired"
    assert "Whether they are cannot be known: there is a log without responses" in found.notes[0]
    assert "different draws" not in str(found)
    assert found.row("H_upd").difference is None
    assert found.row("H_upd").note == "no error in one of the logs (level detailed has it)"
    assert found.row("deltaH_true").difference.se is not None


def test_only_two_e_without_anything_in_common_are_called_different_draws(logs):
    a = logs["a"]
    b = copy.deepcopy(a)
    for record in b["sequences"]["E"][20:]:
        record["completion_ids"] = [1, *record["completion_ids"]]
    note = probe.compare(a, b, unpaired=True).notes[0]
    assert (
        "the two E have 20 of 70 and 70 responses in common: unless two draws came to these by chance" in note
    )
    for record in b["sequences"]["E"][:20]:
        record["completion_ids"] = [1, *record["completion_ids"]]
    note = probe.compare(a, b, unpaired=True).notes[0]
    assert "the two E have the same prompts: without --unpaired they are paired by prompt" in note
    for prompt in b["sequences"]["prompts"]:
        prompt["ids"] = [1, *prompt["ids"]]
    note = probe.compare(a, b, unpaired=True).notes[0]
    assert note.startswith("The two E are different draws: their errors are taken as independent.")
    for record in b["sequences"]["E"]:
        del record["completion_ids"]
    assert "cannot be known" in probe.compare(a, b, unpaired=True).notes[0]


def test_what_is_not_resolved_has_a_reason(logs):
    a, b = logs["a"], logs["rate"]
    a["results"]["deltaH_true"] = None
    found = probe.compare(a, b)
    assert found.row("deltaH_true").difference is None
    assert found.row("deltaH_true").note == "A: not resolved (below the noise floor)"
    b["results"]["diagnostics"]["noise_floor_tok"] = 1.0
    hidden = probe.compare(a, b).row("deltaH_true_tok")
    assert hidden.difference is None
    assert "B - A is below the noise floor (1)" in hidden.note
    for record in b["sequences"]["E"]:
        del record["influence_deltaH1"]
    bare = probe.compare(a, b).row("deltaH1")
    assert bare.difference.se is None
    assert bare.difference.value == pytest.approx(bare.b.value - bare.a.value)
    assert "error not known" in bare.note


def test_files_that_are_no_logs_of_runs(runs, logs, tmp_path):
    (summary,) = runs["a"].parent.glob("*summary.json")
    with pytest.raises(
        LogError,
        match=r"expected the main log of a run, found schema 'entropy-probe/summary'.*give a.json.gz",
    ):
        probe.compare(summary, runs["rate"])
    with pytest.raises(LogError, match="cannot read"):
        probe.compare(tmp_path / "none.json", runs["a"])
    for record in logs["a"]["sequences"]["E"]:
        for key in [key for key in record if key.startswith("influence_")]:
            del record[key]
    with pytest.raises(LogError, match="found one without influences"):
        probe.compare(logs["a"], runs["rate"])
    del logs["rate"]["sequences"]["E"][3]["logprob_before"]
    with pytest.raises(LogError, match="expected logprob_before of every response of E"):
        probe.compare(runs["a"], logs["rate"])
    del logs["groups"]["results"]["B_E"]
    with pytest.raises(LogError, match="found one without B_E"):
        probe.compare(logs["groups"], runs["rate"])


def test_the_page_and_the_mapping(runs, logs, capsys):
    logs["a"]["checkpoint_name"] = "evil \x1b[31m<b>"
    found = probe.compare(logs["a"], runs["rate"])
    page = str(found)
    assert "\x1b" not in page
    assert "B - A in nats, on one E: 70 responses to 70 prompts" in page
    for label in ("H before", "H after", "deltaH1", "deltaH_true", "per token", "per response"):
        assert label in page
    numbers = [line for line in page.splitlines() if str(runs["rate"]) not in line]
    assert max(map(len, numbers)) <= WIDTH
    assert "&lt;b&gt;" in found._repr_html_()
    mapping = json.loads(json.dumps(found.as_mapping(), allow_nan=False))
    assert mapping["schema"] == COMPARISON_SCHEMA
    assert mapping["B"]["path"] == str(runs["rate"])
    (row,) = [r for r in mapping["rows"] if (r["quantity"], r["estimand"]) == ("deltaH1", "token")]
    expected = found.row("deltaH1_tok")
    assert row["difference"] == expected.difference.value
    assert row["difference_ci95"] == list(expected.difference.ci95)
    assert row["A_se"] == expected.a.se
    assert row["unpaired_se"] == expected.unpaired_se
    assert len(mapping["rows"]) == 8


def test_a_compressed_and_a_plain_log_are_one(runs, tmp_path):
    plain = tmp_path / "a.json"
    plain.write_bytes(gzip.decompress(Path(runs["a"]).read_bytes()))
    found = probe.compare(plain, runs["a"])
    assert all(row.difference is None or row.difference.value == 0 for row in found.rows)

"""The log: what each level has, how large it is, and that it reads back as it was written."""

from __future__ import annotations

import gzip
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from probe.config.output import DetailedLoggingConfig
from probe.errors.exceptions import LogError
from probe.estimators.estimate import Estimate
from probe.files.log_files import LOG_SCHEMA, SCHEMA_VERSION, load_log
from probe.files.strict_json import dump, dump_bytes, to_plain
from probe.logs.distributions import histogram, moments_and_quantiles
from probe.logs.document import build_log, summary
from probe.logs.parameters import parameter_blocks, parameter_statistics
from probe.logs.records import group_table
from probe.logs.store import prune
from probe.logs.write import write_log
from probe.phases.state import ProbeState
from tests.support.synthetic_run import Tokenizer, make_result, make_state


@pytest.fixture(scope="module")
def state():
    return make_state()


@pytest.fixture(scope="module")
def small():
    return make_state(B_E=3, B_U=2, G=2, lengths=(2, 5), layers=2, shape=(2, 3))


def token_text(token):
    return Tokenizer().decode([token])


# ---------------------------------------------------------------- levels


@pytest.mark.parametrize(
    ("level", "low", "high"),
    [
        ("minimal", 500, 3_000),
        ("standard", 3_000, 16_000),
        ("detailed", 50_000, 500_000),
        ("debug", 1_000_000, 10_000_000),
    ],
)
def test_sizes_at_the_default_batch_sizes(state, level, low, high):
    data = dump_bytes(build_log(make_result(state), state, level, token_text=token_text))
    assert low <= len(data) <= high


def test_switches_below_their_level_change_nothing(state):
    result = make_result(state)
    plain = build_log(result, state, "standard")
    assert (
        build_log(result, state, "standard", log_sequences=True, log_tokens=True, log_raw_tensors=True)
        == plain
    )
    assert len(dump_bytes(plain)) < 16_000


def test_each_level_has_what_the_one_below_has(small):
    result = make_result(small)
    keys = [set(build_log(result, small, level)) for level in ("minimal", "standard", "detailed", "debug")]
    assert keys[0] < keys[1] < keys[2] < keys[3]
    assert keys[1] - keys[0] == {"distributions", "groups", "parameter_blocks", "environment", "omitted"}
    assert keys[2] - keys[1] == {"sequences"}
    assert keys[3] - keys[2] == {"parameters", "tokens", "raw"}


def test_minimal_has_the_core_metrics(small):
    log = build_log(make_result(small), small, "minimal")
    assert {"bars_dot", "deltaH1", "deltaH_true", "timing", "B_E", "B_U", "G"} <= set(log["results"])
    changes = {
        f"{name}{suffix}" for name in ("deltaH1", "deltaH_true", "residual") for suffix in ("", "_tok")
    }
    assert {f"{name}{ending}" for name in changes for ending in ("_se", "_ci95")} <= set(log["results"])
    assert next(iter(log["results"])) == "verdict"
    assert log["results"]["verdict_reasons"]
    assert "estimates" not in log["results"]
    assert set(log["results"]["diagnostics"]) == {
        *("ESS", "pareto_k", "noise_floor", "noise_floor_tok", "bias_flags")
    }
    assert log["results"]["diagnostics"]["bias_flags"] == []
    assert log["schema"] == LOG_SCHEMA
    assert log["schema_version"] == SCHEMA_VERSION
    assert log["checkpoint_path"] == "/runs/qwen/step_60"


def test_the_result_is_in_the_log_as_it_is(small):
    result = make_result(small)
    assert build_log(result, small, "standard")["results"] == to_plain(result.values)


def test_nulls_of_the_result_stay_null(small):
    result = make_result(small, deltaH_true=None, deltaH_true_ci95=None, eta_10=None)
    for level in ("minimal", "standard"):
        results = json.loads(dump(build_log(result, small, level)))["results"]
        assert results["deltaH_true"] is results["deltaH_true_ci95"] is results["eta_10"] is None


def test_the_estimates_are_in_the_log_from_standard_on(small):
    result = make_result(small)
    assert build_log(result, small, "standard")["results"]["estimates"] == result.values["estimates"]


def test_sequences_carry_texts_and_numbers(small):
    log = build_log(make_result(small), small, "detailed")
    record, E = log["sequences"]["E"][1], small.E
    assert record["completion"] == E.completions[1]
    assert record["completion_ids"] == E.completion_ids[1][E.mask[1]].tolist()
    assert log["sequences"]["prompts"][record["prompt"]] == {
        "text": E.prompts[1],
        "ids": list(E.prompt_ids[1]),
    }
    assert record["entropy_before"] == pytest.approx(float(small.E_scores.sequence_entropy[1]), rel=1e-8)
    assert record["importance_weight"] == pytest.approx(
        float(small.ground_truth.weights.weights[1]), rel=1e-8
    )
    assert {"logprob_before", "logprob_after", "entropy_after", "length", "truncated"} <= set(record)
    of_U = log["sequences"]["U"][3]
    assert of_U["reward"] == float(small.U.rewards[3])
    assert {"advantage", "logprob_before", "entropy_before", "group"} <= set(of_U)
    assert len(log["sequences"]["prompts"]) == 3 + 2


def test_influences_of_the_responses_give_the_errors_of_the_reported_numbers(small):
    """At debug to the last bit; without a phase its number has none."""
    log = build_log(make_result(small), small, "debug", token_text=token_text)
    assert log["sequences"]["E_rollouts"] is None
    for key in ("H_orig", "deltaH1", "deltaH_true", "H_orig_tok", "deltaH1_tok", "deltaH_true_tok"):
        shares = torch.tensor(log["raw"]["E"][f"influence_{key}"], dtype=torch.float64)
        found = Estimate.from_responses(0.0, shares, small.E.group)
        assert found.se == pytest.approx(log["results"][f"{key}_se"], rel=1e-12), key
        record = log["sequences"]["E"][1]
        assert record[f"influence_{key}"] == pytest.approx(float(shares[1]), rel=1e-8)
    bare = replace(small, ground_truth=None, predicted=None)
    records = build_log(make_result(small), bare, "detailed")["sequences"]["E"]
    assert not any(key.startswith("influence_") for key in records[0])


def test_without_sequences_no_text_and_no_token_id_is_left(small):
    result = make_result(small)
    log = build_log(result, small, "debug", log_sequences=False, token_text=token_text)
    text = dump(log)
    for word in ('"text"', '"ids"', '"id"', "completion", small.E.prompts[0]):
        assert word not in text
    assert log["sequences"]["E"][0]["length"] == int(small.E.lengths[0])
    assert {"key": "texts and token ids", "reason": "log_sequences is false"} in log["omitted"]


def test_tokens_and_raw_arrays_can_be_left_out(small):
    log = build_log(make_result(small), small, "debug", log_tokens=False, log_raw_tensors=False)
    assert "tokens" not in log
    assert "raw" not in log
    assert [entry["key"] for entry in log["omitted"]] == ["tokens", "raw"]


def test_tokens_have_one_entry_per_token_in_every_column(small):
    log = build_log(make_result(small), small, "debug", token_text=token_text)
    for name, batch in (("E", small.E), ("U", small.U)):
        for i, columns in enumerate(log["tokens"][name]):
            lengths = {len(values) for key, values in columns.items() if key != "index"}
            assert lengths == {int(batch.lengths[i])}
    first = log["tokens"]["E"][0]
    assert first["text"] == [token_text(token) for token in first["id"]]
    assert {"entropy_before", "entropy_after", "score_weight_entropy", "score_weight_length"} <= set(first)
    assert "loss_weight" in log["tokens"]["U"][0]


def test_a_missing_tokenizer_is_said(small):
    log = build_log(make_result(small), small, "debug")
    assert "text" not in log["tokens"]["E"][0]
    assert {"key": "tokens.*.text", "reason": "no tokenizer was given"} in log["omitted"]


def test_raw_arrays_are_exact(small):
    log = json.loads(dump(build_log(make_result(small), small, "debug")))
    raw = log["raw"]
    assert torch.equal(torch.tensor(raw["E"]["logprob_before"], dtype=torch.float64), small.E_scores.logprob)
    assert torch.equal(torch.tensor(raw["U"]["loss_weight"], dtype=torch.float64), small.update.loss_weights)
    assert torch.equal(
        torch.tensor(raw["E"]["importance_weight"], dtype=torch.float64), small.ground_truth.weights.weights
    )
    assert torch.equal(torch.tensor(raw["E"]["mask"]).bool(), small.E.mask)
    vectors = raw["vectors"]
    assert vectors["included"]
    for name, step in small.update.step.items():
        assert torch.equal(torch.tensor(vectors["step"][name]), step.flatten())
        assert torch.equal(torch.tensor(vectors["X"][name]), small.entropy_gradient.sequence(name).flatten())


def test_large_vectors_are_left_out_and_said(small, monkeypatch):
    monkeypatch.setattr("probe.logs.document.RAW_VECTOR_LIMIT", 10)
    log = build_log(make_result(small), small, "debug")
    assert log["raw"]["vectors"] == {
        "numbers": 96,
        "limit": 10,
        "included": False,
        "reason": "96 numbers are more than 10; `parameters` has their norms",
    }
    assert "raw.vectors" in [entry["key"] for entry in log["omitted"]]


@pytest.mark.parametrize("level", ["minimal", "standard", "detailed", "debug"])
def test_a_run_without_prediction_or_truth_can_be_logged(small, level):
    bare = ProbeState(sample=small.sample)
    log = build_log(make_result(small), bare, level, token_text=token_text)
    assert log.get("parameter_blocks") is None
    empty = build_log(make_result(small), ProbeState(), level)
    assert empty.get("groups") is None


def test_an_unknown_level_is_refused(small):
    with pytest.raises(
        LogError, match="level: expected one of minimal, standard, detailed, debug, found 'all'"
    ):
        build_log(make_result(small), small, "all")


def test_long_lists_and_tables_stay_out_of_standard(small):
    result = make_result(small, attribution={"tokens": 0.5, "by_sequence": [0.1] * 65})
    log = build_log(result, small, "standard")
    assert log["results"]["attribution"] == {"tokens": 0.5}
    assert log["omitted"][0]["key"] == "results.attribution.by_sequence"
    assert len(build_log(result, small, "detailed")["results"]["attribution"]["by_sequence"]) == 65
    many = make_state(B_E=2, B_U=65, G=2, lengths=(2, 3), layers=1, shape=(1, 1))
    assert build_log(make_result(many), many, "standard")["groups"] is None
    assert len(build_log(make_result(many), many, "detailed")["groups"]["size"]) == 65


# ---------------------------------------------------------------- sections


def test_contributions_of_blocks_add_up_to_the_prediction(small):
    statistics = parameter_statistics(small)
    table = parameter_blocks(statistics)
    assert table["block"] == ["base_model.model.model.layers.0", "base_model.model.model.layers.1"]
    assert sum(table["contribution"]) == pytest.approx(small.prediction.deltaH1.sequence, rel=1e-4, abs=1e-13)
    assert sum(table["contribution_tok"]) == pytest.approx(
        small.prediction.deltaH1.token, rel=1e-4, abs=1e-15
    )
    norm = math.sqrt(sum(float(step.double().square().sum()) for step in small.update.step.values()))
    assert math.hypot(*table["step_norm"]) == pytest.approx(norm, rel=1e-5)


def test_many_blocks_are_added_up_in_the_last_row():
    state = make_state(B_E=2, B_U=1, G=2, lengths=(2, 3), layers=10, shape=(2, 2))
    statistics = parameter_statistics(state)
    full, short = parameter_blocks(statistics), parameter_blocks(statistics, limit=4)
    assert short["block"][-1] == "(7 others)"
    assert len(short["block"]) == 4
    assert sum(short["numbers"]) == sum(full["numbers"])
    for column in ("contribution", "contribution_tok"):
        assert sum(short[column]) == pytest.approx(sum(full[column]), rel=1e-4, abs=1e-13)
    assert math.hypot(*short["X_norm"]) == pytest.approx(math.hypot(*full["X_norm"]), rel=1e-4)


def test_groups(small):
    table = group_table(small.U)
    assert table["size"] == [2, 2]
    assert table["reward_mean"][0] == 1.0
    assert table["zero_advantage"][0] is True
    assert table["length_mean"][1] == pytest.approx(float(small.U.lengths[2:].double().mean()), rel=1e-5)


def test_describe_against_numpy():
    values = torch.randn(101, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = moments_and_quantiles(values)
    assert found["count"] == 101
    assert found["std"] == pytest.approx(np.std(values.numpy(), ddof=1), rel=1e-5)
    assert found["q05"] == pytest.approx(np.quantile(values.numpy(), 0.05), rel=1e-5)
    assert found["median"] == pytest.approx(np.median(values.numpy()), rel=1e-5)


def test_describe_says_what_is_not_finite():
    assert moments_and_quantiles(torch.tensor([])) is None
    assert moments_and_quantiles(torch.tensor([math.nan])) == {"count": 1, "non_finite": 1}
    assert moments_and_quantiles(torch.tensor([1.0, math.inf, 3.0]))["mean"] == 2.0
    assert math.isnan(moments_and_quantiles(torch.tensor([1.0]))["std"])


def test_histograms_count_everything():
    values = torch.randn(500, generator=torch.Generator().manual_seed(0))
    found = histogram(values)
    assert sum(found["counts"]) == 500
    assert len(found["edges"]) == 17
    assert histogram(torch.tensor([2.0, 2.0])) == {"values": [2.0], "counts": [2]}
    assert histogram(torch.tensor([])) is None
    assert histogram(torch.tensor([1.0, math.nan])) is None


# ---------------------------------------------------------------- JSON


def test_json_is_strict_and_non_finite_numbers_are_null(small):
    result = make_result(small, deltaH_true=math.nan, deltaH_true_ci95=[-math.inf, np.float32(0.5)])

    def refuse(constant):
        raise AssertionError(constant)

    log = json.loads(dump_bytes(build_log(result, small, "standard")), parse_constant=refuse)
    assert log["results"]["deltaH_true"] is None
    assert log["results"]["deltaH_true_ci95"] == [None, 0.5]


def test_values_of_all_kinds_become_plain():
    value = {1: (np.int64(2), torch.tensor([1.5]), Path("a"), np.bool_(True), None, np.array([1]))}
    assert to_plain(value) == {"1": [2, [1.5], "a", True, None, [1]]}
    assert to_plain(math.inf, keep_non_finite=True) == math.inf
    with pytest.raises(LogError, match=r"results\.x\.y: expected something that JSON can hold, found object"):
        to_plain({"x": {"y": object()}}, "results")


@pytest.mark.parametrize(
    "value", [{}, [], {"a": {}}, [[1, [2, {"x": []}]]], {"a": [[]] * 9}, "ü\u2028\n", 1.5]
)
def test_the_layout_changes_no_value(value):
    assert json.loads(dump(value)) == value


def test_odd_texts_survive(small):
    odd = 'a "quoted" \\ \x00 \u2028 \ud800 \U0001f600 </script>'
    E = replace(small.E, completions=(odd,) * 3)
    state = replace(small, sample=replace(small.drawn, E=E))
    data = dump_bytes(build_log(make_result(state), state, "detailed"), compress=True)
    assert json.loads(gzip.decompress(data))["sequences"]["E"][0]["completion"] == odd


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("level", ["minimal", "standard", "detailed", "debug"])
def test_round_trip(small, tmp_path, level, compress):
    result = make_result(small)
    config = DetailedLoggingConfig(level=level, compress=compress, output_directory=str(tmp_path))
    paths = write_log(result, small, config, token_text)
    assert load_log(paths.main) == build_log(result, small, level, token_text=token_text)
    files = {"main": paths.main.name, "config": paths.config.name}
    assert load_log(paths.summary) == summary(result, level, files)
    assert paths.main.name.endswith(".json.gz") is compress


def write(path, document):
    path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
    return path


HEAD = {"schema": LOG_SCHEMA, "schema_version": SCHEMA_VERSION}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"{}" * 500, mtime=0)[:-20], "its gzip data is cut off or damaged"),
        (b"\x1f\x8bnonsense", "its gzip data is cut off or damaged"),
        (b'{"schema": "entropy', "expected JSON"),
        (b"", "expected JSON"),
        (b"\xff\xfe\x00", "expected UTF-8"),
        ([1], "expected a log or summary of entropy-probe .* found schema None"),
        ({"schema": "other"}, "found schema 'other'"),
        (HEAD | {"schema_version": "1"}, "expected an integer schema_version, found '1'"),
        (HEAD | {"schema_version": True}, "expected an integer schema_version, found True"),
        (HEAD | {"schema_version": 99}, "expected schema_version 1 or older, found 99; update entropy-probe"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path, content, message):
    with pytest.raises(LogError, match=message):
        load_log(write(tmp_path / "x.json", content))


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(LogError, match=r"cannot read .*none\.json: No such file"):
        load_log(tmp_path / "none.json")


def test_a_log_of_this_version_loads_whatever_its_name(tmp_path):
    path = write(tmp_path / "renamed.txt", gzip.compress(json.dumps(HEAD).encode()))
    assert load_log(path) == HEAD


# ---------------------------------------------------------------- pruning


def stored(folder, small, starts, **options):
    config = DetailedLoggingConfig(output_directory=str(folder), level="minimal", **options)
    return [write_log(replace(make_result(small), started_at=start), small, config) for start in starts]


def test_the_oldest_runs_go_with_all_their_files(small, tmp_path):
    starts = [f"2025-01-{day:02d}T10:00:00+01:00" for day in (15, 14, 16, 13)]
    runs = stored(tmp_path, small, starts)
    deleted = prune(tmp_path, 2)
    assert sorted(deleted) == sorted(path for run in (runs[1], runs[3]) for path in vars(run).values())
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["2025-01-15", "2025-01-16"]
    assert all(path.exists() for run in (runs[0], runs[2]) for path in vars(run).values())
    assert prune(tmp_path, 2) == []


def test_runs_of_the_same_second_go_in_their_order(small, tmp_path):
    runs = stored(tmp_path, small, ["2025-01-15T10:00:00"] * 12)
    prune(tmp_path, 3)
    assert [run.main.exists() for run in runs] == [False] * 9 + [True] * 3


def test_the_run_just_written_stays(small, tmp_path):
    first, second = stored(tmp_path, small, ["2025-01-14T10:00:00", "2025-01-15T10:00:00"])
    prune(tmp_path, 1, keep=first.main)
    assert first.main.exists()
    assert second.main.exists()


def test_nothing_of_others_is_touched(small, tmp_path):
    (run,) = stored(tmp_path, small, ["2025-01-14T10:00:00"], compress=False)
    folder = run.main.parent
    others = [
        tmp_path / "version_0" / "events.out.tfevents.1",
        folder / "events.out.tfevents.1",
        folder / "notes.json",
        folder / "notes.json.gz",
        folder / "other_config.yaml",
        folder / "other_summary.json",
        folder / "binary.json",
        tmp_path / "2025-01-13",
    ]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(
            b"\xff" if path.name == "binary.json" else b'{"schema": "mine", "started_at": "2020"}'
        )
    (folder / "a_folder.json").mkdir()
    (folder / "link.json").symlink_to(run.main)
    stored(tmp_path, small, ["2025-01-15T10:00:00"])
    prune(tmp_path, 1)
    assert not run.main.exists()
    assert not run.config.exists()
    assert all(path.exists() for path in others)
    assert (folder / "link.json").is_symlink()


def test_files_left_by_an_interrupted_run_are_pruned_too(small, tmp_path):
    old, _ = stored(tmp_path, small, ["2025-01-14T10:00:00", "2025-01-15T10:00:00"])
    old.summary.unlink()
    assert sorted(prune(tmp_path, 1)) == sorted([old.main, old.config])


def test_a_file_that_cannot_be_deleted_is_named(small, tmp_path, monkeypatch):
    stored(tmp_path, small, ["2025-01-14T10:00:00", "2025-01-15T10:00:00"])

    def refuse(self, missing_ok=False):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(
        LogError, match=r"2025-01-14.*Permission denied; choose a folder that you may write to"
    ):
        prune(tmp_path, 1)


def test_pruning_a_folder_that_is_not_there_does_nothing(tmp_path):
    assert prune(tmp_path / "none", 1) == []


# ---------------------------------------------------------------- documentation


def test_every_key_is_documented(small):
    docs = Path(__file__).parents[2] / "docs"
    document = "".join(
        (docs / page).read_text(encoding="utf-8") for page in ("log_schema.md", "quantities.md")
    )
    log = build_log(make_result(small), small, "debug", token_text=token_text)
    keys = (
        set(log) | set(summary(make_result(small), "debug")) | set(log["distributions"]) | set(log["groups"])
    )
    keys |= set(log["parameter_blocks"]) | set(log["distributions"]["E/length"])
    keys |= set(log["raw"]["E"]) | set(log["raw"]["U"]) | set(log["raw"]["vectors"])
    for name in ("E", "U"):
        keys |= set(log["sequences"][name][0]) | set(log["tokens"][name][0])
    keys |= set(log["results"]) | set(log["results"]["diagnostics"])
    keys |= set(make_result(small).values["estimates"][0])
    missing = {key for key in keys if not re.search(rf"[`.{{ ,]{re.escape(key)}[`}}, ]", document)}
    assert missing == set()
    assert f"schema version {SCHEMA_VERSION}" in document

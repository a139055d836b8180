"""Two policies on one E: from logs of an enumerable one, exact against one estimator, and in distribution."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import scipy.stats
import torch
from torch import Tensor
from transformers.models.qwen2 import modeling_qwen2

import probe
from probe.data.batch import RolloutBatch
from probe.errors.exceptions import LogError
from probe.estimand import ESTIMANDS
from probe.estimators.entropy_change import snis_entropy
from probe.estimators.estimate import estimate
from probe.estimators.ground_truth import change_by, entropy_before
from probe.files.log_files import LOG_SCHEMA
from probe.logs.distributions import RECORD_DIGITS, rounded
from probe.results.changes import reported
from probe.scoring import Policy, TokenScores, score_tokens
from tests.support.enumerable import float64_norm, tiny_model
from tests.support.exact import enumerate_prompts, exact, random_step, sample_rows, take_scores

PROMPTS = [(0, 1), (1, 2), (2, 2), (3, 0), (1, 0)]
SIZE = 64
REPETITIONS, LARGE, SEED = 300, 256, 5
"""Of coverage: influences on these differences have heavy tails, and Student's intervals from 64 prompts are wide."""
KEYS = ("H_orig", "H_orig_tok", "H_upd", "H_upd_tok", "deltaH_true", "deltaH_true_tok")


@dataclass(frozen=True)
class Space:
    """Every response of four policies: A and B, each before and after an update of its own.

    Attributes:
        batch: all responses.
        probability: of each under A before its update.
        scores: by `A before`, ..., `B after`.
        entropy: exact `[H_seq, H_tok]`, likewise.
    """

    batch: RolloutBatch
    probability: Tensor
    scores: dict[str, TokenScores]
    entropy: dict[str, Tensor]

    def exact(self, key):
        """B - A of a quantity."""
        k = 1 if key.endswith("_tok") else 0
        before, after = (
            float(self.entropy[f"B {when}"][k] - self.entropy[f"A {when}"][k]) for when in ("before", "after")
        )
        return {"H_orig": before, "H_upd": after, "deltaH_true": after - before}[key.removesuffix("_tok")]

    def draw(self, g, size=SIZE, responses=1):
        """Logs of A and B on one E that A has drawn."""
        rows, group = sample_rows(self.probability, size, responses, self.batch.group, g)
        return [self.log(name, rows, group) for name in ("A", "B")]

    def log(self, name, rows, group):
        """The log of a run as the probe writes it, as far as a comparison reads it."""
        old, new = (take_scores(self.scores[f"{name} {when}"], rows) for when in ("before", "after"))
        level, change = entropy_before(old, group), change_by("per_decision", old, new, group)
        results, columns = {"B_E": len(rows), "diagnostics": {}}, {"length": old.lengths.tolist()}
        for when, one in (("before", old), ("after", new)):
            columns[f"logprob_{when}"] = rounded(one.sequence_logprob, RECORD_DIGITS)
            columns[f"entropy_{when}"] = rounded(one.sequence_entropy, RECORD_DIGITS)
        for quantity, found in (("H_orig", level), ("deltaH_true", change)):
            for estimand in ESTIMANDS:
                key, number = estimand.key(quantity), reported(found[estimand])
                results |= {key: number.value, f"{key}_se": number.se, f"{key}_df": number.df}
                results[f"{key}_ci95"] = list(number.ci95)
                columns[f"influence_{key}"] = rounded(found[estimand].by_response(group), RECORD_DIGITS)
        for estimand in ESTIMANDS:
            results[estimand.key("H_upd")] = level[estimand].value + change[estimand].value
            results[estimand.key("deltaH1")] = -1.0
        drawn = self.batch.subset(rows)
        records = [
            {
                "group": int(group[i]),
                "prompt": PROMPTS.index(drawn.prompt_ids[i]),
                "completion_ids": drawn.completion_ids[i][drawn.mask[i]].tolist(),
                **{column: values[i] for column, values in columns.items()},
            }
            for i in range(len(rows))
        ]
        prompts = [{"text": str(one), "ids": list(one)} for one in PROMPTS]
        sequences = {"prompts": prompts, "E": records, "influence_fit": {}}
        sequences["E_rollouts"] = None if name == "A" else "A.json.gz"
        paths = {"checkpoint_name": name, "checkpoint_path": f"/runs/{name}", "started_at": "2026-01-01"}
        return {
            "schema": LOG_SCHEMA,
            "level": "detailed",
            **paths,
            "results": results,
            "sequences": sequences,
        }


@pytest.fixture(scope="module")
def space():
    """B's policy is some steps from A's, so that averages without weights are of neither."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", float64_norm)
        policy = Policy(tiny_model(0), temperature=0.8, microbatch_size=256, head_chunk_tokens=5000)
        batch = enumerate_prompts(PROMPTS)
        step, away, own = (
            random_step(policy, size, seed) for size, seed in ((0.006, 0), (0.012, 4), (0.006, 3))
        )
        moves = {
            "A before": {name: 0 * one for name, one in step.items()},
            "A after": step,
            "B before": away,
            "B after": {name: one + 0.9 * step[name] + 0.4 * own[name] for name, one in away.items()},
        }
        scores, entropy = {}, {}
        for name, move in moves.items():
            values = {key: value.detach() + move[key] for key, value in policy.parameters.items()}
            scores[name] = score_tokens(policy.at(values), batch)
            entropy[name] = exact(policy, batch, values)[0]
        yield Space(batch, exact(policy, batch)[1], scores, entropy)


def column(log, name):
    return torch.tensor([record[name] for record in log["sequences"]["E"]], dtype=torch.float64)


@pytest.mark.parametrize("responses", [1, 3])
def test_every_difference_is_one_estimator_of_the_weights(space, responses):
    """Against the jackknife of the difference of differences itself."""
    a, b = space.draw(torch.Generator().manual_seed(1), responses=responses)
    found = probe.compare(a, b)
    assert (found.how, found.same_policy, found.prompts) == ("paired", False, SIZE)
    assert {row.key for row in found.rows} == set(KEYS)
    T, group = column(a, "length"), column(a, "group").long()

    def level(q, log, when):
        log_w = column(log, f"logprob_{when}") - column(a, "logprob_before")
        return snis_entropy(q, log_w, column(log, f"entropy_{when}"), T)

    expected = {
        "H_orig": lambda q, log: level(q, log, "before"),
        "H_upd": lambda q, log: level(q, log, "after"),
        "deltaH_true": lambda q, log: level(q, log, "after") - level(q, log, "before"),
    }
    for name, part in expected.items():
        difference = estimate(lambda q, part=part: part(q, b) - part(q, a), group)
        cells = [estimate(lambda q, part=part, log=log: part(q, log), group) for log in (a, b)]
        for k, suffix in enumerate(("", "_tok")):
            row = found.row(f"{name}{suffix}")
            for number, one in zip((row.difference, row.a, row.b), (difference, *cells), strict=True):
                assert number.value == pytest.approx(one[k].value, rel=1e-9)
                assert number.se == pytest.approx(one[k].se, rel=1e-7)
                assert number.df == pytest.approx(one[k].df, rel=1e-6)
            assert row.unpaired_se is None
            assert row.gain is None
    assert found.row("H_orig").a.value == pytest.approx(
        a["results"]["H_orig"]
    )  # the owner's own, without weights
    assert found.row("deltaH_true").b.value != pytest.approx(b["results"]["deltaH_true"], rel=1e-3)
    text = " ".join(found.notes)
    assert "E was drawn from A's. All numbers are of these responses, by one importance weight" in text
    for of in ("B before ESS", "A after ESS", "B after ESS", "deltaH1 is not compared"):
        assert of in text


def test_the_one_that_has_drawn_e_is_the_owner_in_either_place(space):
    a, b = space.draw(torch.Generator().manual_seed(2))
    found, back = probe.compare(a, b), probe.compare(b, a)
    for key in KEYS:
        row, other = found.row(key), back.row(key)
        assert other.difference.value == pytest.approx(-row.difference.value)
        assert other.difference.se == pytest.approx(row.difference.se)
        assert other.a.value == pytest.approx(row.b.value)


def test_an_e_that_both_have_drawn_is_as_one_of_a(space):
    """The same seed gives neighbours the same responses; averages without weights would be of neither."""
    a, b = space.draw(torch.Generator().manual_seed(3))
    found = probe.compare(a, b)
    b["sequences"]["E_rollouts"] = None
    both = probe.compare(a, b)
    assert both.rows == found.rows
    assert "E was drawn from A's (as the other one has: A's are taken)" in both.notes[0]


def test_changes_with_uneven_weights_are_left_out_alone(space):
    a, b = space.draw(torch.Generator().manual_seed(4))
    for record in b["sequences"]["E"][:2]:
        record["logprob_after"] += 5.0
    found = probe.compare(a, b)
    assert {row.quantity for row in found.rows} == {"H_orig"}
    left_out = (
        "H after and deltaH_true are not compared: weights after the updates are too uneven (B after ESS"
    )
    assert left_out in " ".join(found.notes)
    for record in a["sequences"]["E"]:
        del record["logprob_after"], record["entropy_after"]
    assert {row.quantity for row in probe.compare(a, b).rows} == {"H_orig"}
    for record in b["sequences"]["E"][:2]:
        record["logprob_before"] += 5.0
    with pytest.raises(
        LogError,
        match=r"importance weights that are too uneven \(B before ESS .*; compare runs with an E of each",
    ):
        probe.compare(a, b)


def test_differences_below_the_noise_floor_are_not_resolved(space):
    a, b = space.draw(torch.Generator().manual_seed(5))
    level = probe.compare(a, b).row("H_orig_tok").difference.value
    size = abs(probe.compare(a, b).row("deltaH_true_tok").a.value)
    b["results"]["diagnostics"]["noise_floor_tok"] = 2 * abs(level)
    found = probe.compare(a, b)
    assert found.row("H_orig_tok").difference is None
    assert found.row("H_orig_tok").note.startswith("B - A is below the noise floor")
    assert found.row("H_orig").difference is not None
    a["results"]["diagnostics"]["noise_floor_tok"] = 2 * size
    row = probe.compare(a, b).row("deltaH_true_tok")
    assert row.difference is None
    assert row.a.value is None
    assert row.note.startswith("A")
    assert row.note.endswith("not resolved (below the noise floor)")


def test_neighbours_within_rounding_are_two_policies(space):
    """Where the logs name two checkpoints, log-probs that are as near as those of 16 bits do not make them one."""
    a, _ = space.draw(torch.Generator().manual_seed(6))
    b = copy.deepcopy(a)
    g = torch.Generator().manual_seed(7)
    for record in b["sequences"]["E"]:
        record["logprob_before"] += 0.02 * float(torch.rand((), generator=g)) - 0.01
    for log in (a, b):
        log["results"]["diagnostics"]["bias_flags"] = ["half_precision"]
    assert probe.compare(a, b).same_policy is True  # one checkpoint
    b["checkpoint_path"] = "/runs/other"
    assert probe.compare(a, b).same_policy is False
    exactly = copy.deepcopy(a)
    exactly["checkpoint_path"] = None
    assert probe.compare(a, exactly).same_policy is True  # weights of 1


@pytest.mark.slow
def test_intervals_cover_the_exact_differences_of_two_policies(space, capsys):
    """At 95 %, within what 300 draws leave open, each way through two logs."""
    low, high = scipy.stats.binom.ppf([5e-5, 1 - 5e-5], REPETITIONS, 0.95) / REPETITIONS
    g, inside = torch.Generator().manual_seed(SEED), dict.fromkeys(KEYS, 0)
    errors = {key: [] for key in KEYS}
    for _ in range(REPETITIONS):
        found = probe.compare(*space.draw(g, LARGE))
        for key in KEYS:
            difference, truth = found.row(key).difference, space.exact(key)
            inside[key] += difference.ci95[0] <= truth <= difference.ci95[1]
            errors[key].append((difference.value - truth) / difference.se)
    with capsys.disabled():
        print("\ntwo policies: covered, mean and spread of errors in standard errors")
        for key, count in inside.items():
            z = torch.tensor(errors[key], dtype=torch.float64)
            print(f"  {key:16} {count / REPETITIONS:6.1%} {float(z.mean()):6.2f} {float(z.std()):6.2f}")
    for key, count in inside.items():
        assert low <= count / REPETITIONS <= high, key

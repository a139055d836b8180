"""A remedy in the words of a run and in those of a training."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import torch

import probe
from probe.config.schema import SECTIONS
from probe.errors.exceptions import DataError, NumericalError, ProbeError, in_words_of
from probe.errors.remedies import Message, Remedy
from probe.estimators.importance_weights import weight_diagnostics
from probe.verdict import verdict
from tests.support.synthetic_run import make_values

SOURCES = sorted(Path(probe.__file__).parent.rglob("*.py"))
SETTING_OF_A_RUN = re.compile(rf"\b({'|'.join(SECTIONS)})\.\w")


@pytest.mark.parametrize("remedy", list(Remedy), ids=lambda remedy: remedy.name)
def test_every_remedy_is_given_and_names_no_setting_that_a_training_lacks(remedy):
    given = [file.name for file in SOURCES if f"Remedy.{remedy.name}" in file.read_text(encoding="utf-8")]
    assert given
    assert SETTING_OF_A_RUN.search(remedy.run)
    assert not SETTING_OF_A_RUN.search(remedy.training)
    assert "lower" not in remedy.training  # the step is what is measured


def test_an_error_speaks_to_a_run_until_a_training_shows_it():
    error = DataError("too few; raise ", Remedy.B_E)
    assert str(error) == "too few; raise batch_config.B_E"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    with pytest.raises(DataError, match=r"^too few; raise B_E$"), in_words_of("training"):
        raise error


def test_an_error_from_deep_down_can_be_said_to_both():
    infinite = torch.tensor([0.0, torch.inf], dtype=torch.float64)
    with pytest.raises(NumericalError, match=r"\(lower probe_rework\.learning_rate\)$"):
        weight_diagnostics(infinite)
    with (
        pytest.raises(NumericalError, match=r"\(a smaller step can be measured\)$"),
        in_words_of("training"),
    ):
        weight_diagnostics(infinite)


def test_other_errors_pass_as_they_are():
    with pytest.raises(KeyError, match=r"batch_config\.B_E"), in_words_of("training"):
        raise KeyError("batch_config.B_E")
    with pytest.raises(ProbeError, match=r"^plain$"), in_words_of("training"):
        raise ProbeError("plain")


def test_a_message_as_a_text():
    assert str(Message(("set ", Remedy.FLOAT32, "."))) == "set checkpoint.dtype: float32."


VERDICTS = {
    "too few": (
        {"deltaH_true_tok_se": 0.0008},
        "batch_config.B_E of about 2700 (now 1024) excludes 0, or raise probe_rework.learning_rate.",
        "B_E of about 2700 (now 1024) excludes 0, as does the mean over several probes.",
    ),
    "far too few": (
        {"deltaH_true_tok_se": 0.8},
        "1000 times batch_config.B_E (1024) would be needed: raise probe_rework.learning_rate.",
        "1000 times B_E (1024) would be needed: read the mean over several probes.",
    ),
    "null": (
        {"deltaH_true_tok": None},
        "; raise probe_rework.learning_rate, or set checkpoint.dtype: float64.",
        "; set float64 weights.",
    ),
    "curved": (
        {"deltaH2_tok": 0.0005},
        "; lower probe_rework.learning_rate (now",
        "; the step is large (now",
    ),
    "apart": (
        {"deltaH1_tok": -0.0018},
        "(0.000568); lower probe_rework.learning_rate: what is curvature",
        "(0.000568); what is curvature",
    ),
    "heavy tail": (
        {"pareto_k": 0.68},
        "; lower probe_rework.learning_rate or raise batch_config.B_E.",
        "; raise B_E.",
    ),
    "few": ({"distinct_responses": 9}, "; raise batch_config.B_E, or take", "; raise B_E, or take"),
    "cut off": ({"truncated_fraction": 0.5}, "; raise generation.max_new_tokens.", "; raise max_new_tokens."),
    "constant": (
        {"step_difference": 0.9, "step_difference_error": 0.0},
        "; set probe_rework.derivative_mode: finite_difference.",
        "; set derivative: finite_difference.",
    ),
    "two ways": (
        {"derivative_agreement": 0.02},
        "; set checkpoint.dtype: float64, or try another checkpoint.attn_implementation.",
        "; set float64 weights, or try another attn_implementation.",
    ),
    "16 bits": (
        {"bias_flags": ["half_precision"], "noise_floor": ..., "noise_floor_tok": ...},
        "; set checkpoint.dtype: float32.",
        "; set float32 weights.",
    ),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_the_verdict_in_both_words(case):
    changes, of_a_run, of_a_training = VERDICTS[case]
    found = verdict(make_values(**changes))
    assert any(of_a_run in reason for reason in found.reasons), found.reasons
    said = found.in_words_of("training")
    assert any(of_a_training in reason for reason in said), said
    assert not any(SETTING_OF_A_RUN.search(reason) for reason in said)

"""What bias flags mean for a result."""

from __future__ import annotations

from collections.abc import Callable

from probe.errors.remedies import Remedy
from probe.estimand import ESTIMANDS
from probe.text import percent
from probe.verdict.facts import Facts, number
from probe.verdict.words import Finding, caution, invalid


def flag_finding(flag: str, facts: Facts) -> Finding | None:
    """What a bias flag means for the result."""
    if flag in _FOUND:
        return _FOUND[flag](facts)
    if flag in _DOUBTED:
        sentence, doubts = _DOUBTED[flag]
        counted = _doubts(facts, doubts)
        return caution(sentence.format(counted=f" ({counted})" if counted else ""))
    return _FLAGS.get(flag, caution(f"The run is flagged {flag}: its numbers are biased in a known way."))


def _half_precision(facts: Facts) -> Finding | None:
    # With a measured floor, `near_noise_floor` knows whether 16 bits are enough.
    if any(facts.noise_floor(estimand) is not None for estimand in ESTIMANDS):
        return None
    return caution(
        "Forwards run in 16 bits and no noise floor was measured: changes below about 0.01 nats per response can be "
        "rounding; set ",
        Remedy.FLOAT32,
        ".",
    )


def _dropout(facts: Facts) -> Finding:
    p = number(facts.diagnostics, "dropout")
    return caution(
        f"The training draws dropout{'' if p is None else f' of {p:g}'} in the update's gradient, the probe takes the "
        "update without: the training's step differs by that noise (TRL: disable_dropout=True).",
    )


def _another_base(facts: Facts) -> Finding:
    recorded = facts.diagnostics.get("base_recorded", "another base")
    given = facts.diagnostics.get("base_given", "this one")
    return caution(
        f"The adapter was trained on {recorded} and is put on {given}; unless they are one model, this is not the "
        "policy that was trained: name the right base in checkpoint.backbone.",
    )


def _rounded_step(facts: Facts) -> Finding:
    moved, exact = (
        number(facts.diagnostics, "rounded_moved"),
        number(facts.diagnostics, "rounded_moved_exact"),
    )
    share = ""
    if moved is not None and exact is not None:
        share = f": it moves {percent(moved)} of them, not {percent(exact)}"
    kept = facts.diagnostics.get("rounded_to", "16 bits")
    return caution(
        f"The training keeps weights and moments in {kept}, where much of its step is rounded away{share}. "
        "deltaH_true is of the rounded step, deltaH1 of the exact one; train with float32 weights for the exact step.",
    )


def _another_policy(facts: Facts) -> Finding:
    z = number(facts.diagnostics, "on_policy_z")
    off = "" if z is None else f": the mean of sum_t (l + h) is {z:.3g} standard errors from 0"
    return invalid(
        f"E was not drawn from the policy that is probed{off}; sample E (leave out batch_config.E_rollouts), or give "
        "the checkpoint and generation.temperature that E was drawn with.",
    )


_FOUND: dict[str, Callable[[Facts], Finding | None]] = {
    "half_precision": _half_precision,
    "dropout": _dropout,
    "another_base": _another_base,
    "rounded_step": _rounded_step,
    "E_not_from_this_policy": _another_policy,
}
"""Bias flags whose meaning depends on the diagnostics."""
_FLAGS: dict[str, Finding] = {
    "truncated_support": invalid(
        "Sampling cut the policy's support, so weights and score terms are undefined outside it; set "
        "generation.top_p: 1, top_k: 0 and min_p: 0.",
    ),
    "E_shares_U": invalid(
        "The rollout file of E holds responses that the update was made from (the same prompt, group and place): "
        "prediction and measurement are biased alike; give E responses of its own (leave out batch_config.E_rollouts "
        "to sample it).",
    ),
    "unknown_cap": caution(
        "Responses of a rollout file are longer than generation.max_new_tokens, so which were cut off is not known; "
        "set it to the limit they were drawn with.",
    ),
    "no_reward_signal": caution(
        "Every advantage of U is 0: the step has no policy gradient, and the change is that of momentum, weight decay "
        "and the loss's KL and entropy terms; raise batch_config.B_U or G, or check the reward.",
    ),
    "rollouts_of_several_updates": caution(
        "The training makes several updates from the rollouts of one generation (steps_per_generation, "
        "num_iterations): those of the next update may be older than the checkpoint, and U is drawn from the "
        "checkpoint; take U from a file (batch_config.U_rollouts).",
    ),
    "means_of_microbatches": caution(
        "The training works parts of its loss out over generations, or over the microbatches of several processes, the "
        "probe over those of one process: the gradients differ as far as these do.",
    ),
    "schedule_at_zero": caution(
        "The saved learning rate is 0, so that the next step of the training would be 0: this one is at an earlier "
        "rate of its schedule; set probe_rework.learning_rate.",
    ),
    "order_of_rows": caution(
        "The training makes several updates from one generation, or works parts of its loss out in microbatches, and "
        "U's file does not tell which rows these are: the gradients differ as far as the rows do; record the rollouts "
        "with RolloutRecorderCallback.",
    ),
    "reward_weights": caution(
        "The training weights its rewards (reward_weights) or normalises each on its own "
        "(multi_objective_aggregation), and those of the rollout file are added up: give it a column `advantage`, or "
        "one reward in batch_config.reward_columns.",
    ),
    "preconditioned_step": caution(
        "deltaH1 is for the preconditioned gradient, which is not the step that deltaH_true measures: do not compare "
        "them; set probe_rework.step: optimizer.",
    ),
}
"""Bias flags whose meaning does not depend on anything else."""
_DOUBT_WORDS = {
    "tokens": "may have been sampled in other tokens",
    "text": "do not come back from their tokens",
    "end": "are given an end that their text does not show",
    "no_end": "end in a way that neither the file nor the settings tell",
    "prompt": "have prompts that may be other tokens",
}
"""What is said of the responses with a doubt, see `RolloutBatch.doubts`."""
_DOUBTED: dict[str, tuple[str, tuple[str, ...]]] = {
    "retokenized": (
        "A rollout file gave text without token ids: the tokens may not be those that were sampled{counted}; give it "
        "completion_ids.",
        ("tokens", "text", "end"),
    ),
    "ended_without_eos": (
        "Responses of a rollout file end neither with EOS nor at the token limit nor, as far as anything says, with a "
        "stop string: their last decision is missing{counted}; keep EOS in the file, give it finish_reason or "
        "truncated, or set generation.max_new_tokens and generation.stop_strings to what they were drawn with.",
        ("no_end",),
    ),
    "prompt_uncertain": (
        "Prompts of a rollout file may not be the tokens that the responses were sampled after{counted}; give it "
        "prompt_ids, or set batch_config.chat_template_kwargs ({{}} for none) and continue_final_message to what the "
        "training had.",
        ("prompt",),
    ),
}
"""Bias flags whose sentence counts the responses that they concern, and the doubts that are counted."""


def _doubts(facts: Facts, doubts: tuple[str, ...]) -> str:
    """How many responses of which batch have which doubt."""
    found = facts.diagnostics.get("rollout_doubts") or {}
    parts = [
        f"{counts[doubt]} of {counts['of']} in {batch} {_DOUBT_WORDS[doubt]}"
        for batch, counts in found.items()
        for doubt in doubts
        if counts.get(doubt)
    ]
    return "; ".join(parts or [f"0 of {counts['of']} in {batch} in doubt" for batch, counts in found.items()])

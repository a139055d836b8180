from __future__ import annotations

import math
import sys

import pytest
import torch

from probe.data.batch import RolloutBatch
from probe.data.reward_calls import REWARDS, call_reward, compute_rewards, resolve_rewards
from probe.data.rewards import exact_number, gsm8k, tag_format
from probe.errors.exceptions import DataError


def make_batch(completions, rows=(), prompts=None) -> RolloutBatch:
    B = len(completions)
    lengths = torch.arange(1, B + 1)
    return RolloutBatch(
        prompts=tuple(prompts or (f"question {i}" for i in range(B))),
        completions=tuple(completions),
        prompt_ids=tuple((1,) for _ in range(B)),
        completion_ids=torch.arange(B * B).reshape(B, B),
        mask=torch.arange(B) < lengths[:, None],
        truncated=torch.zeros(B, dtype=torch.bool),
        group=torch.arange(B),
        rows=tuple(rows),
    )


@pytest.mark.parametrize(
    ("completion", "reference", "expected"),
    [
        ("The answer is 42.", "42", 1.0),
        ("42", 42, 1.0),
        ("42.0", "42", 1.0),
        ("It costs $1,234.50 in all.", "1234.5", 1.0),
        ("That is 10%.", "10%", 1.0),
        ("x = -5", "-5", 1.0),
        ("A loss of -$5", "-5", 1.0),
        ("It is \u22127 degrees", "-7", 1.0),
        ("8-3", "3", 1.0),
        ("0.3", "0.30", 1.0),
        (".5", "0.5", 1.0),
        ("1e3", "1,000", 1.0),
        (r"\boxed{17}", "17", 1.0),
        ("9" * 5000, "9" * 5000, 1.0),
        ("First 41, then 42, so 43.", "42", 0.0),
        ("no number", "42", 0.0),
        ("", "42", 0.0),
        ("5", "-5", 0.0),
        ("1,2,3", "123", 0.0),
        ("<answer>7</answer> and 8 more words", "7", 1.0),
        ("<think>7</think><answer>8</answer>", "7", 0.0),
        ("<answer>1</answer> no: <answer>\n2\n</answer>", "2", 1.0),
        ("<answer>none</answer> 7", "7", 0.0),
        ("<answer>7", "7", 1.0),
    ],
)
def test_exact_number(completion, reference, expected):
    assert exact_number(["?"], [completion], answer=[reference]) == [expected]


def test_gsm8k_reads_the_reference_after_the_mark():
    answer = "He has 3*4=<<3*4=12>>12 apples.\n#### 1,200"
    completions = ["<think>12</think> <answer>$1200</answer>", "so 1200.", "12"]
    assert gsm8k(["?"] * 3, completions, answer=[answer] * 3) == [1.0, 1.0, 0.0]


def test_rewards_take_messages():
    message = [{"role": "assistant", "content": "so 12"}]
    assert exact_number(["?"], [message], answer=["12"]) == [1.0]
    assert tag_format(["?"], [message]) == [0.0]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n<think>a\nb</think>\n\n<answer>\nb</answer>\n", 1.0),
        ("<think></think><answer></answer>", 1.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think>", 0.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer> and", 0.0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0),
        ("<think>a<answer>c</answer></think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("", 0.0),
    ],
)
def test_tag_format(completion, expected):
    assert tag_format(["?"], [completion]) == [expected]


def test_missing_answer_column():
    with pytest.raises(DataError, match=r"reward gsm8k: expected the reference .* found the columns x; set"):
        gsm8k(["?"], ["1"], x=["1"])


def test_reference_without_number():
    with pytest.raises(DataError, match="expected a reference answer with a number, found 'yes'"):
        exact_number(["?"], ["1"], answer=["yes"])


def test_gsm8k_reference_without_mark():
    with pytest.raises(DataError, match=r"result after ####, found '12'; .* exact_number"):
        gsm8k(["?"], ["12"], answer=["12"])


def test_compute_rewards_calls_once_with_every_column_and_the_token_ids():
    seen = []

    def reward(prompts, completions, completion_ids, level, **columns):
        seen.append((prompts, completions, completion_ids, level, columns["trainer_state"]))
        columns["log_extra"]("column", [1])
        columns["log_metric"]("metric", 1.0)
        return [x / 3 for x in level]

    rows = [{"level": 1, "prompt": "raw", "completion": "x"}, {"level": 2}]
    rewards = compute_rewards([reward], make_batch(["a", "b"], rows))
    assert rewards.dtype == torch.float64
    assert rewards.tolist() == [[1 / 3], [2 / 3]]
    assert seen == [(["question 0", "question 1"], ["a", "b"], [[0], [2, 3]], [1, 2], None)]


def test_message_prompts_are_passed_as_trl_passes_them():
    messages = [{"role": "user", "content": "2+2?"}]

    def reward(prompts, completions):
        assert prompts == [messages]
        return [float(completions[0][0]["content"] == "4")]

    assert compute_rewards([reward], make_batch(["4"], [{"prompt": messages}])).tolist() == [[1.0]]


def test_functions_without_kwargs_get_what_they_accept():
    assert call_reward(lambda prompts, completions: [1], ["p"], ["c"], {"answer": ["1"]}) == [1.0]
    assert call_reward(lambda completions, answer, **_: answer, ["p"], ["c"], {"answer": [2]}) == [2.0]


@pytest.mark.parametrize(
    "value",
    [1, True, 1.0, torch.tensor(1.0), torch.tensor([1]), torch.ones(1, dtype=torch.float64).numpy()[0]],
)
def test_any_kind_of_number_is_taken(value):
    found = call_reward(lambda prompts, completions: [value], ["p"], ["c"], {})
    assert found == [1.0]
    assert type(found[0]) is float


def test_an_error_of_the_package_is_passed_on_as_it_is():
    def mine(prompts, completions):
        raise DataError("no good")

    with pytest.raises(DataError, match=r"^no good$"):
        call_reward(mine, ["p"], ["c"], {})


def test_a_callable_without_a_signature_gets_every_column():
    class Reward:
        __signature__ = "unreadable"

        def __call__(self, prompts, completions, **columns):
            return columns["answer"]

    assert call_reward(Reward(), ["p"], ["c"], {"answer": [2], "x": [3]}) == [2.0]


def test_a_tensor_of_rewards_is_taken():
    assert call_reward(lambda prompts, completions: torch.tensor([0.5, 2]), ["p"] * 2, ["c"] * 2, {}) == [
        0.5,
        2.0,
    ]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([math.nan], "expected a finite number, found nan"),
        ([-math.inf], "expected a finite number, found -inf"),
        ([torch.tensor(math.nan)], "expected a finite number, found nan"),
        ([], "expected 1 numbers, found 0"),
        ([1.0, 2.0, 3.0], "expected 1 numbers, found 3"),
        (["1"], "expected a number or None, found '1' of type str"),
        (1.0, "failed with TypeError: 'float' object is not iterable"),
    ],
)
def test_a_bad_return_value_names_the_sample(returned, message):
    def mine(prompts, completions, **columns):
        if isinstance(returned, list) and len(completions) == 2 and len(returned) == 1:
            return [0.0, *returned]
        return returned if "bad" in completions else [0.0]

    long_prompt = "p" * 70
    batch = make_batch(["good", "bad"], prompts=["x", long_prompt])
    with pytest.raises(DataError, match=rf"^sample 1 \(prompt '{'p' * 60}'\): reward mine:? {message}"):
        compute_rewards([mine], batch)


def test_rewards_may_compare_responses():
    """A ranking within the batch, as TRL allows; a function that thinks there is only one response is refused."""

    def rank(prompts, completions, **columns):
        return [float(sorted(completions).index(text)) for text in completions]

    assert compute_rewards([rank], make_batch(["b", "a"], prompts=["x", "x"])).tolist() == [[1.0], [0.0]]
    with pytest.raises(DataError, match=r"expected 2 numbers, found 1 \(called with all 2 responses"):
        compute_rewards([lambda prompts, completions: [1.0]], make_batch(["b", "a"], prompts=["x", "x"]))


def test_an_exception_in_a_reward_names_the_sample_and_keeps_the_cause():
    def mine(prompts, completions, solution, **columns):
        return [1.0]

    with pytest.raises(
        DataError, match=r"^sample 0 .*mine failed with TypeError.*'solution'.*columns.* level"
    ) as info:
        compute_rewards([mine], make_batch(["a"], [{"level": 1}]))
    assert isinstance(info.value.__cause__.__cause__, TypeError)


def test_coroutines_are_refused():
    async def mine(prompts, completions):
        return [1.0]

    with pytest.raises(DataError, match="reward mine: expected a plain function, found a coroutine"):
        call_reward(mine, ["p"], ["c"], {})


def test_resolve_registered_names():
    assert {name: resolve_rewards(name) for name in REWARDS} == {k: (f,) for k, f in REWARDS.items()}


def test_rewards_that_do_not_apply_are_nan(tmp_path, monkeypatch):
    (tmp_path / "partial_rewards_mod.py").write_text(
        "def odd(prompts, completions, **columns):\n"
        "    return [None if len(c) % 2 == 0 else 0.5 for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "partial_rewards_mod", raising=False)
    both = resolve_rewards(["partial_rewards_mod:odd", "exact_number"])
    found = compute_rewards(both, make_batch(["7", "17"], [{"answer": 7}, {"answer": 17}]))
    assert found[:, 1].tolist() == [1.0, 1.0]
    assert found[0, 0] == 0.5
    assert math.isnan(found[1, 0])
    with pytest.raises(
        DataError, match=r"reward odd: expected a number for some response at least, found None"
    ):
        compute_rewards(both[:1], make_batch(["17"]))
    monkeypatch.delitem(sys.modules, "partial_rewards_mod")


def test_importing_leaves_the_path_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "path_rewards_mod.py").write_text(
        "def f(prompts, completions, **columns):\n    return [1.0]\n"
    )
    (tmp_path / "broken_rewards_mod.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert resolve_rewards("path_rewards_mod:f")[0](prompts=["p"], completions=["c"]) == [1.0]
    assert sys.path == before
    with pytest.raises(
        DataError, match="importing module 'broken_rewards_mod' failed with ZeroDivisionError"
    ):
        resolve_rewards("broken_rewards_mod:f")
    assert sys.path == before
    del sys.modules["path_rewards_mod"]


def test_a_module_that_changes_the_path_itself(tmp_path, monkeypatch):
    (tmp_path / "unpath_rewards_mod.py").write_text(
        "import sys\nsys.path[:] = [p for p in sys.path if p]\ndef f(prompts):\n    return [1.0]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert callable(resolve_rewards("unpath_rewards_mod:f")[0])
    del sys.modules["unpath_rewards_mod"]


def test_unknown_name():
    with pytest.raises(
        DataError, match=r"expected one of exact_number, gsm8k, tag_format, or module:function"
    ):
        resolve_rewards("accuracy")
    with pytest.raises(DataError, match=r"found 'exact_numbr'; did you mean exact_number\?"):
        resolve_rewards(["gsm8k", "exact_numbr"])


def test_empty_list():
    with pytest.raises(DataError, match="expected at least one reward, found an empty list"):
        resolve_rewards([])


@pytest.mark.parametrize("spec", ["a:b:c", ":f", "module:", "os; import sys:f", "a/b.py:f"])
def test_malformed_spec(spec):
    with pytest.raises(DataError, match="expected module:function"):
        resolve_rewards(spec)


@pytest.mark.parametrize("spec", ["no_such_module_xyz:f", "json.no_such:f"])
def test_missing_module(spec):
    with pytest.raises(DataError, match=r"was not found; start in the folder that holds it, .*PYTHONPATH"):
        resolve_rewards(spec)


def test_module_whose_own_import_is_missing(tmp_path, monkeypatch):
    (tmp_path / "needy_rewards_mod.py").write_text("import no_such_package_xyz\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r"needs a package that is missing: No module named 'no_such_package_xyz'"
    ):
        resolve_rewards("needy_rewards_mod:f")


def test_missing_function_names_the_nearest():
    with pytest.raises(DataError, match=r"has no function 'gsm8'; did you mean gsm8k\?"):
        resolve_rewards("probe.data.rewards:gsm8")


def test_not_a_function():
    with pytest.raises(
        DataError, match=r"expected probe.data.reward_calls:REWARDS to be a function, found dict"
    ):
        resolve_rewards("probe.data.reward_calls:REWARDS")


def test_trl_reward_functions_work_as_they_are():
    pytest.importorskip("trl")
    rewards = resolve_rewards("trl.rewards:think_format_reward")
    messages = [{"role": "user", "content": "2+2?"}]
    batch = make_batch(["<think>a</think>4", "4"], [{"prompt": messages}] * 2)
    assert compute_rewards(rewards, batch).tolist() == [[1.0], [0.0]]

"""The saved optimizer over the model's parameters: the same step as the live one, or an error."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from probe.config.checkpoint import CheckpointConfig
from probe.errors.exceptions import OptimizerStateError
from probe.loading import (
    load_optimizer,
    load_policy_model,
    locate_checkpoint,
    quiet_libraries,
    trainable_parameters,
)
from probe.loading.moments import dequantize_blocks
from tests.support.tiny_models import (
    adamw,
    add_lora,
    load_base,
    lora_checkpoint,
    save_base,
    set_gradients,
    take_steps,
    tiny_model,
    trainer_checkpoint,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    """`checkpoint-2` of a whole model from the real Trainer, with decay and no-decay groups."""
    return trainer_checkpoint(tmp_path_factory.mktemp("full"), tiny_model(), weight_decay=0.1)


def load(path: Path, learning_rate: float | None = None, **options):
    config = CheckpointConfig(checkpoint_path=str(path), **options)
    files = locate_checkpoint(config)
    model, _ = load_policy_model(config, files, "cpu")
    return model, load_optimizer(model, files, config, learning_rate)


def assert_same_step(model, optimizer, live_model, live_optimizer) -> None:
    """One step with the same gradients, from the same weights, gives the same bits."""
    live = trainable_parameters(live_model)
    loaded = trainable_parameters(model)
    before = {name: parameter.detach().clone() for name, parameter in loaded.items()}
    assert all(torch.equal(parameter, live[name]) for name, parameter in loaded.items())
    for parameters, stepper in ((loaded, optimizer), (live, live_optimizer)):
        set_gradients(parameters.items(), seed=99)
        stepper.step()
        stepper.zero_grad()
    assert loaded.keys() == live.keys()
    for name, parameter in loaded.items():
        assert torch.equal(parameter, live[name]), name
        assert not torch.equal(parameter, before[name]), name


class Small(nn.Module):
    """Two linear layers of different widths, a norm and a scale: shapes that tell most orders apart."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(3, 4)
            self.norm = nn.LayerNorm(5)
            self.last = nn.Linear(6, 7)


class Twins(nn.Module):
    """A weight and a bias of the same shape, which shapes cannot tell apart."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.bias = nn.Parameter(torch.zeros(3))


def stepped(model: nn.Module, groups=None, kind=torch.optim.AdamW, **options) -> torch.optim.Optimizer:
    optimizer = kind(list(model.parameters()) if groups is None else groups, **{"lr": 1e-3, **options})
    take_steps(model, optimizer)
    return optimizer


def saved(optimizer: torch.optim.Optimizer | dict, folder: Path) -> Path:
    payload = optimizer if isinstance(optimizer, dict) else optimizer.state_dict()
    torch.save(payload, folder / "optimizer.pt")
    return folder / "optimizer.pt"


def reload(model: nn.Module, live, folder: Path, learning_rate=None, **options):
    return load_optimizer(model, saved(live, folder), CheckpointConfig(**options), learning_rate)


class TestSameStep:
    @pytest.mark.parametrize("layout", ["nested", "flat"])
    def test_lora(self, tmp_path, base, layout):
        path, live_model, live = lora_checkpoint(tmp_path / "step_3", base, layout=layout)
        model, loaded = load(path)
        assert (loaded.rule, loaded.step, loaded.learning_rate) == ("adamw", 3, 1e-3)
        assert loaded.notes == ("states were matched by position (one group): the file has no names",)
        assert_same_step(model, loaded.optimizer, live_model, live)

    def test_whole_model_from_the_trainer(self, full_run):
        path, live_model, live = full_run
        model, loaded = load(path)
        groups = loaded.optimizer.param_groups
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        names = {id(p): name for name, p in trainable_parameters(model).items()}
        assert all("norm" in names[id(p)] or "bias" in names[id(p)] for p in groups[1]["params"])
        assert "decay / no-decay groups" in loaded.notes[0]
        assert_same_step(model, loaded.optimizer, live_model, live)

    def test_lora_from_the_trainer(self, tmp_path, base):
        live_model = add_lora(load_base(base))
        path, live_model, live = trainer_checkpoint(tmp_path, live_model, weight_decay=0.1)
        model, loaded = load(path)
        assert (loaded.step, loaded.learning_rate) == (2, 1e-3)
        # The Trainer's second group is empty here.
        assert len(live.param_groups) == 2
        assert len(loaded.optimizer.param_groups) == 1
        assert_same_step(model, loaded.optimizer, live_model.eval(), live)

    @pytest.mark.parametrize(
        ("kind", "rule", "options"),
        [
            (torch.optim.Adam, "adam", {"weight_decay": 0.1}),
            (torch.optim.AdamW, "adamw", {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}),
            (torch.optim.AdamW, "adamw", {"amsgrad": True, "maximize": True}),
            (torch.optim.AdamW, "adamw", {"lr": torch.tensor(2e-3)}),
        ],
    )
    def test_settings(self, tmp_path, kind, rule, options):
        live_model, model = Small(), Small()
        live = stepped(live_model, kind=kind, **options)
        model.load_state_dict(live_model.state_dict())
        loaded = reload(model, live, tmp_path)
        assert loaded.rule == rule
        group = loaded.optimizer.param_groups[0]
        assert (group["foreach"], group["fused"], group["capturable"]) == (False, None, False)
        assert_same_step(model, loaded.optimizer, live_model, live)

    def test_float64_policy(self, tmp_path):
        model = Small()
        live = stepped(model)
        loaded = reload(Small().double(), live, tmp_path)
        states = loaded.optimizer.state.values()
        assert {state["exp_avg"].dtype for state in states} == {torch.float64}
        assert "moments saved as float32 are kept in the weights' type" in loaded.notes

    def test_moments_of_a_bfloat16_run_become_float32(self, tmp_path):
        live = stepped(Small().bfloat16())
        loaded = reload(Small(), live, tmp_path)
        assert {state["exp_avg_sq"].dtype for state in loaded.optimizer.state.values()} == {torch.float32}
        assert "moments saved as bfloat16 are kept in the weights' type" in loaded.notes

    def test_the_file_and_the_random_state_are_left_alone(self, tmp_path):
        file = saved(stepped(Small()), tmp_path)
        content = file.read_bytes()
        torch.manual_seed(4)
        expected = torch.rand(2)
        torch.manual_seed(4)
        model = Small()
        loaded = load_optimizer(model, str(file), CheckpointConfig())
        take_steps(model, loaded.optimizer)
        assert torch.equal(torch.rand(2), expected)
        assert file.read_bytes() == content


class TestByName:
    def test_permuted_groups_are_matched_by_name(self, tmp_path):
        live_model, model = Small(), Small()
        named = list(live_model.named_parameters())
        live = stepped(live_model, [{"params": named[3:][::-1], "lr": 2e-3}, {"params": named[:3]}])
        model.load_state_dict(live_model.state_dict())
        loaded = reload(model, live, tmp_path)
        assert loaded.notes == ()
        assert [group["lr"] for group in loaded.optimizer.param_groups] == [2e-3, 1e-3]
        assert_same_step(model, loaded.optimizer, live_model, live)

    def test_names_tell_equal_shapes_apart(self, tmp_path):
        live_model, model = Twins(), Twins()
        live = stepped(live_model, list(live_model.named_parameters())[::-1])
        model.load_state_dict(live_model.state_dict())
        assert_same_step(model, reload(model, live, tmp_path).optimizer, live_model, live)

    @pytest.mark.parametrize(
        "rename",
        [
            lambda name: f"module.{name}",
            lambda name: f"_orig_mod.module.{name}",
            lambda name: f"module._orig_mod.{name}",
            lambda name: name.replace(".default", ""),
            lambda name: name.removeprefix("base_model.model.").replace(
                "layers", "layers._fsdp_wrapped_module"
            ),
        ],
    )
    def test_what_wrappers_add_is_harmless(self, tmp_path, base, rename):
        path, live_model, live = lora_checkpoint(tmp_path / "c", base)
        state = live.state_dict()
        names = [rename(name) for name in trainable_parameters(live_model)]
        state["param_groups"][0].update(params=list(reversed(range(len(names)))), param_names=names[::-1])
        saved(state, path)
        model, loaded = load(path)
        assert_same_step(model, loaded.optimizer, live_model, live)

    def test_states_keyed_by_name(self, tmp_path):
        live_model, model = Small(), Small()
        live = stepped(live_model)
        state = live.state_dict()
        names = [name for name, _ in live_model.named_parameters()]
        keyed = {
            "state": {names[key]: value for key, value in reversed(state["state"].items())},
            "param_groups": [{**state["param_groups"][0], "params": names[::-1]}],
        }
        model.load_state_dict(live_model.state_dict())
        assert_same_step(model, reload(model, keyed, tmp_path).optimizer, live_model, live)

    def test_untrained_parameters_of_the_file_do_not_matter(self, tmp_path):
        model = Small()
        model.norm.requires_grad_(False)
        loaded = reload(model, stepped(model, model.named_parameters()), tmp_path)
        assert len(loaded.optimizer.param_groups[0]["params"]) == 4

    def test_every_fault_is_listed(self, tmp_path):
        model = Small()
        state = stepped(model, model.named_parameters()).state_dict()
        state["param_groups"][0]["param_names"][0] = "other.weight"
        state["state"][1]["exp_avg"] = torch.zeros(9)
        with pytest.raises(OptimizerStateError) as caught:
            reload(Small(), state, tmp_path)
        message = str(caught.value)
        assert "6 trainable parameters, found 3 faults" in message
        assert "other.weight: no trainable parameter of this name, found a state of shape (4, 3)" in message
        assert "first.bias: expected shape (4,), found (9,)" in message
        assert "first.weight: expected shape (4, 3), found no state" in message

    def test_long_lists_are_cut(self, tmp_path, base):
        path, _, live = lora_checkpoint(tmp_path / "c", base)
        state = live.state_dict()
        state["param_groups"][0]["param_names"] = [f"x.{index}" for index in range(28)]
        saved(state, path)
        with pytest.raises(OptimizerStateError, match=r"found 56 faults: .*; and 46 more"):
            load(path)

    def test_two_states_for_one_parameter(self, tmp_path):
        model = Twins()
        state = stepped(model, model.named_parameters()).state_dict()
        state["param_groups"][0]["param_names"] = ["scale", "module.scale"]
        with pytest.raises(
            OptimizerStateError, match=r"scale: expected one state, found scale and module\.scale"
        ):
            reload(Twins(), state, tmp_path)

    def test_wrong_number_of_names(self, tmp_path):
        model = Twins()
        state = stepped(model, model.named_parameters()).state_dict()
        state["param_groups"][0]["param_names"].pop()
        with pytest.raises(
            OptimizerStateError, match="expected one name for each of 2 parameters of a group, found 1"
        ):
            reload(Twins(), state, tmp_path)

    def test_names_that_only_wrappers_tell_apart(self, tmp_path):
        model = Twins()
        state = stepped(model, model.named_parameters()).state_dict()
        model.module = nn.Module()
        model.module.scale = nn.Parameter(torch.ones(3))
        with pytest.raises(OptimizerStateError, match="distinct names once wrappers are left out"):
            reload(model, state, tmp_path)


class TestByPosition:
    def test_permuted_groups_without_names_are_rejected(self, tmp_path):
        model = Small()
        live = stepped(model, list(model.parameters())[::-1])
        with pytest.raises(OptimizerStateError) as caught:
            reload(Small(), live, tmp_path)
        assert "matched by position (one group)" in str(caught.value)
        assert "first.weight: expected shape (4, 3), found (7,)" in str(caught.value)

    def test_permuted_lora_without_names_is_rejected(self, tmp_path, base):
        def permuted(model):
            return torch.optim.AdamW(list(trainable_parameters(model).values())[::-1], lr=1e-3)

        path, _, _ = lora_checkpoint(tmp_path / "c", base, optimizer=permuted)
        with pytest.raises(
            OptimizerStateError,
            match=r"expected a state for each of 28 trainable parameters, found \d+ faults",
        ):
            load(path)

    def test_the_no_decay_group_may_come_first(self, full_run, tmp_path):
        path = Path(shutil.copytree(full_run[0], tmp_path / "checkpoint-2"))
        state = torch.load(path / "optimizer.pt", weights_only=True)
        state["param_groups"].reverse()
        saved(state, path)
        model, loaded = load(path)
        assert "in reverse" in loaded.notes[0]
        assert [group["weight_decay"] for group in loaded.optimizer.param_groups] == [0.0, 0.1]
        expected = load(full_run[0])
        by_name = [
            {
                name: policy[1].optimizer.state[p]["exp_avg"]
                for name, p in trainable_parameters(policy[0]).items()
            }
            for policy in ((model, loaded), expected)
        ]
        assert all(torch.equal(by_name[0][name], by_name[1][name]) for name in by_name[1])

    def test_groups_split_by_bias_only(self, tmp_path):
        model = tiny_model()
        decay = [p for name, p in model.named_parameters() if "bias" not in name]
        rest = [p for name, p in model.named_parameters() if "bias" in name]
        live = stepped(model, [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}])
        assert "by bias only" in reload(tiny_model(), live, tmp_path).notes[0]

    def test_optimizer_that_was_given_frozen_parameters_too(self, tmp_path):
        live_model, model = Small(), Small()
        for policy in (live_model, model):
            policy.norm.requires_grad_(False)
            policy.first.weight.requires_grad_(False)
        live = stepped(live_model)
        model.load_state_dict(live_model.state_dict())
        loaded = reload(model, live, tmp_path)
        assert "frozen parameters included" in loaded.notes[0]
        assert len(loaded.optimizer.param_groups[0]["params"]) == 3
        assert_same_step(model, loaded.optimizer, live_model, live)

    def test_state_of_a_frozen_parameter(self, tmp_path):
        live = stepped(Small())
        model = Small()
        model.norm.requires_grad_(False)
        with pytest.raises(
            OptimizerStateError,
            match=r"norm\.weight: expected no state for a frozen parameter, found shape \(5,\)",
        ):
            reload(model, live, tmp_path)

    def test_lora_plus_keeps_the_ratio_of_learning_rates(self, tmp_path, base):
        def lora_plus(model):
            from peft.optimizers import create_loraplus_optimizer

            return create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)

        path, live_model, live = lora_checkpoint(tmp_path / "c", base, optimizer=lora_plus)
        model, loaded = load(path)
        assert [group["lr"] for group in loaded.optimizer.param_groups] == [1e-4, 16e-4]
        assert "LoRA+" in loaded.notes[0]
        assert_same_step(model, loaded.optimizer, live_model, live)
        _, loaded = load(path, learning_rate=2e-4)
        assert [group["lr"] for group in loaded.optimizer.param_groups] == pytest.approx([2e-4, 32e-4])
        assert loaded.learning_rate == 2e-4

    @pytest.mark.parametrize(
        ("decay", "ambiguous"), [((0.1, 0.0), False), ((0.0, 0.1), False), ((0.1, 0.1), True)]
    )
    def test_weight_decay_tells_two_fitting_layouts_apart(self, tmp_path, decay, ambiguous):
        live_model, model = Twins(), Twins()
        order = [live_model.scale, live_model.bias] if decay[0] else [live_model.bias, live_model.scale]
        live = stepped(
            live_model, [{"params": [p], "weight_decay": d} for p, d in zip(order, decay, strict=True)]
        )
        model.load_state_dict(live_model.state_dict())
        if ambiguous:
            with pytest.raises(
                OptimizerStateError,
                match=r"found 2 that fit in every shape \(decay.*; decay.*named_parameters",
            ):
                reload(model, live, tmp_path)
        else:
            assert_same_step(model, reload(model, live, tmp_path).optimizer, live_model, live)

    def test_another_number_of_parameters(self, tmp_path):
        live = stepped(nn.Linear(3, 4))
        with pytest.raises(OptimizerStateError) as caught:
            reload(Small(), live, tmp_path)
        assert "6 trainable parameters" in str(caught.value)
        assert "found groups of [2] without names" in str(caught.value)

    def test_parameter_that_never_took_a_step(self, tmp_path):
        model = Small()
        optimizer = torch.optim.AdamW(model.parameters())
        set_gradients((n, p) for n, p in model.named_parameters() if not n.startswith("norm"))
        optimizer.step()
        with pytest.raises(
            OptimizerStateError, match=r"found 2 faults: norm\.weight: expected shape \(5,\), found no state"
        ):
            reload(Small(), optimizer, tmp_path)

    def test_state_outside_every_group(self, tmp_path):
        state = stepped(Twins()).state_dict()
        state["state"][7] = state["state"][0]
        with pytest.raises(
            OptimizerStateError, match="expected every state in a parameter group, found 7 in none"
        ):
            reload(Twins(), state, tmp_path)


class TestLearningRates:
    def test_one_source_of_truth(self, tmp_path):
        loaded = reload(Small(), stepped(Small()), tmp_path)
        loaded.optimizer.param_groups[0]["lr"] = 0.5
        assert loaded.learning_rate == 0.5
        assert loaded.saved_learning_rate == 1e-3

    def test_override(self, tmp_path):
        loaded = reload(Small(), stepped(Small()), tmp_path, learning_rate=3e-5)
        assert (loaded.learning_rate, loaded.saved_learning_rate) == (3e-5, 1e-3)
        assert "learning rate 3e-05 instead of the saved 0.001" in loaded.notes
        assert not any("instead" in note for note in reload(Small(), stepped(Small()), tmp_path, 1e-3).notes)

    def zero(self, folder: Path, history: bool) -> Path:
        state = stepped(Small()).state_dict()
        state["param_groups"][0].update(lr=0.0)
        if history:
            state["param_groups"][0].update(initial_lr=5e-4)
            log = [
                {"learning_rate": 5e-4},
                {"learning_rate": 2e-6},
                {"learning_rate": 0.0},
                {"train_loss": 1.0},
            ]
            (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}), encoding="utf-8")
        return saved(state, folder)

    def test_zero_without_an_earlier_rate_is_refused(self, tmp_path):
        with pytest.raises(
            OptimizerStateError,
            match=r"found 0 in every group .*had ended\) and no earlier one; set probe_rework\.learning_rate",
        ):
            load_optimizer(Small(), self.zero(tmp_path, False), CheckpointConfig())

    def test_an_earlier_rate_stands_in_for_zero_and_is_said(self, tmp_path):
        path = self.zero(tmp_path, True)
        for rate, name in ((2e-6, "the last one logged above 0"), (5e-4, "initial_lr")):
            loaded = load_optimizer(Small(), path, CheckpointConfig())
            assert loaded.schedule_at_zero
            assert (loaded.learning_rate, loaded.saved_learning_rate) == (rate, 0.0)
            assert any(f"the step is taken at {rate:g}, {name}" in note for note in loaded.notes)
            (path.parent / "trainer_state.json").write_text("{}", encoding="utf-8")

    def test_the_end_of_the_trainers_own_schedule(self, tmp_path):
        path, _, live = trainer_checkpoint(
            tmp_path, tiny_model(), lr_scheduler_type="linear", optim="adamw_torch_fused"
        )
        assert live.param_groups[0]["fused"]
        loaded = load(path)[1]
        assert [group["lr"] for group in loaded.optimizer.param_groups] == [5e-4, 5e-4]
        assert loaded.schedule_at_zero
        loaded = load(path, learning_rate=1e-4)[1]
        assert [group["lr"] for group in loaded.optimizer.param_groups] == [1e-4, 1e-4]
        assert not loaded.schedule_at_zero

    def test_groups_keep_the_ratios_of_their_initial_rates(self, tmp_path):
        model = Small()
        named = list(model.named_parameters())
        live = stepped(model, [{"params": named[:2], "lr": 0.0}, {"params": named[2:], "lr": 0.0}])
        for group, rate in zip(live.param_groups, (1e-3, 4e-3), strict=True):
            group["initial_lr"] = rate
        assert [g["lr"] for g in reload(Small(), live, tmp_path).optimizer.param_groups] == [1e-3, 4e-3]

    def test_zero_with_an_override_is_a_note(self, tmp_path):
        loaded = load_optimizer(Small(), self.zero(tmp_path, True), CheckpointConfig(), 1e-5)
        assert (loaded.learning_rate, loaded.saved_learning_rate) == (1e-5, 0.0)
        assert "the saved learning rate is 0; 1e-05 is used for all groups" in loaded.notes

    def test_a_group_at_zero_is_not_the_reference(self, tmp_path):
        model = Small()
        named = list(model.named_parameters())
        live = stepped(model, [{"params": named[:2], "lr": 0.0}, {"params": named[2:], "lr": 1e-3}])
        loaded = reload(Small(), live, tmp_path, learning_rate=1e-2)
        assert [group["lr"] for group in loaded.optimizer.param_groups] == [0.0, 1e-2]
        assert loaded.learning_rate == 1e-2

    def test_impossible_rates(self, tmp_path):
        state = stepped(Small()).state_dict()
        state["param_groups"][0]["lr"] = float("nan")
        with pytest.raises(
            OptimizerStateError, match=r"expected finite learning rates of at least 0, found \[nan\]"
        ):
            reload(Small(), state, tmp_path)


class TestRule:
    def without_flag(self, **options) -> dict:
        state = stepped(Small(), **options).state_dict()
        del state["param_groups"][0]["decoupled_weight_decay"]
        return state

    def test_unsaid_is_adamw_with_a_note_where_it_matters(self, tmp_path):
        loaded = reload(Small(), self.without_flag(weight_decay=0.1), tmp_path)
        assert loaded.rule == "adamw"
        assert any("AdamW's is assumed" in note for note in loaded.notes)
        loaded = reload(Small(), self.without_flag(weight_decay=0.0), tmp_path)
        assert not any("assumed" in note for note in loaded.notes)

    def test_the_configuration_says(self, tmp_path):
        assert reload(Small(), self.without_flag(), tmp_path, optimizer="adam").rule == "adam"

    def test_the_configuration_contradicts(self, tmp_path):
        with pytest.raises(
            OptimizerStateError, match=r"checkpoint\.optimizer: expected adamw \(or auto\).* found adam"
        ):
            reload(Small(), stepped(Small(), weight_decay=0.1), tmp_path, optimizer="adam")

    def test_mixed(self, tmp_path):
        model = Small()
        named = list(model.named_parameters())
        state = stepped(model, [{"params": named[:2]}, {"params": named[2:]}]).state_dict()
        state["param_groups"][0]["decoupled_weight_decay"] = False
        with pytest.raises(
            OptimizerStateError, match="expected one rule for all groups, found Adam and AdamW mixed"
        ):
            reload(Small(), state, tmp_path)

    @pytest.mark.parametrize(
        "settings",
        [
            {"betas": (0.9, 1.5)},
            {"betas": (0.9,)},
            {"eps": -1.0},
            {"eps": float("nan")},
            {"weight_decay": float("inf")},
        ],
    )
    def test_impossible_settings(self, tmp_path, settings):
        state = stepped(Small()).state_dict()
        state["param_groups"][0].update(settings)
        with pytest.raises(OptimizerStateError, match=r"expected two betas in \[0, 1\), .*in group 0"):
            reload(Small(), state, tmp_path)


class TestValues:
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (
                lambda s: s["exp_avg"].view(-1)[:2].fill_(float("nan")),
                r"first\.weight: 2 non-finite values in exp_avg$",
            ),
            (lambda s: s["exp_avg_sq"].view(-1)[0].fill_(float("inf")), "1 non-finite values in exp_avg_sq"),
            (lambda s: s["exp_avg_sq"].view(-1)[0].fill_(-1.0), "1 negative values in exp_avg_sq"),
            (
                lambda s: s.update(exp_avg_sq=torch.zeros(4)),
                r"exp_avg_sq of shape \(4,\) beside exp_avg of \(4, 3\)",
            ),
            (lambda s: s.update(step=torch.tensor(float("nan"))), "first.weight: step nan"),
            (lambda s: s.update(step=2.5), r"step 2\.5"),
            (lambda s: s.pop("exp_avg_sq"), "no 'exp_avg_sq'"),
        ],
    )
    def test_impossible_states(self, tmp_path, change, match):
        state = stepped(Small()).state_dict()
        change(state["state"][0])
        with pytest.raises(OptimizerStateError, match=match):
            reload(Small(), state, tmp_path)

    def test_state_without_a_first_moment(self, tmp_path):
        state = stepped(Small()).state_dict()
        del state["state"][0]["exp_avg"]
        with pytest.raises(OptimizerStateError, match="state of parameter 0: expected a tensor exp_avg"):
            reload(Small(), state, tmp_path)

    def test_amsgrad_without_its_maximum(self, tmp_path):
        state = stepped(Small(), amsgrad=True).state_dict()
        del state["state"][0]["max_exp_avg_sq"]
        with pytest.raises(OptimizerStateError, match=r"first\.weight: no 'max_exp_avg_sq'"):
            reload(Small(), state, tmp_path)

    def test_many_faults_are_cut(self, tmp_path):
        model = nn.ModuleList(nn.Linear(2, 2) for _ in range(6))
        state = stepped(model).state_dict()
        for entry in state["state"].values():
            entry["exp_avg"].fill_(float("nan"))
        with pytest.raises(OptimizerStateError, match=r"found 12 faults: .* and 2 more"):
            reload(nn.ModuleList(nn.Linear(2, 2) for _ in range(6)), state, tmp_path)

    def test_different_step_counts_are_noted(self, tmp_path):
        state = stepped(Small()).state_dict()
        state["state"][0]["step"] = 1
        loaded = reload(Small(), state, tmp_path)
        assert loaded.step == 3
        assert "parameters have taken between 1 and 3 steps" in loaded.notes


class TestFiles:
    def test_missing(self, tmp_path):
        with pytest.raises(OptimizerStateError, match="found no such file"):
            load_optimizer(Small(), tmp_path / "none.pt", CheckpointConfig())

    def test_pickle_that_runs_code(self, tmp_path):
        (tmp_path / "optimizer.pt").write_bytes(pickle.dumps(print))
        with pytest.raises(
            OptimizerStateError, match=r"could run code .*save `optimizer\.state_dict\(\)` again"
        ):
            load_optimizer(Small(), tmp_path / "optimizer.pt", CheckpointConfig())

    def test_whole_optimizer_object(self, tmp_path):
        torch.save(stepped(Small()), tmp_path / "optimizer.pt")
        with pytest.raises(OptimizerStateError, match=r"could run code .*AdamW"):
            load_optimizer(Small(), tmp_path / "optimizer.pt", CheckpointConfig())

    @pytest.mark.parametrize("content", [b"", b"not a torch file", None])
    def test_not_a_torch_file(self, tmp_path, content):
        file = saved(stepped(Small()), tmp_path)
        file.write_bytes(file.read_bytes()[:500] if content is None else content)
        with pytest.raises(
            OptimizerStateError, match=r"expected (a file that torch\.save wrote|only tensors)"
        ):
            load_optimizer(Small(), file, CheckpointConfig())

    @pytest.mark.parametrize(
        ("payload", "found"),
        [
            ({"weights": 1}, r"the keys \['weights'\]"),
            ([1, 2], "list"),
            ({"optimizer": {"a": 1}}, r"the keys \['a'\]"),
        ],
    )
    def test_something_else(self, tmp_path, payload, found):
        torch.save(payload, tmp_path / "optimizer.pt")
        with pytest.raises(OptimizerStateError, match=f"expected an optimizer's state_dict .* found {found}"):
            load_optimizer(Small(), tmp_path / "optimizer.pt", CheckpointConfig())

    def test_before_the_first_step(self, tmp_path):
        with pytest.raises(OptimizerStateError, match="found an empty state; take a later checkpoint"):
            reload(Small(), torch.optim.AdamW(Small().parameters()), tmp_path)

    @pytest.mark.parametrize("key", ["optimizer", "optimizer_state_dict"])
    def test_inside_a_training_loops_own_dictionary(self, tmp_path, key):
        loaded = reload(Small(), {key: stepped(Small()).state_dict(), "epoch": 3}, tmp_path)
        assert any(f"entry {key!r}" in note for note in loaded.notes)


class TestOtherOptimizers:
    @pytest.mark.parametrize(
        ("kind", "options", "found"),
        [
            (torch.optim.SGD, {"momentum": 0.9}, "another optimizer .*momentum_buffer"),
            (torch.optim.Adagrad, {}, "another optimizer .*'sum'"),
            (torch.optim.RMSprop, {}, "another optimizer .*square_avg"),
            (torch.optim.Adamax, {}, "another optimizer .*exp_inf"),
            (torch.optim.NAdam, {}, "another optimizer .*mu_product"),
            (torch.optim.RAdam, {}, "a relative of Adam"),
            (torch.optim.Adafactor, {}, "another optimizer"),
        ],
    )
    def test_torch(self, tmp_path, kind, options, found):
        live = stepped(Small(), kind=kind, **options)
        with pytest.raises(
            OptimizerStateError, match=rf"expected the state of torch's Adam and AdamW, .*found {found}"
        ):
            reload(Small(), live, tmp_path)

    def bitsandbytes_state(self, **group) -> dict:
        state = {"step": 3, "state1": torch.zeros(3), "state2": torch.zeros(3)}
        settings = {
            "lr": 1e-3,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 0.0,
            "params": [0, 1],
            **group,
        }
        return {"state": {0: dict(state), 1: dict(state)}, "param_groups": [settings]}

    @pytest.mark.parametrize(
        ("extra", "group", "found"),
        [
            ({"unorm_vec": torch.zeros(1)}, {}, "LAMB"),
            ({"gnorm_vec": torch.zeros(100)}, {}, "percentile clipping"),
            ({"max1": torch.zeros(1)}, {}, "older 8-bit states, which are not blockwise"),
            ({}, {"betas": (0.9, 0.999, 0.9999)}, "AdEMAMix"),
            ({}, {"alpha": 5.0}, "AdEMAMix"),
        ],
    )
    def test_bitsandbytes(self, tmp_path, extra, group, found):
        state = self.bitsandbytes_state(**group)
        state["state"][0].update(extra)
        with pytest.raises(OptimizerStateError, match=f"found bitsandbytes' {found}"):
            reload(Twins(), state, tmp_path)

    def test_bitsandbytes_with_one_moment(self, tmp_path):
        state = self.bitsandbytes_state()
        for entry in state["state"].values():
            del entry["state2"]
        with pytest.raises(OptimizerStateError, match="found a one-moment bitsandbytes optimizer"):
            reload(Twins(), state, tmp_path)


class TestBitsandbytes:
    @pytest.fixture(autouse=True)
    def library(self):
        with quiet_libraries():
            pytest.importorskip("bitsandbytes")

    @pytest.mark.parametrize("weight_decay", [0.0, 0.1])
    @pytest.mark.parametrize("kind", ["AdamW8bit", "Adam8bit", "AdamW32bit", "Adam32bit"])
    def test_one_step_equals_its_own(self, tmp_path, base, kind, weight_decay):
        import bitsandbytes

        def build(model):
            options = {"lr": 1e-3, "weight_decay": weight_decay, "min_8bit_size": 200}
            return getattr(bitsandbytes.optim, kind)(list(trainable_parameters(model).values()), **options)

        path, live_model, live = lora_checkpoint(tmp_path / "c", base, optimizer=build)
        model, loaded = load(path)
        assert (loaded.rule, loaded.step) == ("adamw", 3)
        assert any("bitsandbytes" in note for note in loaded.notes)
        dtypes = {state["state1"].dtype for state in live.state.values()}
        # Small tensors stay float32 in an 8-bit optimizer.
        assert dtypes == ({torch.uint8, torch.float32} if "8bit" in kind else {torch.float32})
        before = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
        for policy, optimizer in ((model, loaded.optimizer), (live_model, live)):
            set_gradients(trainable_parameters(policy).items(), seed=99)
            optimizer.step()
        for name, p in trainable_parameters(model).items():
            step, expected = p - before[name], trainable_parameters(live_model)[name] - before[name]
            assert (step - expected).norm() < 3e-5 * expected.norm(), name

    def test_paged_in_the_flat_form_of_older_versions(self, tmp_path):
        import bitsandbytes

        live_model, model = nn.Linear(40, 30), nn.Linear(40, 30)
        live = bitsandbytes.optim.AdamW8bit(live_model.parameters(), min_8bit_size=1)
        take_steps(live_model, live)
        state = live.state_dict()
        flat = {
            key: {**entry, **entry.pop("__bnb_optimizer_quant_state__")}
            for key, entry in state["state"].items()
        }
        loaded = reload(model, {**state, "state": flat}, tmp_path)
        quantised = live.state[live_model.weight]
        expected = bitsandbytes.functional.dequantize_blockwise(
            quantised["state2"], absmax=quantised["absmax2"], code=quantised["qmap2"], blocksize=256
        )
        assert torch.equal(loaded.optimizer.state[model.weight]["exp_avg_sq"], expected)

    def test_unknown_blocks(self, tmp_path):
        import bitsandbytes

        model = nn.Linear(40, 30)
        live = bitsandbytes.optim.AdamW8bit(model.parameters(), min_8bit_size=1)
        take_steps(model, live)
        state = live.state_dict()
        state["state"][0]["__bnb_optimizer_quant_state__"]["absmax1"] = torch.zeros(3)
        with pytest.raises(
            OptimizerStateError, match="weight: 3 blocks for 1200 codes, expected blocks of 256 or 2048"
        ):
            reload(nn.Linear(40, 30), state, tmp_path)


@pytest.mark.parametrize(("count", "block"), [(5000, 256), (5000, 2048), (100, 256)])
def test_dequantize_blocks(count, block):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (count // 10, 10), generator=generator, dtype=torch.uint8)
    table = torch.linspace(-1, 1, 256)
    absmax = torch.rand(-(-count // block), generator=generator)
    found = dequantize_blocks(codes, table, absmax)
    expected = [table[int(code)] * absmax[index // block] for index, code in enumerate(codes.flatten())]
    assert torch.equal(found.flatten(), torch.stack(expected))


def test_adamw_of_the_builders_covers_the_trainable_parameters(base):
    model = add_lora(load_base(base))
    assert len(adamw(model).param_groups[0]["params"]) == len(trainable_parameters(model)) == 28

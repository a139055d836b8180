"""The arguments a training was started with: `training_args.bin`, which transformers and TRL put beside a checkpoint.

The file is a pickle of an object of the trainer's. Nothing that it names is imported: it is read with `weights_only`,
and the classes that such a file is made of are replaced by stand-ins, which keep what they are given and do nothing. So
neither TRL nor the version that wrote the file is needed, and a file that names anything else is refused unread. One
class may be unknown, that of the whole object: where it has the options of TRL's GRPO, it is taken for one derived from
theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from probe.errors.exceptions import CheckpointError
from probe.limits import TRAINING_ARGS_BYTES, TRAINING_ARGS_VALUES
from probe.text import first_line

GRPO = (
    "trl.trainer.grpo_config.GRPOConfig",
    "open_r1.configs.GRPOConfig",
    "UnslothGRPOTrainer.UnslothGRPOConfig",
    "unsloth_compiled_cache.UnslothGRPOTrainer.UnslothGRPOConfig",
)
"""TRL's arguments of GRPO, and classes derived from them that leave the loss as it is."""
ARGUMENTS = (
    *GRPO,
    "transformers.training_args.TrainingArguments",
    "transformers.training_args_seq2seq.Seq2SeqTrainingArguments",
    *(
        f"trl.trainer.{name.lower()}_config.{name}Config"
        for name in ("SFT", "DPO", "KTO", "RLOO", "Reward", "PPO", "CPO", "ORPO", "GKD", "Distillation")
    ),
    "trl.trainer.online_dpo_config.OnlineDPOConfig",
    *(
        f"trl.experimental.{name}.{name}_config.{kind}Config"
        for name, kind in (
            *(
                ("gmpo", "GMPO"),
                ("a2po", "A2PO"),
                ("async_grpo", "AsyncGRPO"),
                ("cpo", "CPO"),
                ("orpo", "ORPO"),
            ),
            *(("gkd", "GKD"), ("gold", "GOLD"), ("kto", "KTO"), ("online_dpo", "OnlineDPO"), ("tpo", "TPO")),
            *(("sdft", "SDFT"), ("sdpo", "SDPO"), ("iw_opd", "IWOPD"), ("distillation", "Distillation")),
        )
    ),
)
"""The classes whose objects are written whole."""
PARTS = (
    *(
        f"transformers.trainer_utils.{name}"
        for name in ("IntervalStrategy", "EvaluationStrategy", "SaveStrategy", "HubStrategy", "SchedulerType")
    ),
    "transformers.trainer_utils.FSDPOption",
    "transformers.training_args.OptimizerNames",
    "transformers.training_args.ParallelMode",
    "transformers.debug_utils.DebugOption",
    "transformers.trainer_pt_utils.AcceleratorConfig",
    "transformers.integrations.deepspeed.HfTrainerDeepSpeedConfig",
    "transformers.integrations.deepspeed.HfDeepSpeedConfig",
    "transformers.generation.configuration_utils.GenerationConfig",
    "transformers.utils.quantization_config.BitsAndBytesConfig",
    "transformers.utils.quantization_config.QuantizationMethod",
    "accelerate.state.PartialState",
    "accelerate.state.AcceleratorState",
    "accelerate.parallelism_config.ParallelismConfig",
    "accelerate.utils.deepspeed.HfDeepSpeedConfig",
    *(
        f"accelerate.utils.dataclasses.{name}"
        for name in ("DistributedType", "DeepSpeedPlugin", "FullyShardedDataParallelPlugin", "PrecisionType")
    ),
    "peft.utils.peft_types.PeftType",
    "peft.utils.peft_types.TaskType",
    "datetime.timedelta",
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath")),
    *(f"pathlib._local.{name}" for name in ("Path", "PosixPath", "WindowsPath")),
)
"""The classes of what stands in them."""
SHAPE_OF_GRPO = ("loss_type", "num_generations", "beta", "epsilon", "num_iterations", "max_completion_length")
"""Options by which the arguments of a class derived from TRL's `GRPOConfig` are known."""
LIBRARIES = ("trl", "transformers", "torch", "accelerate", "builtins", "__builtin__")
"""Packages whose classes are derived by no user: an unknown one of theirs may mean another loss."""
SWITCH_OFF = "set probe_rework.from_checkpoint: off and give the update's settings in the configuration"
"""What can always be done about a file."""


class _StandIn:
    """Takes the place of a class that a file names: keeps what it is made with, and does nothing."""

    def __new__(cls, *args: Any) -> _StandIn:
        """Keep the arguments; those of an enum are its value."""
        made = super().__new__(cls)
        made.__dict__["made_with"] = args
        return made

    def __setstate__(self, state: Any) -> None:
        """Keep the attributes."""
        self.__dict__["attributes"] = state


class _Named:
    """Takes the place of `getattr`, by which some versions of Python write members of enums."""

    def __new__(cls, owner: Any, name: Any) -> Any:
        """The member as a stand-in whose value is its name in small letters, as in the libraries' enums."""
        if not (isinstance(owner, type) and issubclass(owner, _StandIn) and isinstance(name, str)):
            raise TypeError(f"expected the member of an enum, found {name!r} of {type(owner).__name__}")
        return owner(name.lower())


def _stand_ins() -> dict[str, type]:
    """A class of its own for every name."""
    classes: dict[str, type] = {
        name: type(name.rsplit(".", 1)[1], (_StandIn,), {}) for name in (*ARGUMENTS, *PARTS)
    }
    return {**classes, "__builtin__.getattr": _Named, "builtins.getattr": _Named}


_STAND_INS = _stand_ins()


@dataclass(frozen=True)
class TrainingArgs:
    """What a `training_args.bin` says.

    Attributes:
        file: the file.
        kind: name of the class of the arguments, such as `GRPOConfig`.
        is_grpo: whether they are those of TRL's GRPO.
        values: the arguments by name, as plain values; members of enums as their values. What has none is None.
        processes: how many processes the training had, where the file says so.
        derived: whether the class is an unknown one with the options of TRL's GRPO.
    """

    file: Path
    kind: str
    is_grpo: bool
    values: Mapping[str, Any]
    processes: int | None
    derived: bool = False


def read_training_args(file: Path) -> TrainingArgs:
    """Read the arguments of a training. No code of the file's is run, and nothing that it names is imported.

    Args:
        file: `training_args.bin`.

    Raises:
        CheckpointError: the file cannot be read, is cut off, or has something else in it.
    """
    found, unknown = _load(file)
    name = unknown or next((name for name in ARGUMENTS if type(found) is _STAND_INS[name]), None)
    attributes = getattr(found, "attributes", None)
    if name is None or not isinstance(attributes, dict):
        what = f"an object of {type(found).__name__}"
        raise _refusal(file, what)
    plain = _Plain()
    try:
        values = {key: plain.of(value) for key, value in attributes.items() if isinstance(key, str)}
    except (RecursionError, OverflowError, TypeError) as error:
        raise _refusal(file, "one whose values stand inside each other without end") from error
    state = getattr(attributes.get("distributed_state"), "attributes", None)
    processes = state.get("num_processes") if isinstance(state, dict) else None
    return TrainingArgs(
        file=file,
        kind=name.rsplit(".", 1)[1],
        is_grpo=name in GRPO or unknown is not None,
        values=values,
        processes=processes if type(processes) is int and processes >= 1 else None,
        derived=unknown is not None,
    )


def _load(file: Path) -> tuple[Any, str | None]:
    """What stands in the file, in stand-ins, and the name of its class where that is a user's."""
    try:
        size = file.stat().st_size
    except OSError as error:
        raise _refusal(file, f"one that cannot be read ({error.strerror or error})") from error
    if size > TRAINING_ARGS_BYTES:
        raise _refusal(file, f"{size} bytes, where at most {TRAINING_ARGS_BYTES} are read")
    try:
        return _unpickled(file, _STAND_INS), None
    except Exception as error:  # whatever a damaged or hostile pickle leads to
        foreign = _foreign_name(error)
        if foreign is not None:
            derived, inner = _derived(file, foreign)
            if derived is not None:
                return derived, foreign
            what = (
                f"{inner or foreign}, which is not among the classes of such a file (nothing of it was run)"
            )
            raise _refusal(file, what) from error
        found = first_line(error)
        raise _refusal(file, f"one that cannot be read ({found:.120})") from error


def _unpickled(file: Path, stand_ins: Mapping[str, type]) -> Any:
    """What stands in the file; classes come from `stand_ins` by their name, and from nowhere else."""
    allowed: list[Any] = [(stand_in, name) for name, stand_in in stand_ins.items()]
    with torch.serialization.safe_globals(allowed):
        return torch.load(file, map_location="cpu", weights_only=True)


def _foreign_name(error: BaseException) -> str | None:
    """The class or function of which torch says that it is not allowed."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return None if found is None else found[1]


def _derived(file: Path, name: str) -> tuple[Any, str | None]:
    """The object in the file where its class is `name` and it has the options of TRL's GRPO, else None.

    The class is a stand-in like the others: whatever the name belongs to is not looked up.

    Returns:
        The object or None, and what else the file names.
    """
    if name.partition(".")[0] in LIBRARIES:
        return None, None
    stand_in = type("Derived", (_StandIn,), {})
    try:
        found = _unpickled(file, {**_STAND_INS, name: stand_in})
    except Exception as error:
        return None, _foreign_name(error)
    attributes = getattr(found, "attributes", None)
    has_shape = isinstance(attributes, dict) and all(option in attributes for option in SHAPE_OF_GRPO)
    return (found if type(found) is stand_in and has_shape else None), None


def _refusal(file: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: expected the training arguments of transformers or TRL, found {found}; {SWITCH_OFF}"
    )


class _Plain:
    """Makes plain values of those in a file; the same value in many places counts many times."""

    def __init__(self) -> None:
        self.left = TRAINING_ARGS_VALUES

    def of(self, value: Any) -> Any:
        """A value without stand-ins: members of enums as their values, other objects as None.

        Raises:
            OverflowError: there are more values than any training has.
        """
        self.left -= 1
        if self.left < 0:
            raise OverflowError
        if isinstance(value, _StandIn):
            made_with = value.__dict__["made_with"]
            return made_with[0] if len(made_with) == 1 and isinstance(made_with[0], str) else None
        if isinstance(value, dict):
            return {self.of(key): self.of(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(entry) for entry in value]
        return value

"""How many rows and prompts an update of the training has."""

from __future__ import annotations

from probe.limits import LARGEST_COUNT
from probe.loading.training_args import TrainingArgs

SIZES_OF_AN_UPDATE = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")


def processes(args: TrainingArgs) -> int:
    """How many processes the training had: TRL's batch of a generation says so, else the state of its processes."""
    whole = whole_number(args, "generation_batch_size")
    part = (whole_number(args, "per_device_train_batch_size") or 0) * (
        whole_number(args, "steps_per_generation") or 0
    )
    if whole and part and whole % part == 0:
        return whole // part
    return args.processes or 1


def whole_number(args: TrainingArgs, name: str) -> int | None:
    """A positive integer of the options, or None."""
    value = args.values.get(name)
    return value if type(value) is int and 1 <= value <= LARGEST_COUNT else None


def several_updates(args: TrainingArgs) -> bool:
    """Whether several updates are made from the rollouts of one generation."""
    if not args.is_grpo:
        return False
    accumulated = whole_number(args, "gradient_accumulation_steps") or 1
    per_generation = whole_number(args, "steps_per_generation") or accumulated
    return per_generation * (whole_number(args, "num_iterations") or 1) > accumulated


def rows_per_update(args: TrainingArgs) -> int | None:
    """Responses per optimizer step, of all processes."""
    per_device, accumulated, _ = (whole_number(args, name) for name in SIZES_OF_AN_UPDATE)
    return None if per_device is None or accumulated is None else per_device * accumulated * processes(args)


def prompts_per_update(args: TrainingArgs) -> int | None:
    """Prompts per optimizer step, None where the sizes do not say."""
    rows, group = rows_per_update(args), whole_number(args, "num_generations")
    if rows is None or group is None or processes(args) > LARGEST_COUNT:
        return None
    return max(round(rows / group), 1)

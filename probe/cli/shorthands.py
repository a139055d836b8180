"""Shorthands of the command line."""

from __future__ import annotations

import re
from dataclasses import fields

from probe.config.files import find_config_file
from probe.config.what_if import WhatIfConfig
from probe.plan.settings import PlanConfig
from probe.sweep.settings import SweepConfig

SWEEP_OPTIONS = tuple(field.name for field in fields(SweepConfig))
PLAN_OPTIONS = tuple(field.name for field in fields(PlanConfig))
WHAT_IF_OPTIONS = tuple(field.name for field in fields(WhatIfConfig) if field.name != "enabled")
SWEEP_LISTS = {
    **{"learning_rates": "1e-4, 3e-4", "eta_factors": "0.5, 1, 2", "B_E": "256, 1024", "B_U": "16, 64"},
    **{"G": "4, 8", "seeds": "1, 2, 3"},
}
"""Options of `sweep` that are lists of numbers, with examples."""


def shorthands(args: list[str]) -> list[str]:
    """Write out the shorthands.

    `--checkpoint FOLDER`, `--config NAME` for a configuration that is shipped, and, after `sweep`, `--B_E 256,1024` and
    the like for `--sweep.B_E "[256, 1024]"`; after `plan`, `--pilot_B_E 64` for `--plan.pilot_B_E 64`; after `whatif`,
    `--exact clip_cov,stare` for `--whatif.exact "[clip_cov,stare]"`.
    """
    out = list(args)
    for i, arg in enumerate(out):
        option, equals, value = arg.partition("=")
        following = value if equals else (out[i + 1] if i + 1 < len(out) else "")
        if args[0] == "sweep" and option.startswith("--") and option[2:] in SWEEP_OPTIONS:
            out[i] = f"--sweep.{arg[2:]}"
            if option == "--overwrite" and not equals and following not in ("true", "false"):
                out[i] += "=true"
            elif option[2:] in SWEEP_LISTS and following and following.lstrip()[0] not in "[n-":
                bracketed = f"[{following}]"
                out[i + (not equals)] = f"--sweep.{option[2:]}={bracketed}" if equals else bracketed
        elif args[0] == "whatif" and option.startswith("--") and option[2:] in WHAT_IF_OPTIONS:
            out[i] = f"--whatif.{arg[2:]}"
            if (
                option[2:] in ("interventions", "exact")
                and following
                and not following.lstrip().startswith("[")
            ):
                listed = f"[{following}]"
                out[i + (not equals)] = f"--whatif.{option[2:]}={listed}" if equals else listed
        elif args[0] == "plan" and option.startswith("--") and option[2:] in PLAN_OPTIONS:
            out[i] = f"--plan.{arg[2:]}"
        elif option == "--checkpoint" and following and not following.lstrip().startswith("{"):
            out[i] = f"--checkpoint.checkpoint_path={value}" if equals else "--checkpoint.checkpoint_path"
        elif option in ("--config", "-c") and following:
            file = str(find_config_file(following))
            if equals:
                out[i] = f"{option}={file}"
            else:
                out[i + 1] = file
    return out


def name_list(message: str) -> str:
    r"""The message about a list of numbers in plain words; other messages as they are.

    >>> name_list("sweep.B_E: expected int or NoneType, found 'x'")
    'sweep.B_E: expected a list of numbers such as "[256, 1024]", found \'x\''
    """
    wrong = re.fullmatch(r"sweep\.(\w+): expected .*?, found (.*)", message)
    if wrong is None or wrong[1] not in SWEEP_LISTS:
        return message
    return (
        f'sweep.{wrong[1]}: expected a list of numbers such as "[{SWEEP_LISTS[wrong[1]]}]", found {wrong[2]}'
    )

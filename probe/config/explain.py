"""Messages of the parser in one line, with the nearest key."""

from __future__ import annotations

import re
from typing import get_args

from jsonargparse import ArgumentParser

from probe.config.files import one_line
from probe.config.schema import SECTIONS
from probe.errors.exceptions import closest, did_you_mean
from probe.imports import why_no_class


def explain(message: str, parser: ArgumentParser) -> str:
    """One line from jsonargparse's message: `key: expected ..., found ...`, or the nearest key to an unknown one."""
    text = one_line(message)
    of_class = _class_path_problem(text, parser)
    if of_class is not None:
        return of_class
    in_group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text)
    if in_group is not None:
        return _unknown_key(".".join(in_group.groups()), parser)
    alone = re.search(
        r"(?:Option|Subcommand '\w+' does not accept option) '([\w.]+)'|[Uu]nrecognized arguments?: --([\w.]+)",
        text,
    )
    if alone is not None:
        return _unknown_key(alone.group(1) or alone.group(2), parser)
    wrong = re.match(r"Parser key \"([\w.]+)\": (.*)", text)
    if wrong is None:
        return text
    key, rest = wrong.groups()
    expected = list(
        dict.fromkeys(
            _plain_type(e)
            for e in re.findall(r"Expected an? (.*?)(?:\.? Got value| Given value| - |\. |$)", rest)
        )
    )
    found = re.search(r".*(?:Got|Given) value: (.*)$", rest)
    if not expected or found is None:
        return f"{key}: {rest}"
    return f"{key}: expected {' or '.join(expected)}, found {found.group(1)!r}"


def _class_path_problem(text: str, parser: ArgumentParser) -> str | None:
    """What is wrong with a class under `trainer.callbacks` or `trainer.logger`; None where it is something else."""
    raised = re.match(r"Does not validate against any of the Union subtypes .*?Errors: - (.*?) - ", text)
    if raised is not None:  # by the class's own `__init__`
        return f"trainer: a class of callbacks or logger cannot be made: {raised.group(1)}"
    wrong = re.match(r'Parser key "(trainer\.(?:callbacks|logger))": (.*)', text)
    if wrong is None:
        return None
    key, rest = wrong.groups()
    named = re.findall(r"'class_path': '([^']*)'", rest)
    named += re.findall(r"Given value: ([A-Za-z_]\w*(?:\.\w+)*)$", rest)
    for path in dict.fromkeys(named):
        reason = why_no_class(path, _base_class(key, parser))
        if reason is not None:
            return f"{key}: {reason}"
    argument = re.search(r"Problem with given class_path '([\w.]+)': (.*?)(?: - |$)", rest)
    if argument is None:
        return None
    unknown = re.search(r"Option '([\w.]+)' is not accepted", argument.group(2))
    if unknown is not None:
        return f"{key}: {argument.group(1)} has no argument {unknown.group(1)!r}"
    found = re.match(r'Parser key "([\w.]+)": (.*)', argument.group(2))
    return f"{key}: {argument.group(1)}: {': '.join(found.groups()) if found else argument.group(2)}"


def _base_class(key: str, parser: ArgumentParser) -> type:
    """The class from which what stands under `trainer.callbacks` or `trainer.logger` is derived: in the key's type."""
    (hint,) = (action._typehint for action in parser._actions if action.dest == key)  # type: ignore[attr-defined]
    parts = [part for one in get_args(hint) for part in (one, *get_args(one))]
    return next(part for part in parts if isinstance(part, type) and part not in (bool, list, type(None)))


def _unknown_key(key: str, parser: ArgumentParser) -> str:
    """Name the nearest valid key."""
    keys = [k for k in vars(parser.get_defaults().as_flat()) if "." in k or k == "seed_everything"]
    leaves = {k.rsplit(".", 1)[-1]: k for k in keys}
    leaf = key.rsplit(".", 1)[-1]
    same = {name.lower(): k for name, k in leaves.items()}.get(leaf.lower())
    near = (
        same or closest(key, keys) or leaves.get(closest(leaf, leaves) or "")
    )  # the last: in the wrong section
    sections = f"the sections are {', '.join([*SECTIONS, 'trainer'])}"
    return f"{key}: unknown configuration key{did_you_mean(near, sections)}"


def _plain_type(name: str) -> str:
    """`int` for `<class 'int'>`, `'a' or 'b'` for `typing.Literal['a', 'b']`."""
    name = re.sub(r"<class '([\w.]+)'>", r"\1", name).strip()
    choices = re.fullmatch(r"typing\.Literal\[(.*)\]", name)
    return choices.group(1).replace(", ", " or ") if choices else name

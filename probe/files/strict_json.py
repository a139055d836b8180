"""JSON as others can read it: no NaN or infinity, plain types, short lists on one line."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probe.errors.exceptions import LogError


def dump(value: Any) -> str:
    """`value` as strict JSON text: indented for reading, lists of numbers on one line, a line end at the end.

    NaN and infinities, which JSON does not have, become null.

    Raises:
        LogError: `value` holds something that JSON cannot.

    >>> print(dump({"a": float("nan"), "b": [1, 2]}), end="")
    {"a": null, "b": [1, 2]}
    """
    return _render(to_plain(value, "value"), "") + "\n"


def dump_bytes(value: Any, compress: bool = False) -> bytes:
    """`dump` as UTF-8, gzipped where asked for."""
    # A lone surrogate has no UTF-8; its backslash form is also its escape in JSON.
    data = dump(value).encode("utf-8", "backslashreplace")
    return gzip.compress(data, compresslevel=6, mtime=0) if compress else data


def to_plain(value: Any, where: str = "value", keep_non_finite: bool = False) -> Any:
    """`value` with only dictionaries, lists, texts, numbers, booleans and null.

    Args:
        value: mappings, sequences, tensors, arrays, paths and plain values, in any nesting.
        where: name of the value in errors.
        keep_non_finite: keep NaN and infinities, which otherwise become null.

    Raises:
        LogError: a part of `value` has another type.

    >>> to_plain({"x": (1, float("inf"))})
    {'x': [1, None]}
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if keep_non_finite or math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): to_plain(part, f"{where}.{key}", keep_non_finite) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        # Without a call for each of the many numbers of a debug log.
        return [
            part
            if type(part) is int or (type(part) is float and math.isfinite(part))
            else to_plain(part, where, keep_non_finite)
            for part in value
        ]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return to_plain(value.tolist(), where, keep_non_finite)
    if isinstance(value, Path):
        return str(value)
    raise LogError(f"{where}: expected something that JSON can hold, found {type(value).__name__}")


def _render(value: Any, indent: str) -> str:
    """Plain `value` as JSON: a container of few short values, or a list of only scalars, takes one line."""
    if not isinstance(value, (dict, list)):
        return _json(value)
    parts: Sequence[Any] = list(value.values()) if isinstance(value, dict) else value
    if not any(isinstance(part, (dict, list)) and part for part in parts) or _is_short(value):
        line = _json(value)
        if isinstance(value, list) or len(indent) + len(line) <= 100:
            return line
    deeper = indent + " "
    if isinstance(value, dict):
        lines = [f"{deeper}{_json(key)}: {_render(part, deeper)}" for key, part in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(deeper + _render(part, deeper) for part in value) + f"\n{indent}]"


def _is_short(value: Any) -> bool:
    """Whether a container holds so little that one line may do; cheap on large ones."""
    return len(value) <= 4 and not any(isinstance(part, (dict, list)) and len(part) > 4 for part in value)


def _json(value: Any) -> str:
    """Strict JSON on one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)

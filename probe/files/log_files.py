"""Log files of a run, read back."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from pathlib import Path
from typing import Any

from probe.errors.exceptions import LogError

SCHEMA_VERSION = 1
"""Version of the log's schema: it grows when a key changes its meaning or goes, not when a key is added."""
LOG_SCHEMA = "entropy-probe/log"
SUMMARY_SCHEMA = "entropy-probe/summary"
CONFIG_SCHEMA = "entropy-probe/config"


def load_log(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a main log (`.json` or `.json.gz`) or a summary back.

    Args:
        path: the file; whether it is compressed is seen from its content.

    Returns:
        The document, as `build_log` or `summary` made it.

    Raises:
        LogError: the file cannot be read, is cut off, is no log of this package, or has a newer schema.
    """
    text = _read_text(Path(path))
    try:
        document = json.loads(text)
    except ValueError as error:
        raise LogError(
            f"cannot read {path}: expected JSON, found {error}; the file is damaged or is not a log"
        ) from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema not in (LOG_SCHEMA, SUMMARY_SCHEMA):
        raise LogError(
            f"cannot read {path}: expected a log or summary of entropy-probe (schema {LOG_SCHEMA!r} or "
            f"{SUMMARY_SCHEMA!r}), found schema {schema!r}"
        )
    version = document.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise LogError(f"cannot read {path}: expected an integer schema_version, found {version!r}")
    if version > SCHEMA_VERSION:
        raise LogError(
            f"cannot read {path}: expected schema_version {SCHEMA_VERSION} or older, found {version}; "
            "update entropy-probe to read it"
        )
    return document


def _read_text(path: Path) -> str:
    """The text of a file that may be gzipped."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LogError(f"cannot read {path}: {error.strerror or error}; check the path") from error
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise LogError(
                f"cannot read {path}: its gzip data is cut off or damaged ({error}); "
                "the copy or download may be incomplete"
            ) from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LogError(
            f"cannot read {path}: expected UTF-8 text, found {error}; the file is not a log"
        ) from error

"""Rows of a data set: local files, folders, the hub."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from probe.config.batches import BatchConfig
from probe.data import arithmetic
from probe.data.named import NAMED_DATASETS, NamedDataset
from probe.errors.exceptions import DataError, nearest
from probe.text import all_well_formed

_FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf][\x80-\xbf]")
"""Escaped, or as three bytes, which UTF-8 does not allow."""


def load_rows(config: BatchConfig, named: NamedDataset) -> list[dict[str, Any]]:
    """The rows of the configured split."""
    local = _local_source(config)
    if named.source is None:
        if local is not None:
            raise DataError(
                f"batch_config.dataset_path: {config.dataset_name} is built in, expected no path with it"
            )
        splits = (config.split,) if config.split in arithmetic.SPLITS else arithmetic.SPLITS
        rows = _select({name: arithmetic.arithmetic_rows(name) for name in splits}, config)
    elif local is None:
        with _without_progress_bars():
            rows = _select(_load_hub(config, named), config)
    else:
        # Local files are read as they are now: the library's cache of their conversion is not kept.
        with _without_progress_bars(), _without_calling_home(), tempfile.TemporaryDirectory() as cache:
            rows = _select(_load_local(*local, config, named, cache), config)
    if not rows:
        raise DataError(
            f"batch_config.split: expected at least one row in {config.split!r} of {config.dataset_name}, "
            "found none"
        )
    return rows


def _select(tables: Mapping[str, Any], config: BatchConfig) -> list[dict[str, Any]]:
    """The rows of the splits and slices that `batch_config.split` names."""
    if config.split in tables:
        return list(tables[config.split])
    from datasets import ReadInstruction

    try:
        instructions = ReadInstruction.from_spec(config.split).to_absolute(
            {k: len(v) for k, v in tables.items()}
        )
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"batch_config.split: expected one of {', '.join(tables)} in {config.dataset_name}, or a slice "
            f"such as {next(iter(tables))}[:100], found {config.split!r}"
            f"{nearest(_split_name(config), tables)}"
        ) from error
    return [row for part in instructions for row in islice(tables[part.splitname], part.from_, part.to)]


def _local_source(config: BatchConfig) -> tuple[str, Path] | None:
    """The configuration key and path of a local file or folder; None for built-in and hub data sets."""
    name = config.dataset_name
    is_file = Path(name).suffix in _FILE_FORMATS
    if config.dataset_path is not None:
        if is_file:
            raise DataError(
                f"batch_config.dataset_path: dataset_name is the file {name!r}, expected no path with it"
            )
        key, path = "batch_config.dataset_path", Path(config.dataset_path).expanduser()
    elif name not in NAMED_DATASETS and (is_file or name.startswith((".", "/", "~")) or Path(name).exists()):
        key, path = "batch_config.dataset_name", Path(name).expanduser()
    else:
        return None
    if not path.exists():
        raise DataError(
            f"{key}: expected a file or folder, found nothing at {str(path)!r} (from {os.getcwd()})"
        )
    return key, path


def _load_local(
    key: str, path: Path, config: BatchConfig, named: NamedDataset, cache: str
) -> Mapping[str, Any]:
    """The splits of a local file or folder."""
    import datasets

    try:
        if path.is_dir():
            return _load_folder(path, config, named, cache)
        if path.suffix not in _FILE_FORMATS:
            raise DataError(
                f"{key}: expected a file ending in {', '.join(_FILE_FORMATS)}, found {str(path)!r}"
            )
        if path.stat().st_size == 0:
            raise DataError(f"{key}: expected rows in {str(path)!r}, found an empty file")
        file_format = _FILE_FORMATS[path.suffix]
        if file_format == "json":
            path = _without_surrogates(path, Path(cache))
        loaded = datasets.load_dataset(
            file_format, data_files=str(path), cache_dir=cache, keep_in_memory=True
        )
    except DataError:
        raise
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise DataError(f"{key}: expected rows in {str(path)!r}, found none") from error
        raise DataError(f"{key}: cannot read {str(path)!r}: {_reason(error)}") from error
    return _one_split(loaded["train"], config)


def _without_surrogates(path: Path, folder: Path) -> Path:
    r"""A JSON file without the halves of characters that `datasets` refuses: itself, or a copy with U+FFFD for them."""
    raw = path.read_bytes()
    if not _SURROGATE.search(raw):
        return path
    try:
        text = raw.decode("utf-8-sig", "surrogatepass")
    except UnicodeDecodeError:
        return path
    try:
        parts = [json.loads(text)]
    except ValueError:
        try:
            parts = [json.loads(line) for line in text.split("\n") if line.strip()]
        except ValueError:
            return path  # whoever reads it says what is wrong
    copy = folder / f"well_formed{path.suffix}"
    copy.write_text("\n".join(json.dumps(all_well_formed(part)) for part in parts), encoding="utf-8")
    return copy


def _load_folder(path: Path, config: BatchConfig, named: NamedDataset, cache: str) -> Mapping[str, Any]:
    """The splits of a folder: of `save_to_disk`, a clone of a hub data set, or one of plain data files."""
    import datasets

    if (path / "dataset_dict.json").exists():
        return datasets.load_from_disk(str(path), keep_in_memory=True)
    if (path / "state.json").exists():
        return _one_split(datasets.load_from_disk(str(path), keep_in_memory=True), config)
    name = config.dataset_config or named.config
    if name is not None and (path / name).is_dir():
        # The configurations of a clone lie in folders of their own; read together they would be mixed up.
        path, name = path / name, None
    elif config.dataset_config is None and not (path / "README.md").exists():
        name = None
    return datasets.load_dataset(str(path), name, cache_dir=cache, keep_in_memory=True)


def _one_split(table: Any, config: BatchConfig) -> Mapping[str, Any]:
    """Data without splits as the split that the configuration names, so that slices of it work."""
    return {_split_name(config): table}


def _split_name(config: BatchConfig) -> str:
    """The split without a slice."""
    name = re.match(r"\w+", config.split)
    return name.group() if name else "train"


def _load_hub(config: BatchConfig, named: NamedDataset) -> Mapping[str, Any]:
    """The splits of a hub data set, from the hub or its cache."""
    import datasets

    try:
        return datasets.load_dataset(named.source, config.dataset_config or named.config)
    except Exception as error:
        hint = "" if config.dataset_name in NAMED_DATASETS else nearest(config.dataset_name, NAMED_DATASETS)
        raise DataError(
            f"batch_config.dataset_name: cannot load {config.dataset_name!r} from the hub: "
            f"{_reason(error)}; check the name and dataset_config, or set batch_config.dataset_path to a "
            f"local copy{hint}"
        ) from error


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Switch the progress bars of `datasets` off for a while, unless its environment variable decides."""
    import datasets

    if "HF_DATASETS_DISABLE_PROGRESS_BARS" in os.environ or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


@contextmanager
def _without_calling_home() -> Iterator[None]:
    """Keep `datasets` from counting, at its makers' server, that a local file is read."""
    import datasets

    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before


def _reason(error: BaseException) -> str:
    """Type and text of the error at the root, on one line."""
    root = error.__cause__ or error
    return f"{type(root).__name__}: {' '.join(str(root).split())[:300]}"

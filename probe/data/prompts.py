"""Prompts: named, hub and local data sets, put through a template and the tokenizer's chat template."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from probe.config import BatchConfig
from probe.data import arithmetic
from probe.data.batch import PromptExample
from probe.data.names import nearest
from probe.data.rendering import Rendering, render_messages, rendering_of, without_empty
from probe.errors import DataError
from probe.text import all_well_formed

R1_TEMPLATE = (
    "Work on the question below in two parts. Put your reasoning between <think> and </think>, and then only "
    "the final result between <answer> and </answer>.\n\nQuestion: {prompt}\n\nResponse:\n"
)
"""Asks for reasoning and result in tags of their own; it reads the same with and without a chat template."""

_FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf][\x80-\xbf]")
"""Escaped, or as three bytes, which UTF-8 does not allow."""
_MESSAGE_KEYS = ("role", "content")


@dataclass(frozen=True)
class NamedDataset:
    """What a data set's name stands for.

    Attributes:
        source: hub id, or None where the rows are built in.
        config: configuration of the hub data set.
        prompt_column: column with the prompt; None where it is looked for (`prompt`, then `question`).
        answer_column: column with the reference answer; None where it is `answer`, if there is one.
        template: text in which `{prompt}` is replaced, or None to take the column as it is.
        reward: what `batch_config.reward` is when it is not set; empty where there is none.
    """

    source: str | None
    config: str | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    template: str | None = None
    reward: tuple[str, ...] = ()


NAMED_DATASETS: dict[str, NamedDataset] = {
    "gsm8k_r1_template": NamedDataset(
        "openai/gsm8k", "main", "question", "answer", R1_TEMPLATE, ("gsm8k", "tag_format")
    ),
    "gsm8k": NamedDataset(
        "openai/gsm8k", "main", "question", "answer", "Question: {prompt}\nAnswer:", ("gsm8k",)
    ),
    "arithmetic": NamedDataset(
        None, None, "question", "answer", arithmetic.PROMPT_TEMPLATE, ("exact_number",)
    ),
}
"""The data sets with a name of their own; every other name is a hub id or a local file."""


def load_prompts(config: BatchConfig, tokenizer: PreTrainedTokenizerBase) -> list[PromptExample]:
    """All prompts of the configured data set and split, in its order.

    A prompt column holds texts, or lists of messages (TRL's conversational format), which go through the chat
    template. Each example's row has the reference answer under `answer` and, where the prompt was made with
    the chat template, the messages under `prompt`, so that reward functions get what they would get from TRL.

    Slices and sums of splits are written as for `datasets` (`train[:100]`). A single file is one split,
    whatever its name.

    Args:
        config: data set, columns, template and limits.
        tokenizer: renders the chat template and counts tokens.

    Raises:
        DataError: the data set, the split or a column is not there, it is empty, a prompt is empty, too long
            or not a text, or the tokenizer has no chat template where one is needed.
    """
    if config.system_prompt is not None and not config.use_chat_template:
        raise DataError("batch_config.system_prompt: expected use_chat_template: true with it, found false")
    named = _describe(config)
    rows = _load_rows(config, named)
    prompt_column = _prompt_column(config, named, list(rows[0]))
    answer_column = _answer_column(config, named, list(rows[0]))
    examples = []
    rendering = rendering_of(config)
    for index, row in enumerate(rows):
        where = f"{config.dataset_name}, row {index}, column {prompt_column!r}"
        own = rendering.of_row(row, f"{config.dataset_name}, row {index}")
        text, messages = _render(row[prompt_column], config, named, tokenizer, where, own)
        columns = dict(row)
        if answer_column is not None:
            columns["answer"] = row[answer_column]
        if messages is not None:
            columns["prompt"] = messages
        # A chat template writes the special tokens itself.
        examples.append(PromptExample(text, columns, index, add_special_tokens=messages is None))
    from_files = (
        config.E_rollouts is not None or config.U_rollouts is not None
    )  # whose prompts may be messages
    if rendering != Rendering() and not from_files and all(e.add_special_tokens for e in examples):
        raise DataError(
            "batch_config.chat_template_kwargs, tools, continue_final_message: expected prompts that go through the "
            f"chat template with them, found texts in {config.dataset_name}; set use_chat_template: true"
        )
    if config.max_prompt_tokens is not None:
        check_prompt_tokens([_count_tokens(tokenizer, e) for e in examples], config.max_prompt_tokens)
    return examples


def default_reward(config: BatchConfig) -> str | list[str]:
    """The reward that a configuration asks for: `batch_config.reward`, else the named data set's own.

    Raises:
        DataError: neither is there.

    >>> default_reward(BatchConfig(dataset_name="gsm8k_r1_template"))
    ['gsm8k', 'tag_format']
    """
    if config.reward is not None:
        return config.reward
    own = _describe(config).reward
    if not own:
        raise DataError(
            f"batch_config.reward: expected a reward, as data set {config.dataset_name!r} has none of its "
            "own, found none; set it to exact_number, tag_format, gsm8k or module:function"
        )
    return list(own) if len(own) > 1 else own[0]


def check_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """A list of messages, without the empty fields that Arrow adds to make all of them alike.

    Args:
        value: what stands in the column.
        where: start of an error message.

    Raises:
        DataError: it is not a list of mappings with a text for `role` and for `content` (which a call of tools need not
            have), or it is empty.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: expected a text or a list of messages, found {_brief(value)}")
    for message in value:
        # A turn that calls tools need not say anything.
        needed = (
            _MESSAGE_KEYS[:1] if isinstance(message, Mapping) and message.get("tool_calls") else _MESSAGE_KEYS
        )
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in needed):
            raise DataError(
                f"{where}: expected messages with a text as role and as content, found {_brief(message)}"
            )
    return [without_empty(message) for message in value]


def check_prompt_tokens(lengths: Sequence[int], limit: int) -> None:
    """Refuse prompts that are longer than `batch_config.max_prompt_tokens`.

    Args:
        lengths: tokens of each prompt.
        limit: the most that is allowed.

    Raises:
        DataError: one is longer; the message says how many are, and which is the longest.
    """
    longer = [index for index, length in enumerate(lengths) if length > limit]
    if longer:
        worst = max(longer, key=lambda index: lengths[index])
        raise DataError(
            f"batch_config.max_prompt_tokens: expected at most {limit} tokens, found {len(longer)} of "
            f"{len(lengths)} prompts with more (prompt {worst} has {lengths[worst]}); raise the limit or "
            "leave these prompts out"
        )


def _describe(config: BatchConfig) -> NamedDataset:
    """What the data set's name stands for."""
    name = config.dataset_name
    return NAMED_DATASETS.get(name, NamedDataset(name))


def _render(
    value: Any,
    config: BatchConfig,
    named: NamedDataset,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    rendering: Rendering,
) -> tuple[str, list[dict[str, Any]] | None]:
    """The text of a prompt, and the messages it was made from where the chat template was used."""
    template = config.prompt_template if config.prompt_template is not None else named.template
    if not isinstance(value, str):
        messages = check_messages(value, where)
        if template is not None:
            raise DataError(
                f"{where}: expected a text to put into the prompt template, found a list of messages"
            )
        if config.system_prompt is not None and messages[0]["role"] == "system":
            raise DataError(
                f"{where}: expected no system message beside batch_config.system_prompt, found one"
            )
    else:
        if not value.strip():
            raise DataError(f"{where}: expected a prompt, found an empty text")
        # Not str.format: prompts and templates may hold braces of their own.
        text = value if template is None else template.replace("{prompt}", value)
        if not config.use_chat_template:
            return text, None
        messages = [{"role": "user", "content": text}]
    if config.system_prompt is not None:
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    return render_messages(tokenizer, messages, where, rendering), messages


def _count_tokens(tokenizer: PreTrainedTokenizerBase, example: PromptExample) -> int:
    """Number of tokens of a prompt."""
    return len(tokenizer(example.text, add_special_tokens=example.add_special_tokens)["input_ids"])


def _prompt_column(config: BatchConfig, named: NamedDataset, columns: list[str]) -> str:
    """The column with the prompts."""
    if config.prompt_column is None and named.prompt_column is None:
        for name in ("prompt", "question"):
            if name in columns:
                return name
        raise DataError(
            f"batch_config.prompt_column: expected a column prompt or question in {config.dataset_name}, "
            f"found {', '.join(columns)}; set the column's name"
        )
    return _require_column(
        "prompt_column", config.prompt_column or named.prompt_column or "", columns, config
    )


def _answer_column(config: BatchConfig, named: NamedDataset, columns: list[str]) -> str | None:
    """The column with the reference answers, None where there is none."""
    name = config.answer_column or named.answer_column
    if name is None:
        return "answer" if "answer" in columns else None
    return _require_column("answer_column", name, columns, config)


def _require_column(key: str, name: str, columns: list[str], config: BatchConfig) -> str:
    """A column's name, if it is there."""
    if name not in columns:
        raise DataError(
            f"batch_config.{key}: expected a column {name!r} in {config.dataset_name}, found "
            f"{', '.join(columns)}{nearest(name, columns)}"
        )
    return name


def _load_rows(config: BatchConfig, named: NamedDataset) -> list[dict[str, Any]]:
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
            f"batch_config.dataset_name: cannot load {config.dataset_name!r}{hint} from the hub: "
            f"{_reason(error)}; check the name and dataset_config, or set batch_config.dataset_path to a "
            "local copy"
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


def _brief(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"

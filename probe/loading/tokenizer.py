"""The tokenizer that was saved: what `tokenizer.json` says, not what a class named after the model makes of it.

`AutoTokenizer` may take a class that builds its own pre-tokenizer and normaliser around the file's vocabulary. A
policy that was trained with the file's would then be probed on other tokens, without any other sign.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.config.checkpoint import CheckpointConfig
from probe.errors.exceptions import CheckpointError
from probe.loading.adapters import read_adapter_config
from probe.loading.base_name import full_name, is_folder, needs_no_hub, resolve_base
from probe.loading.checkpoint import CheckpointFiles
from probe.loading.foreign import check_folder, rewritten
from probe.loading.libraries import fork_torch_rng, quiet_libraries
from probe.loading.saved_tokenizer import load_saved_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_tokenizer(config: CheckpointConfig, files: CheckpointFiles) -> PreTrainedTokenizerBase:
    """Load the policy's tokenizer: that of `config.tokenizer_path`, else the checkpoint's, else the base model's.

    Args:
        config: the `checkpoint` section.
        files: the checkpoint's parts, from `locate_checkpoint`.

    Raises:
        CheckpointError: there is none, it cannot be read, or it has no EOS token.
    """
    with quiet_libraries(), fork_torch_rng():
        if files.kind == "lora":
            base, revision = resolve_base(config, files.model_dir, read_adapter_config(files.model_dir))
            return _load_tokenizer(config, files, base, revision)
        return _load_tokenizer(config, files, full_name(config.backbone), config.revision)


def _load_tokenizer(
    config: CheckpointConfig, files: CheckpointFiles, base: str | None, revision: str | None
) -> PreTrainedTokenizerBase:
    """The tokenizer of the first place that has one; a place that has one must be readable."""
    source: str | None
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    if config.tokenizer_path is not None:
        source = full_name(str(Path(config.tokenizer_path).expanduser()))
    elif files.tokenizer_dirs:
        source = str(files.tokenizer_dirs[0])
    else:
        source = base
        options["revision"] = revision or "main"
    if source is None:
        raise CheckpointError(f"no tokenizer in {files.model_dir}; name one in checkpoint.tokenizer_path")
    with rewritten(
        f"tokenizer {source}", "name a folder or hub id with a tokenizer in checkpoint.tokenizer_path"
    ):
        options["local_files_only"] = needs_no_hub(config, source)
        if is_folder(Path(source)):
            check_folder(Path(source))
        tokenizer = load_saved_tokenizer(source, **options)
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"tokenizer {source}: expected an EOS token, with which a response ends, found none; set "
            "eos_token in its tokenizer_config.json, or name another in checkpoint.tokenizer_path"
        )
    return tokenizer


def token_decoder(tokenizer: Any) -> Callable[[int], str] | None:
    """A function that gives the text of one token id; None without a tokenizer."""
    if tokenizer is None:
        return None

    @cache
    def text(token: int) -> str:
        decoded = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(decoded)

    return text

"""What is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from probe.config.numbers import check_numbers
from probe.errors.exceptions import ConfigError, require

LogLevel = Literal["minimal", "standard", "detailed", "debug"]
LOG_LEVELS: tuple[LogLevel, ...] = ("minimal", "standard", "detailed", "debug")


@dataclass(frozen=True)
class DetailedLoggingConfig:
    """The log files of a run."""

    enabled: bool = True
    """Write the log files."""
    level: LogLevel = "standard"
    """`minimal` (~2 KB), `standard` (~15 KB), `detailed` (~500 KB) or `debug` (~MB)."""
    log_sequences: bool | None = None
    """Texts of prompts and responses, from level `detailed` on; by default on there."""
    log_tokens: bool | None = None
    """Token-by-token values, at level `debug`; by default on there."""
    log_raw_tensors: bool | None = None
    """Raw arrays, at level `debug`; by default on there."""
    output_directory: str = "lightning_logs"
    """Folder in which a folder per date is made."""
    compress: bool = True
    """Compress the main log (`.json.gz`)."""
    filename_template: str = "entropy_probe_{time}_{checkpoint}"
    """Name without ending; `{time}`, `{date}`, `{checkpoint}`, `{level}` and `{seed}` are filled in."""
    max_files: int | None = None
    """Keep at most this many runs in `output_directory`; the oldest are deleted. Default: keep all."""

    @property
    def per_sequence(self) -> bool:
        """Whether there is a log with every sequence, and what X weighs its tokens with."""
        return self.enabled and self.level in ("detailed", "debug")

    def __post_init__(self) -> None:
        """Check the template and the count."""
        check_numbers(self, "detailed_logging.")
        require(
            self.max_files is None or self.max_files >= 1,
            "detailed_logging.max_files",
            "an integer of at least 1, or null",
            self.max_files,
        )
        fields = {"time": "", "date": "", "checkpoint": "", "level": "", "seed": ""}
        try:
            name = self.filename_template.format(**fields)
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"detailed_logging.filename_template: expected only the fields {{{'}, {'.join(fields)}}}, "
                f"found {self.filename_template!r} ({error})"
            ) from error
        require(
            "/" not in name and "\\" not in name and name not in ("", ".", ".."),
            "detailed_logging.filename_template",
            "a file name without folders",
            self.filename_template,
        )


@dataclass(frozen=True)
class OutputConfig:
    """What is written besides the logs."""

    results_path: str | None = None
    """Write the result mapping to this JSON file."""
    report_path: str | None = None
    """Write the run as one self-contained HTML page to this file."""

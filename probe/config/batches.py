"""What E and U are drawn from, how, and in which pieces."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from probe.config.numbers import check_numbers
from probe.errors.exceptions import ConfigError, require
from probe.limits import LARGEST_COUNT


@dataclass(frozen=True)
class BatchConfig:
    """Prompts, rewards and the sizes of the batches E (evaluation) and U (update)."""

    dataset_name: str = "gsm8k_r1_template"
    """`gsm8k_r1_template`, `gsm8k`, `arithmetic` (built in), a hub data set, or a local .jsonl, .parquet or .csv
    file."""
    dataset_config: str | None = None
    """Configuration of a hub data set."""
    dataset_path: str | None = None
    """Read the named data set from this local file or folder instead of the hub."""
    split: str = "test"
    """Split of the data set."""
    prompt_column: str | None = None
    """Column with the prompt or question; by default the named data set's own, else `prompt`, else `question`."""
    answer_column: str | None = None
    """Column with the reference answer; by default the named data set's own, else `answer` where there is one."""
    prompt_template: str | None = None
    """Text in which `{prompt}` is replaced by the prompt column; by default the named data set's own."""
    use_chat_template: bool = False
    """Wrap the prompt as a user message with the tokenizer's chat template."""
    system_prompt: str | None = None
    """System message used with `use_chat_template`."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further options of the chat template, as `chat_template_kwargs` of TRL (`enable_thinking: false`); a column of
    that name in the data comes before it."""
    tools: list[Any] | None = None
    """Tools that the chat template describes: JSON schemas, or functions as `module:function`; a column `tools` in the
    data comes before it."""
    continue_final_message: bool | None = None
    """Continue a conversation that ends with a message of the assistant inside of that message. By default it is; false
    begins a new turn after it, as TRL's GRPOTrainer does."""
    reward: str | list[str] | None = None
    """Registered reward (`exact_number`, `tag_format`, `gsm8k`), or `module:function`; of a list, the weighted sum.
    Default: the named data set's own. Given beside `U_rollouts`, it rewards the responses of a file without rewards."""
    reward_weights: list[float] | None = None
    """Weights of a list of rewards; by default 1 each."""
    reward_columns: list[str] | None = None
    """Columns of a rollout file that add up to the reward; by default `reward` (`score`), else what TRL logs beside
    `advantage`, else the only one there is."""
    E_rollouts: str | None = None
    """Take E from this rollout file (.jsonl or .parquet) instead of sampling."""
    U_rollouts: str | None = None
    """Take U from this rollout file instead of sampling, or from that of the checkpoint's next update in this folder
    (`output/completions` of TRL)."""
    B_E: int = 64
    """Prompts of E, drawn with replacement."""
    G_E: int = 1
    """Responses per prompt of E: `B_E * G_E` in all. More than one pays where prompts differ little or are few."""
    B_U: int = 16
    """Prompts in U."""
    G: int = 8
    """Responses per prompt of U."""
    disjoint: bool = True
    """Draw E and U from disjoint sets of prompts."""
    max_prompt_tokens: int | None = None
    """Refuse prompts with more tokens than this."""

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_numbers(self, "batch_config.")
        require(self.B_E >= 2, "batch_config.B_E", "an integer of at least 2", self.B_E)
        require(self.G_E >= 1, "batch_config.G_E", "an integer of at least 1", self.G_E)
        require(self.B_U >= 1, "batch_config.B_U", "an integer of at least 1", self.B_U)
        require(
            self.G >= 2 or self.U_rollouts is not None,
            "batch_config.G",
            "an integer of at least 2 (a group of one response has advantage 0)",
            self.G,
        )
        for prompts, group in (("B_E", "G_E"), ("B_U", "G")):
            made = getattr(self, prompts) * getattr(self, group)
            require(
                made <= LARGEST_COUNT,
                f"batch_config.{prompts} * batch_config.{group}",
                f"at most {LARGEST_COUNT} responses",
                made,
            )
        require(
            self.prompt_template is None or "{prompt}" in self.prompt_template,
            "batch_config.prompt_template",
            "a text that contains {prompt}",
            self.prompt_template,
        )


@dataclass(frozen=True)
class GenerationConfig:
    """How responses are sampled. The same temperature is used in scoring, so that sampling equals scoring."""

    max_new_tokens: int = 256
    """Responses are cut off after this many tokens; the estimand is the entropy of the capped process."""
    temperature: float = 1.0
    """The probed policy is softmax(logits / temperature), in sampling, log-probs, entropies and loss alike."""
    top_p: float = 1.0
    """Nucleus sampling; below 1 the support is truncated: refused unless `allow_truncated_support`."""
    top_k: int = 0
    """Top-k sampling; 0 is off. Refused unless `allow_truncated_support`."""
    min_p: float = 0.0
    """Min-p sampling; 0 is off. Refused unless `allow_truncated_support`."""
    stop_strings: list[str] = field(default_factory=list)
    """A response ends with the token that completes one of these strings, or with EOS."""
    allow_truncated_support: bool = False
    """Sample with top_p, top_k or min_p all the same; every result is then marked biased."""
    batch_size: int = 64
    """Sequences generated at a time."""
    continuous_batching: bool | Literal["auto"] = "auto"
    """Whether responses are drawn by transformers' continuous batching instead of `generate`. `auto` tries both where
    sampling takes long, and takes it where it is clearly faster. The tokens are the same up to the rounding of the
    logits; with a value other than `auto` the clock has no part in that."""

    def __post_init__(self) -> None:
        """Check ranges, and that the sampler draws from the policy that is scored."""
        check_numbers(self, "generation.")
        require(
            all(self.stop_strings),
            "generation.stop_strings",
            "texts that are not empty (every response ends with an empty one at once)",
            self.stop_strings,
        )
        require(self.max_new_tokens >= 1, "generation.max_new_tokens", "at least 1", self.max_new_tokens)
        require(self.temperature > 0, "generation.temperature", "a number above 0", self.temperature)
        require(0 < self.top_p <= 1, "generation.top_p", "a number in (0, 1]", self.top_p)
        require(self.top_k >= 0, "generation.top_k", "0 (off) or a positive integer", self.top_k)
        require(0 <= self.min_p < 1, "generation.min_p", "a number in [0, 1)", self.min_p)
        require(self.batch_size >= 1, "generation.batch_size", "at least 1", self.batch_size)
        for key, on, off in (
            ("top_p", self.top_p < 1, 1.0),
            ("top_k", self.top_k > 0, 0),
            ("min_p", self.min_p > 0, 0.0),
        ):
            if on and not self.allow_truncated_support:
                raise ConfigError(
                    f"generation.{key}: expected {off} (importance weights and score terms are undefined for tokens "
                    f"outside a truncated support), found {getattr(self, key)}; set "
                    "generation.allow_truncated_support: true to go on with results marked biased"
                )

    @property
    def truncates_support(self) -> bool:
        """Whether the sampler's support is smaller than the scored policy's."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True)
class MemoryConfig:
    """What bounds memory. None of it changes a result beyond the last digits."""

    microbatch_size: int | Literal["auto"] = "auto"
    """Sequences that go through the model at a time; `auto`: as many as `tokens_per_microbatch` holds, which is more of
    short ones. What memory does not suffice for is run again in halves."""
    tokens_per_microbatch: int | None = None
    """Tokens that go through the model at a time, padding included. null: 2048, or what a short trial on E finds the
    fastest where E is large enough for one; with a number for `microbatch_size`, no limit. On a CPU gradients take
    fewer where half of the free memory holds no more (counted on a few responses)."""
    threads: int | Literal["auto"] = "auto"
    """Threads of torch's operators on a CPU. `auto`: as many as the process has, or 1 where a short trial on E finds
    that faster, as it is where other jobs keep the cores busy."""
    head_chunk_tokens: int = 256
    """Response tokens whose logits over the whole vocabulary are held at a time, where they are."""

    @property
    def number_of_threads(self) -> int | None:
        """`threads`, where it is a number."""
        return None if isinstance(self.threads, str) else self.threads

    def __post_init__(self) -> None:
        """Check ranges."""
        check_numbers(self, "memory_config.")
        for key in ("microbatch_size", "tokens_per_microbatch", "threads"):
            value = getattr(self, key)
            require(
                not isinstance(value, int) or value >= 1, f"memory_config.{key}", "at least 1, or auto", value
            )
        require(
            self.head_chunk_tokens >= 1,
            "memory_config.head_chunk_tokens",
            "at least 1",
            self.head_chunk_tokens,
        )

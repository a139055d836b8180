"""Responses drawn by transformers' continuous batching: a row that is over makes room for the next at once."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.utils import logger as transformers_logger

from probe.errors.exceptions import RolloutError
from probe.parameters import without_adapters
from probe.rollouts.decoding import Decoding
from probe.rollouts.inverse_cdf import Drawn, InverseCdf, only
from probe.shards import is_sharded
from probe.snapshot import isolated_rng, put_back_by

PAGE = 32
"""Tokens of one page of the cache."""
PREFILL_TOKENS = 512
"""Tokens that go through the model at a time, at least."""
_ATTENTION = ("eager", "sdpa", "paged|eager", "flash_attention_2", "flash_attention_3")


def refusal(decoding: Decoding) -> str | None:
    """Why these responses cannot be drawn by continuous batching; None where they can.

    Args:
        decoding: what is drawn.
    """
    model = without_adapters(decoding.policy.model)
    config = model.config.get_text_config()
    if is_sharded(decoding.policy.model):
        return "processes hold parts of the weights, and go in step"
    if not hasattr(model, "init_continuous_batching"):
        return f"{type(model).__name__} does not have it"
    if hasattr(model, "_cached_continuous_batching_manager"):
        return "the model has a persistent manager of its own"
    if decoding.settings.stop_strings:
        return "it knows no generation.stop_strings"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or not getattr(model, "_supports_attention_backend", False) or model._is_stateful:
        return f"{type(model).__name__} has layers that are not attention"
    if config._attn_implementation not in _ATTENTION:
        return f"it does not run with attn_implementation {config._attn_implementation}"
    with decoding.policy.autocast():
        if torch.is_autocast_enabled(decoding.policy.device.type):
            return "it runs on a thread of its own, which automatic mixed precision does not reach"
    return None


def by_continuous_batching(decoding: Decoding, entries: Sequence[int], report: Callable[[], None]) -> None:
    """Draw the entries' responses, `generation.batch_size` at a time.

    Each draws the tokens that `generate` would draw, up to the rounding of the logits.

    Args:
        decoding: what is drawn; `refusal` has none.
        entries: numbers of its responses.
        report: called after each response.

    Raises:
        RolloutError: continuous batching has ended before the responses have, or a logit is not finite.
    """
    sampler = _Sampler(decoding, entries)
    with _manager(decoding, entries, sampler) as manager:
        for i in entries:
            manager.add_request(
                list(decoding.responses[i].prompt),
                request_id=str(i),
                max_new_tokens=decoding.settings.max_new_tokens,
            )
        for _ in entries:
            sampler.keep(_next_result(manager, sampler))
            report()


class _Sampler(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Draws each request's next token with its own uniform number, and keeps what was drawn.

    Rows are told apart by the requests that transformers prepares a pass for; passes run in the order in which they
    were prepared.
    """

    def __init__(self, decoding: Decoding, entries: Sequence[int]) -> None:
        self.supported_kwargs: dict[str, type] = {}
        self.ignored_kwargs: tuple[str, ...] = ()
        self._decoding = decoding
        self._inverse = InverseCdf(decoding.settings)
        self._uniform = dict(zip(entries, decoding.uniforms_to_come(entries), strict=True))
        self._prepared: deque[list[int]] = deque()
        self._drawn: dict[int, list[tuple[int, float, float]]] = {i: [] for i in entries}
        self.error: BaseException | None = None

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """No request has arguments."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Which request each row of the next pass belongs to."""
        self._prepared.append([int(request.state.request_id) for request in requests_with_new_token])
        return torch.zeros(len(requests_with_new_token), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Scores under which greedy decoding takes the drawn tokens."""
        try:
            entries = self._prepared.popleft()
            if not entries:  # a pass over a part of long prompts
                return only(scores, torch.zeros(len(scores), dtype=torch.int64, device=scores.device))
            steps = [len(self._drawn[i]) for i in entries]
            uniform = torch.stack([self._uniform[i][n] for i, n in zip(entries, steps, strict=True)])
            drawn = self._inverse.draw(scores[: len(entries)], uniform)
            self._remember(entries, drawn)
        except BaseException as error:
            self.error = error  # transformers keeps its text alone
            raise
        token = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
        token[: len(entries)] = drawn.token
        return only(scores, token)

    def _remember(self, entries: list[int], drawn: Drawn) -> None:
        """Keep what was drawn."""
        columns = (drawn.token.tolist(), drawn.logprob.tolist(), drawn.entropy.tolist())
        for i, *row in zip(entries, *columns, strict=True):
            self._drawn[i].append(tuple(row))

    def keep(self, result: Any) -> None:
        """Give a response what was drawn for it."""
        entry, tokens = int(result.request_id), list(result.generated_tokens)
        response, drawn = self._decoding.responses[entry], self._drawn.pop(entry)[: len(tokens)]
        ids, logprobs, entropies = (list(x) for x in zip(*drawn, strict=True))
        if ids != tokens:
            raise RolloutError(
                f"expected continuous batching to take the drawn tokens, found others in response {entry}; set "
                "generation.continuous_batching: false"
            )
        response.ids, response.logprobs, response.entropies = ids, logprobs, entropies
        response.over = response.continuous = True
        response.truncated = ids[-1] not in self._decoding.eos_ids


@contextmanager
def _manager(decoding: Decoding, entries: Sequence[int], sampler: _Sampler) -> Iterator[Any]:
    """Transformers' manager at work, its thread stopped afterwards, also where an error or Ctrl-C comes."""
    model, settings = without_adapters(decoding.policy.model), decoding.settings
    longest = max(len(decoding.responses[i].prompt) for i in entries) + settings.max_new_tokens
    size = min(settings.batch_size, len(entries))
    config = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=size * -(-longest // PAGE) + 1,
        max_batch_tokens=max(size, PREFILL_TOKENS),
        max_requests_per_batch=size,
        allow_block_sharing=False,
        use_async_batching=False,
        use_cuda_graph=False,
        auto_switch_to_flash=False,
    )
    level, attention = transformers_logger.level, model.config._attn_implementation
    started: list[Any] = []

    def put_back() -> None:
        for manager in started:
            manager.stop(block=True, hard_stop=True)
            manager.destroy()
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        transformers_logger.setLevel(level)

    # transformers seeds the global generators; what goes wrong is raised here
    with isolated_rng(), put_back_by(put_back), torch.no_grad():
        transformers_logger.setLevel(logging.CRITICAL)
        manager = model.init_continuous_batching(
            generation_config=model.generation_config, continuous_batching_config=config
        )
        started.append(manager)
        processors = manager.logit_processor
        processors.logits_processor = LogitsProcessorList([sampler])
        processors.tensors_required, processors.do_processing = 1, True
        manager.start()
        yield manager


def _next_result(manager: Any, sampler: _Sampler) -> Any:
    """The next response that is over."""
    while True:
        result = manager.get_result(timeout=1)
        if sampler.error is not None:
            raise sampler.error
        if result is None and manager.is_running():
            continue
        error = None if result is None else result.error
        if result is None or error is not None:
            raise RolloutError(
                f"expected continuous batching to finish every response, found that it ended with {error!r}; set "
                "generation.continuous_batching: false"
            )
        if result.is_finished():
            return result

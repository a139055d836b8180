"""Where E comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from probe.data.batch import PromptExample, RolloutBatch
from probe.live.settings import WatchSettings
from probe.rollouts.draw import draw_prompts, stream_seed
from probe.rollouts.sampling import SampledTokens, sample_rollouts
from probe.scoring.policy import Policy


class Source(Protocol):
    """Gives an E for each step that is probed; on several ranks the same on all, which call it together.

    Attributes:
        tokenizer: of the policy.
        prompts: such as those of its E, for the rehearsal.
    """

    tokenizer: Any
    prompts: Sequence[PromptExample]

    def draw(self, policy: Policy, number: int, size: int) -> tuple[RolloutBatch, SampledTokens | None]:
        """Responses of the policy as it is.

        Args:
            policy: before the step.
            number: of the optimizer step that comes next, from 1.
            size: responses that are wanted.

        Returns:
            The batch, and what was seen while it was sampled, to be compared with scores; None where nobody knows.
        """


@dataclass
class SampledSource:
    """An E that is sampled from the policy, to prompts that are drawn with replacement.

    Attributes:
        tokenizer: of the prompts.
        prompts: what they are drawn from.
        settings: of the watch.
    """

    tokenizer: Any
    prompts: Sequence[PromptExample]
    settings: WatchSettings

    def draw(self, policy: Policy, number: int, size: int) -> tuple[RolloutBatch, SampledTokens]:
        """See `Source.draw`; every step has random numbers of its own."""
        seed = stream_seed(self.settings.seed, f"prompts {number}")
        index, _ = draw_prompts(len(self.prompts), size, 0, False, seed)
        chosen = [self.prompts[i] for i in index]
        seed = stream_seed(self.settings.seed, f"E {number}")
        return sample_rollouts(policy, self.tokenizer, chosen, self.settings.generation, seed)

"""Teacher-forced scoring: log-prob and exact entropy per token, and gradients of weighted sums of them."""

from probe.scoring.gradients import token_gradients
from probe.scoring.policy import Policy
from probe.scoring.score import score_tokens
from probe.scoring.scores import TokenScores

__all__ = ["Policy", "TokenScores", "score_tokens", "token_gradients"]

"""The per-token formulas of the literature, as their authors' code has them.

Left out, as no exact formula could be had: OPEFO (arXiv:2605.11491, secondary notes only), ICT (2606.19771) and ARCA
(2606.00257), whose normalisations are not in what is public; the clip side (2509.26114), abstract only. The entropy
ratio (2512.05591) and FIPO (2603.19835) look at the policy *after* the update, or at one that has moved since it
sampled, and predict nothing of a first step.
"""

from __future__ import annotations

from torch import Tensor

from probe.attribution.predictors.registry import predictor
from probe.attribution.tokens import UpdateTokens


@predictor("cov", "arXiv:2505.22617, PRIME-RL/Entropy-Mechanism-of-RL core_algos.py")
def cov(tokens: UpdateTokens) -> Tensor:
    """The entropy falls by the covariance of log-prob and advantage: `-(A - mean A) (log p - mean log p)`."""
    return -tokens.covariance


@predictor("discriminator", "arXiv:2602.03392, section 3: a single logit is raised")
def discriminator(tokens: UpdateTokens) -> Tensor:
    """Raising one logit changes the entropy by `-S`, `S = p (h + log p)`: `-A S`."""
    return -tokens.A * tokens.discriminator


@predictor("discriminator_centred", "arXiv:2602.03392, theorem 3.3: a GRPO step of a softmax")
def discriminator_centred(tokens: UpdateTokens) -> Tensor:
    """The exact change of a softmax whose states share nothing: `-A (S_y - E_pi[S])`."""
    return -tokens.A * (tokens.discriminator - tokens.expected_discriminator)


@predictor("steer", "arXiv:2510.10150, zz-haooo/STEER core_algos.py compute_token_weights")
def steer(tokens: UpdateTokens) -> Tensor:
    """`-Omega`, `Omega = A r (1 - p) (log p + h)`, the ratio `r = p / p_old` being what the table puts on."""
    return -tokens.A * (1 - tokens.p) * (tokens.logprob + tokens.entropy)


@predictor("stare", "arXiv:2606.19236, hp-luo/STARE core_algos.py compute_stare_token_weights")
def stare(tokens: UpdateTokens) -> Tensor:
    """Of the tenth of highest surprisal rewarded tokens raise the entropy, punished ones lower it: `A`; others 0."""
    return tokens.A * (tokens.surprising(tokens.A > 0, 0.1) | tokens.surprising(tokens.A < 0, 0.1)).double()


@predictor("positive_advantage", "arXiv:2506.01347, TianHongZXY/RLVR-Decomposed core_algos.py")
def positive_advantage(tokens: UpdateTokens) -> Tensor:
    """Rewarded responses sharpen the policy, punished ones do not: `-1[A > 0]`."""
    return -(tokens.A > 0).double()


@predictor("sure_tokens", "arXiv:2511.15248 (EntroPIC), yk7333/EntroPIC core_algos.py")
def sure_tokens(tokens: UpdateTokens) -> Tensor:
    """The entropy is ruled by the tokens that the policy is sure of: `-A 1[p > 0.95]`."""
    return -tokens.A * (tokens.p > 0.95).double()


@predictor("entropy", "arXiv:2506.01939 (80/20), Shenzhi-Wang/Beyond-the-80-20-Rule-RLVR", signed=False)
def entropy(tokens: UpdateTokens) -> Tensor:
    """The tokens of high entropy are those that matter: `h`, without a sign."""
    return tokens.entropy


@predictor("advantage", "the policy gradient itself")
def advantage(tokens: UpdateTokens) -> Tensor:
    """Whatever is reinforced lowers the entropy, whatever is punished raises it: `-A`."""
    return -tokens.A


@predictor(
    "proxy_gradient", "arXiv:2605.21467 (DelTA), RUCBM/DelTA dp_actor.py: its proxy (1 - p) h", signed=False
)
def proxy_gradient(tokens: UpdateTokens) -> Tensor:
    """A token moves the policy by its gradient by its own logit: `|A| (1 - p)`, hidden states being alike."""
    return tokens.A.abs() * (1 - tokens.p)


@predictor("last_layer", "the output layer's share of the gradient product; written for this table")
def last_layer(tokens: UpdateTokens) -> Tensor:
    """What the output layer alone would do to the states `e` of E: `A sum_e ((e_y - p) . g_e) (h . h_e)`."""
    if tokens.last_layer is None:
        raise ValueError("last_layer: expected derivatives along the output layer's gradient, found none")
    return tokens.A * tokens.last_layer

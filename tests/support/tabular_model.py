"""The policies of `tabular` as a transformers model that can be trained and probed.

    logits(prefix) = base(prefix) + own(prefix) + shared(features(prefix))

`base` is the family's table and frozen. `own` and `shared` are trained and start at 0: `own` moves the states that the
training's responses went through, `shared` all states at once, the rare ones too, as the weights of a language model
do. Weight decay draws both back to the table.
"""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from tests.support.tabular import CAP, EOS, VOCABULARY, Enumeration, Tabular, enumeration

WORDS = ("<eos>", "a", "b", "c", "d", "e")
PROMPT = "a"
"""The one prompt, of one token; what follows it is the prefix."""
SHARED_FEATURES = 16


class TabularConfig(PretrainedConfig):
    """What the library asks of a model's configuration."""

    model_type = "tabular"

    def __init__(self, **options: Any) -> None:
        settings = {
            "vocab_size": VOCABULARY,
            "hidden_size": VOCABULARY,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "max_position_embeddings": CAP + 1,
            "bos_token_id": None,
            "eos_token_id": EOS,
            "pad_token_id": EOS,
            "tie_word_embeddings": False,
        }
        super().__init__(**{**settings, **options})
        for name, value in settings.items():
            setattr(self, name, options.get(name, value))


class TabularModel(PreTrainedModel, GenerationMixin):
    """A causal language model whose logits are rows of a table; its hidden states are these logits.

    Attributes:
        digits: the embedding: a token's digit in a prefix's number to the base `VOCABULARY`. Frozen.
        lm_head: the identity. Frozen.
        own: change of each prefix's logits.
        shared: change of all prefixes' logits, by their features.
    """

    config_class = TabularConfig

    def __init__(self, space: Tabular, seed: int = 0) -> None:
        """A model of the family's policy before its update.

        Args:
            space: a policy.
            seed: of the features.
        """
        super().__init__(TabularConfig())
        every = enumeration()
        g = torch.Generator().manual_seed(seed)
        features = torch.randn(len(every.prefixes), SHARED_FEATURES, generator=g)
        rows = torch.zeros(VOCABULARY**CAP, dtype=torch.int64)  # what is no prefix may have any row
        for prefix, row in every.prefixes.items():
            rows[_number(prefix)] = row
        self.register_buffer("base", space.logits.float())
        self.register_buffer("features", features)
        self.register_buffer("rows", rows)
        self.digits = nn.Embedding(VOCABULARY, 1)
        self.lm_head = nn.Linear(VOCABULARY, VOCABULARY, bias=False)
        self.own = nn.Embedding(len(every.prefixes), VOCABULARY)
        self.shared = nn.Linear(SHARED_FEATURES, VOCABULARY, bias=False)
        with torch.no_grad():
            self.digits.weight.copy_(torch.arange(VOCABULARY).unsqueeze(1))
            self.lm_head.weight.copy_(torch.eye(VOCABULARY))
            self.own.weight.zero_()
            self.shared.weight.zero_()
        self.digits.requires_grad_(False)
        self.lm_head.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        """What turns tokens into numbers."""
        return self.digits

    def get_output_embeddings(self) -> nn.Module:
        """What turns hidden states into logits."""
        return self.lm_head

    def hidden_states(self, rows: Tensor) -> Tensor:
        """Of prefixes, by their rows, `(..., VOCABULARY)`."""
        return self.base[rows] + self.own(rows) + self.shared(self.features[rows])

    def table(self) -> Tensor:
        """The logits of all prefixes in float64, `(prefixes, VOCABULARY)`, from the weights as they are rounded."""
        with torch.no_grad():
            own, shared = self.own.weight.double(), self.shared.weight.double()
            return self.base.double() + own + self.features.double() @ shared.T

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        """Logits after each token of inputs that begin with the prompt's one token."""
        digit = self.digits(input_ids)[..., 0].long()
        number = torch.zeros_like(input_ids[:, 0])
        numbers = [number]
        for column in range(1, input_ids.shape[1]):
            number = number * VOCABULARY + digit[:, column]
            numbers.append(number)
        rows = self.rows[torch.stack(numbers, 1).clamp(max=len(self.rows) - 1)]
        return CausalLMOutput(logits=self.lm_head(self.hidden_states(rows)))

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Tensor | None]:
        """All tokens so far, in every step: a row of the table needs no cache."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def _number(prefix: tuple[int, ...]) -> int:
    """A prefix as a number; its digits are not 0, which ends responses, so that no two have the same."""
    number = 0
    for token in prefix:
        number = number * VOCABULARY + token
    return number


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of `WORDS`."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=WORDS[EOS]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    end = WORDS[EOS]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, pad_token=end, padding_side="left"
    )


def sampled(model: TabularModel, every: Enumeration, count: int, g: torch.Generator) -> Tensor:
    """Responses drawn from the policy as it is, by their rows of the enumeration, `(count,)`."""
    return torch.multinomial(every.probability(model.table()), count, replacement=True, generator=g)


def as_inputs(every: Enumeration, rows: Tensor) -> Tensor:
    """The prompt and responses, cut before the last token, which nothing is predicted from: `(n, CAP)`."""
    prompt = torch.full((len(rows), 1), WORDS.index(PROMPT))
    return torch.cat([prompt, every.token[rows][:, :-1]], dim=1)

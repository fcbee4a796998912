"""The encoder of T5 (Raffel et al. 2020, arXiv:1910.10683) in a form in which its weights may rest in FP8 or elsewhere.

Shape letters: B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from framework.models.published_config import check_kind, untyped


class T5TextEncoder(T5EncoderModel):  # type: ignore[no-untyped-call]
    """transformers' encoder with one table of embeddings instead of one that has two names.

    The tie between both is lost where parameters are put in place one by one, and each would rest in memory.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        untyped(self.encoder).embed_tokens = None
        for part in list(self.encoder.modules()):
            if type(part) is T5DenseGatedActDense:
                part.__class__ = _GatedDense

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: (B, L) -> last hidden state (B, L, D), after the final norm; padding is attended to."""
        hidden: Tensor = self.encoder(inputs_embeds=self.shared(input_ids)).last_hidden_state
        return hidden


class _GatedDense(T5DenseGatedActDense):
    """The same product, but without a look at `wo.weight.dtype`, which would decode, or fetch, the weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: (B, L, D) -> (B, L, D)."""
        gated = self.act(self.wi_0(hidden_states)) * self.wi_1(hidden_states)
        out: Tensor = self.wo(self.dropout(gated))
        return out


def build_t5_encoder(values: Mapping[str, Any], folder: Path, *, family: str) -> nn.Module:
    """T5's encoder from the config of the whole model or of the encoder."""
    check_kind(values.get("model_type"), "t5", folder, family=family)
    encoder: nn.Module = untyped(T5TextEncoder)(T5Config.from_dict(dict(values)))
    return encoder

"""The encoder of UMT5 (Chung et al. 2023, arXiv:2304.09151), so that its weights may rest in FP8 or elsewhere.

Shape letters: B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5DenseGatedActDense, UMT5Stack

from framework.models.published_config import check_kind, untyped


class _GatedDense(UMT5DenseGatedActDense):
    """The same product, but without a look at `wo.weight.dtype`, which would decode, or fetch, the weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: (B, L, D) -> (B, L, D)."""
        gated = self.act(self.wi_0(hidden_states)) * self.wi_1(hidden_states)
        out: Tensor = self.wo(self.dropout(gated))
        return out


def build_umt5_encoder(values: Mapping[str, Any], folder: Path, *, family: str) -> nn.Module:
    """UMT5's stack of encoder blocks from the config of the whole model or of the encoder.

    The stack alone has one table of embeddings; around it transformers gives the same table a second name, and the
    tie between both is lost where parameters are put in place one by one. There is no dropout: captions are encoded
    without it, whatever mode the module is in.
    """
    check_kind(values.get("model_type"), "umt5", folder, family=family)
    config: Any = UMT5Config.from_dict(dict(values))
    config.is_encoder_decoder, config.use_cache = False, False
    config.dropout_rate = 0.0
    stack: nn.Module = untyped(UMT5Stack)(config)
    for part in stack.modules():
        if type(part) is UMT5DenseGatedActDense:
            part.__class__ = _GatedDense
    return stack

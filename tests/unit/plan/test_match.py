"""Names, kinds and patterns."""

from __future__ import annotations

import pytest

from framework.plan.match import matches, module_name, nearest_layers, select_layers, tensor_kind
from framework.schema.families import QWEN_IMAGE

TEXT = QWEN_IMAGE.components["text_encoder"]
DIT = QWEN_IMAGE.components["dit"]
LAYERS = {
    f"blocks.{i}.attn.{name}": None
    for i in range(12)
    for name in ("to_q", "to_k", "to_v", "to_out.0")
}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("model.embed_tokens.weight", "embed_tokens.weight"),
        ("model.language_model.norm.weight", "norm.weight"),
        ("visual.blocks.0.attn.qkv.weight", None),
        ("model.visual.blocks.0.attn.qkv.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_names_of_both_published_layouts(key: str, name: str | None) -> None:
    assert module_name(key, TEXT) == name
    assert (
        module_name("transformer_blocks.0.attn.to_q.bias", DIT)
        == "transformer_blocks.0.attn.to_q.bias"
    )


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("layers.0.mlp.up_proj.weight", (8, 4), "linear"),
        ("embed_tokens.weight", (8, 4), "embedding"),
        ("conv.weight", (8, 4, 3, 3), "conv"),
        ("conv.weight", (8, 4, 3, 3, 3), "conv"),
        ("norm.weight", (8,), "other"),
        ("conv1d.weight", (8, 4, 3), "other"),
        ("layer.bias", (8,), "other"),
        ("norm.gamma", (8, 1, 1, 1), "other"),
        ("weight", (8, 4), "other"),
    ],
)
def test_kinds(name: str, shape: tuple[int, ...], kind: str) -> None:
    assert tensor_kind(name, shape, TEXT) == kind


@pytest.mark.parametrize(
    ("glob", "count"),
    [
        ("attn.to_q", 12),
        ("to_out.0", 12),
        ("blocks.1.*", 4),
        ("blocks.1*", 12),
        ("*", 48),
        ("o_q", 0),
        ("blocks.0.attn.to_q", 1),
    ],
)
def test_patterns(glob: str, count: int) -> None:
    assert sum(matches(layer, glob) for layer in LAYERS) == count


def test_each_pattern_that_matches_nothing_is_a_fault() -> None:
    chosen, faults = select_layers(
        ["attn.q", "to_k", "attn.k"],
        LAYERS,
        path="model.dit.lora.target_modules",
        what="linear layers",
        component="dit",
    )
    assert len(chosen) == 12
    assert [fault.path for fault in faults] == [
        "model.dit.lora.target_modules[0]",
        "model.dit.lora.target_modules[2]",
    ]
    assert faults[0].message == '"attn.q" matches 0 of 48 linear layers in dit'
    assert faults[0].nearest[0] == "attn.to_q"
    assert "octavo plan recipe=... --layers dit" in faults[0].hint


def test_nearest_names_say_different_things() -> None:
    near = nearest_layers("attn.to_qq", LAYERS)
    assert near[0] == "attn.to_q"
    assert len(set(near)) == len(near) <= 3
    assert nearest_layers("zzzzzzzz", LAYERS) == ()

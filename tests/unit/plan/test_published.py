"""FP8 files as other programs write them: whose scale is whose, and what can't be understood."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from framework.errors import ConfigError
from framework.inventory import StoredTensor
from framework.plan.build import build_inference_plan
from framework.plan.native_names import read_component
from framework.plan.published import published_scaling, read_published
from framework.plan.types import ComponentPlan, scale_shape
from framework.schema import ModelConfig
from framework.schema.families import FAMILIES
from tests.published import publish_fp8

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1}


def headers(**tensors: tuple[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    """Key (with "__" for dots) -> dtype and shape, as they would lie in one file."""
    found: dict[str, StoredTensor] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        key = name.replace("__", ".")
        start, end = end, end + prod(shape) * SIZES[dtype]
        found[key] = StoredTensor(key, "weights.safetensors", shape, dtype, start, end)
    return found


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("scale_weight", ()),
        ("scale_weight", (1,)),
        ("scale_weight", (8, 1)),
        ("scale_weight", (8, 4, 1)),
        ("weight_scale", ()),
        ("weight_scale", (8,)),
        ("weight_scale_inv", (1, 1)),
    ],
)
def test_the_scale_is_found_under_every_name(name: str, shape: tuple[int, ...]) -> None:
    found = read_published(
        headers(
            to_q__weight=("F8_E4M3", (8, 16)),
            to_q__bias=("BF16", (8,)),
            **{f"to_q__{name}": ("F32", shape)},
            norm__weight=("BF16", (8,)),
        )
    )
    assert list(found.tensors) == ["to_q.weight", "to_q.bias", "norm.weight"]
    assert found.problems == []
    assert found.scales["to_q.weight"].key == f"to_q.{name}"
    assert found.scales["to_q.weight"].shape == shape


def test_markers_and_scales_of_inputs_are_left_out() -> None:
    found = read_published(
        headers(
            scaled_fp8=("F8_E4M3", (2,)),
            to_q__weight=("F8_E4M3", (8, 16)),
            to_q__scale_weight=("F32", ()),
            to_q__scale_input=("F32", ()),
            to_q__input_scale=("F32", ()),
            to_q__comfy_quant=("U8", (30,)),
        )
    )
    assert list(found.tensors) == ["to_q.weight"]
    assert found.problems == []


def test_names_that_only_look_like_scales_stay() -> None:
    tensors = headers(
        mixer__scale_weight=("BF16", (8,)),
        head__scaled_fp8=("BF16", (2,)),
        to_q__weight=("BF16", (8, 16)),
    )
    assert read_published(tensors).tensors == tensors


def test_the_diffusion_model_of_a_whole_checkpoint_is_taken_out() -> None:
    tensors = headers(
        model__diffusion_model__to_q__weight=("F8_E4M3", (8, 16)),
        model__diffusion_model__to_q__scale_weight=("F32", ()),
        model__diffusion_model__scaled_fp8=("F8_E4M3", (0,)),
        vae__conv_in__weight=("BF16", (8, 16)),
    )
    found = read_component(tensors, FAMILIES["qwen_image"].components["dit"])
    assert list(found.tensors) == ["to_q.weight"]
    assert found.tensors["to_q.weight"].key == "model.diffusion_model.to_q.weight"
    assert found.scales["to_q.weight"].key == "model.diffusion_model.to_q.scale_weight"


def test_what_the_family_ignores_is_not_judged() -> None:
    tensors = headers(
        visual__fc__weight=("I8", (8, 16)),
        visual__fc__weight_scale=("F32", (8,)),
        fc__weight=("BF16", (8, 16)),
    )
    assert read_published(tensors).problems
    ignoring = read_published(tensors, ignored_keys=("visual.*",))
    assert list(ignoring.tensors) == ["fc.weight"]
    assert ignoring.problems == []


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"weight": ("F8_E5M2", (8, 16)), "scale_weight": ("F32", ())}, "weight of F8_E5M2"),
        ({"weight": ("BF16", (8, 16)), "weight_scale": ("F32", ())}, "weight of BF16"),
        ({"weight": ("U8", (8, 8)), "weight_scale": ("F8_E4M3", (8, 1))}, "4-bit or 8-bit"),
        ({"weight": ("I8", (8, 16)), "weight_scale": ("F32", (8, 1))}, "8-bit integers"),
        ({"weight": ("F8_E4M3", (8, 32)), "weight_scale": ("U8", (8, 1))}, "a scale of U8"),
        ({"weight": ("F8_E4M3", (8, 32)), "scale_weight": ("F32", (5,))}, r"scale \[5\] belongs"),
        ({"weight": ("F8_E4M3", (8, 32)), "scale_weight": ("F32", (3, 5))}, "belongs to no rows"),
        (
            {
                "weight": ("F8_E4M3", (8, 32)),
                "scale_weight": ("F32", (8, 2, 1)),
                "scale_weight_tensor": ("F32", ()),
            },
            "two levels",
        ),
        (
            {
                "weight": ("F8_E4M3", (8, 32)),
                "scale_weight": ("F32", ()),
                "weight_scale": ("F32", ()),
            },
            "another scale",
        ),
    ],
)
def test_what_can_not_be_understood_is_said(
    tensors: dict[str, tuple[str, tuple[int, ...]]], problem: str
) -> None:
    layers = {f"layer{i}__{leaf}": value for i in range(3) for leaf, value in tensors.items()}
    (found,) = read_published(headers(**layers)).problems
    assert found.startswith("layer0.")
    assert "and 1 more: " in found
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(found)


@pytest.mark.parametrize(
    ("shape", "scale", "expected"),
    [
        ((8, 16), (), ("tensor", None)),
        ((8, 16), (1, 1), ("tensor", None)),
        ((8, 16), (8,), ("row", None)),
        ((8, 16), (8, 1), ("row", None)),
        ((8, 16), (8, 1, 1), ("row", None)),
        ((8, 4, 3, 3), (8, 1, 1, 1), ("row", None)),
        ((8, 16), (8, 4, 1), ("block", (1, 4))),
        ((8, 16), (8, 4), ("block", (1, 4))),
        ((256, 384), (2, 3), ("block", (128, 128))),
        ((200, 300), (2, 3), ("block", (128, 128))),
        ((256, 384), (4, 6), ("block", (64, 64))),
        ((8, 16), (16,), None),
        ((8, 16), (2, 3), None),
        ((8, 16), (0,), None),
        ((8, 16), (8, 4, 2), None),
        ((8, 16), (1, 16), ("block", (8, 1))),
    ],
)
def test_the_shape_of_a_scale_says_what_shares_it(
    shape: tuple[int, ...],
    scale: tuple[int, ...],
    expected: tuple[str, tuple[int, int] | None] | None,
) -> None:
    found = published_scaling(shape, scale)
    assert found == expected
    if found is not None:
        assert prod(scale_shape(shape, *found) or ()) == prod(scale)


def plan_of(source: Path, precision: str, *, published: Path) -> ComponentPlan:
    """The DiT of `published` beside the other components of `source`."""
    dit = {"precision": precision, "source": str(published)}
    model = ModelConfig.model_validate({"family": "qwen_image", "source": str(source), "dit": dit})
    return build_inference_plan(model, device="cpu").component("dit")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_published_weights_are_grouped_by_their_scales(
    tiny_checkpoint: Path, tmp_path: Path, prefix: str
) -> None:
    published = publish_fp8(
        tiny_checkpoint / "transformer", tmp_path / "fp8", "mixed", prefix=prefix
    )
    part = plan_of(tiny_checkpoint, "fp8", published=published)
    groups = {group.name: group for group in part.groups}
    assert list(groups) == [
        "fp8_as_published",
        "fp8_as_published_block_128x128",
        "fp8_as_published_block_1x8",
        "fp8_as_published_row",
        "fp8_as_published_tensor",
        "high_precision",
    ]
    assert groups["fp8_as_published_block_1x8"].block_shape == (1, 8)
    for name, group in groups.items():
        assert group.tensors
        for tensor in group.tensors:
            assert tensor.source_key.startswith(prefix)
            if name != "high_precision":
                assert (tensor.published_scale is None) == (group.scaling == "none")
    # The family's high-precision layers are FP8 in the file, too: their scales are known where they are loaded.
    assert any(tensor.published_scale is not None for tensor in groups["high_precision"].tensors)
    assert "scaled_fp8" not in {tensor.name for g in part.groups for tensor in g.tensors}
    plain = plan_of(tiny_checkpoint, "fp8", published=tiny_checkpoint / "transformer")
    assert {t.name for g in part.groups for t in g.tensors} == {
        t.name for g in plain.groups for t in g.tensors
    }


def test_a_checkpoint_that_can_not_be_understood_is_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    published = publish_fp8(tiny_checkpoint / "transformer", tmp_path / "fp8", "comfyui")
    path = published / "fp8.safetensors"
    state = load_file(path)
    key = next(key for key in state if key.endswith(".scale_weight"))
    save_file(state | {key: torch.ones(7, 11)}, path)
    with pytest.raises(ConfigError, match=r"scale \[7, 11\] belongs to no rows or blocks"):
        plan_of(tiny_checkpoint, "fp8", published=published)

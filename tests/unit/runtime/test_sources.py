"""Published FP8 weights as they are loaded: the codes of the file, its scale, and nothing that doesn't count."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from framework.errors import PlanError
from framework.inventory import read_inventory
from framework.models import get_family
from framework.plan.build import build_inference_plan, build_run_plan
from framework.plan.types import ComponentPlan, Placement, States, TensorGroup, TensorPlan
from framework.runtime.load import load_component, resting_bytes
from framework.runtime.sources import TensorSource, read_resting
from framework.schema import RunConfig
from framework.storage.fp8 import encode_e4m3
from framework.storage.managed import ManagedWeight
from tests.published import LAYOUTS, load_state, publish_fp8

CPU = torch.device("cpu")


def plan_of(source: Path, published: Path, *, purpose: str = "infer", **dit: Any) -> ComponentPlan:
    model = {"family": "qwen_image", "source": str(source), "dit": {"source": str(published)} | dit}
    config = RunConfig.model_validate({"model": model, "data": {"path": "p"}, "run": {"name": "t"}})
    if purpose == "infer":
        return build_inference_plan(config.model, device="cpu").component("dit")
    return build_run_plan(config, device="cpu").component("dit")


def load(part: ComponentPlan, **options: Any) -> nn.Module:
    family = get_family("qwen_image")
    return load_component(part, family, device=CPU, compute_dtype=torch.bfloat16, **options)


def scale_of(state: dict[str, torch.Tensor], layer: str) -> torch.Tensor | None:
    for name in ("scale_weight", "weight_scale", "weight_scale_inv"):
        if f"{layer}.{name}" in state:
            return state[f"{layer}.{name}"]
    return None


def expected_weight(state: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    """What another program would compute with, in float64: codes times scale, broadcast or block by block."""
    codes = state[f"{layer}.weight"].double()
    scale = scale_of(state, layer)
    if scale is None:
        return codes
    if scale.ndim == 3:
        return (codes.view(*scale.shape[:2], -1) * scale).view(codes.shape)
    if f"{layer}.weight_scale_inv" in state:
        scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        scale = scale[: codes.shape[0], : codes.shape[1]]
    return codes * scale


@pytest.mark.parametrize("layout", [*LAYOUTS, "mixed"])
def test_fp8_weights_rest_as_they_were_published(
    tiny_checkpoint: Path, tmp_path: Path, layout: str
) -> None:
    published = publish_fp8(tiny_checkpoint / "transformer", tmp_path / "fp8", layout)
    part = plan_of(tiny_checkpoint, published, precision="fp8")
    module = load(part)
    assert resting_bytes(module) == part.resting_bytes
    state = load_state(published)
    managed = 0
    for name, layer in module.named_modules():
        if isinstance(layer, ManagedWeight):
            managed += 1
            assert torch.equal(layer.codes, state[f"{name}.weight"].view(torch.uint8))
            torch.testing.assert_close(
                layer.weight, expected_weight(state, name).to(torch.bfloat16), rtol=0, atol=0
            )
    assert managed == sum(len(g.tensors) for g in part.groups if g.scaling is not None)
    # A layer that the family keeps in high precision is FP8 in the file: its scale is multiplied in while loading.
    weight = module.get_submodule("proj_out").weight
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(
        weight, expected_weight(state, "proj_out").to(torch.bfloat16), rtol=0, atol=0
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_fp8_checkpoint_loads_into_high_precision_with_its_scale(
    tiny_checkpoint: Path, tmp_path: Path, layout: str
) -> None:
    published = publish_fp8(
        tiny_checkpoint / "transformer", tmp_path / "fp8", layout, prefix="model.diffusion_model."
    )
    state = {
        key.removeprefix("model.diffusion_model."): value
        for key, value in load_state(published).items()
    }
    original = load_state(tiny_checkpoint / "transformer")
    for purpose, options, dtype in (
        ("infer", {}, torch.bfloat16),
        ("train", {"trainable": "full"}, torch.float32),
    ):
        module = load(plan_of(tiny_checkpoint, published, purpose=purpose, **options))
        for name, parameter in module.named_parameters():
            assert parameter.dtype == dtype
            if parameter.ndim == 2:
                layer = name.removesuffix(".weight")
                expected = expected_weight(state, layer).to(dtype)
                torch.testing.assert_close(parameter, expected, rtol=0, atol=0)
                if layout != "plain":
                    off = (parameter.detach() - original[name]).norm() / original[name].norm()
                    assert float(off) < 0.05


def test_a_published_weight_with_nan_or_a_scale_without_end_is_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    published = publish_fp8(tiny_checkpoint / "transformer", tmp_path / "fp8", "musubi_channel")
    path = published / "fp8.safetensors"
    state = load_file(path)
    for precision, key in (
        ("fp8", "transformer_blocks.0.attn.to_q"),
        ("bf16", "transformer_blocks.0.attn.to_q"),
        ("fp8", "proj_out"),
    ):
        part = plan_of(tiny_checkpoint, published, precision=precision)
        codes = state[f"{key}.weight"].view(torch.uint8).clone()
        codes[0, 0] = 0xFF
        save_file(state | {f"{key}.weight": codes.view(torch.float8_e4m3fn)}, path)
        with pytest.raises(PlanError, match="holds NaN"):
            load(part)
        scale = state[f"{key}.scale_weight"].clone()
        scale[0] = float("inf")
        save_file(state | {f"{key}.scale_weight": scale}, path)
        with pytest.raises(PlanError, match="isn't finite"):
            load(part)
        save_file(state, path)


def test_a_scale_that_changed_since_the_plan_was_made_is_noticed(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    published = publish_fp8(tiny_checkpoint / "transformer", tmp_path / "fp8", "musubi_channel")
    part = plan_of(tiny_checkpoint, published, precision="fp8")
    shutil.rmtree(published)
    publish_fp8(tiny_checkpoint / "transformer", published, "comfyui")
    with pytest.raises(PlanError, match="changed since the plan was made"):
        load(part)


@pytest.mark.parametrize("scaling", ["row", "tensor", "block", "none"])
@pytest.mark.parametrize("part_bytes", [1, 500, 4096])
def test_reading_a_few_rows_at_a_time_changes_nothing(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, scaling: str, part_bytes: int
) -> None:
    fp8 = {"scaling": scaling, "layers": ["linear", "conv", "embedding"]}
    transformer = tiny_checkpoint / "transformer"
    part = plan_of(tiny_checkpoint, transformer, precision="fp8", fp8=fp8)
    counted: list[int] = []
    whole = load(part)
    monkeypatch.setattr("framework.runtime.streaming.PART_BYTES", part_bytes)
    monkeypatch.setattr("framework.runtime.sources.PART_BYTES", part_bytes)
    in_parts = load(part, on_progress=counted.append)
    first, second = whole.state_dict(), in_parts.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    in_files = read_inventory(transformer)
    assert sum(counted) == sum(tensor.num_bytes for tensor in in_files.values())
    assert len(counted) >= len(in_files)


def test_parts_of_several_block_rows_are_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight of 2.5 rows of blocks, read one row of blocks at a time."""
    torch.manual_seed(0)
    weight = torch.randn(320, 40).to(torch.bfloat16)
    save_file({"layer.weight": weight, "after": torch.ones(3)}, tmp_path / "w.safetensors")
    stored = read_inventory(tmp_path)
    rest = Placement(storage_dtype="fp8_e4m3", place="device")
    tensor = TensorPlan(
        name="layer.weight",
        source_key="layer.weight",
        file=stored["layer.weight"].file,
        shape=(320, 40),
        source_dtype="BF16",
        kind="linear",
    )
    group = TensorGroup(
        name="fp8",
        states=States(offload=rest, onload=rest, preparing=rest, computation=rest),
        scaling="block",
        block_shape=(128, 128),
        tensors=(tensor,),
    )
    monkeypatch.setattr("framework.runtime.sources.PART_BYTES", 128 * 80)
    source = TensorSource(group, tensor, stored["layer.weight"], None)
    ((_, found),) = read_resting([source], CPU)
    codes, scale = encode_e4m3(weight, "block", (128, 128))
    assert scale is not None
    assert scale.shape == (3, 1)
    assert found.dequant_scale is not None
    assert torch.equal(found.values, codes)
    assert torch.equal(found.dequant_scale, scale)


def test_a_damaged_weight_in_a_later_part_is_refused(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "transformer"
    shutil.copytree(tiny_checkpoint / "transformer", source)
    part = plan_of(tiny_checkpoint, source, precision="fp8")
    path = next(source.glob("*.safetensors"))
    state = load_file(path)
    key = next(k for k, v in state.items() if v.ndim == 2 and "transformer_blocks" in k)
    state[key][-1, -1] = float("nan")
    save_file(state, path, {"format": "pt"})
    monkeypatch.setattr("framework.runtime.streaming.PART_BYTES", 256)
    monkeypatch.setattr("framework.runtime.sources.PART_BYTES", 256)
    with pytest.raises(PlanError, match="aren't finite"):
        load(part)

"""Converted weights: written once, whole or absent, never taken for another's, and read as they rest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from framework.errors import SourceError
from framework.inventory import read_file_header, read_inventory
from framework.models import get_family
from framework.plan.build import build_inference_plan
from framework.plan.types import ComponentPlan
from framework.plan.units import component_units, rests_as_published
from framework.runtime.converted import use_converted
from framework.runtime.load import load_component, resting_bytes
from framework.schema import ModelConfig
from tests.published import publish_fp8

CPU = torch.device("cpu")
SETTINGS: dict[str, dict[str, Any]] = {
    "row": {"precision": "fp8"},
    "tensor": {"precision": "fp8", "fp8": {"scaling": "tensor"}},
    "block": {"precision": "fp8", "fp8": {"scaling": "block"}},
    "none": {"precision": "fp8", "fp8": {"scaling": "none"}},
    "everything": {
        "precision": "fp8",
        "fp8": {"layers": ["linear", "conv", "embedding"], "keep_high_precision": []},
    },
    "bf16": {},
}


def plan_of(model_folder: Path, component: str = "dit", **settings: Any) -> ComponentPlan:
    model = ModelConfig.model_validate(
        {"family": "qwen_image", "source": str(model_folder), component: settings}
    )
    return build_inference_plan(model, device="cpu").component(component)


def load(part: ComponentPlan) -> nn.Module:
    family = get_family("qwen_image")
    return load_component(part, family, device=CPU, compute_dtype=torch.bfloat16)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """The same bits under the same names; NaN never occurs in weights."""
    first, second = state(a), state(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(first[name].dtype == second[name].dtype for name in first)


@pytest.mark.parametrize("component", ["dit", "text_encoder", "vae"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_component_loads_from_its_converted_file_bit_for_bit(
    tiny_checkpoint: Path, tmp_path: Path, component: str, setting: str
) -> None:
    settings = SETTINGS[setting]
    if component == "vae" and settings.get("precision"):
        fp8 = {"layers": ["conv"]} | settings.get("fp8", {})
        settings = {"precision": "fp8", "fp8": fp8}
    part = plan_of(tiny_checkpoint, component, **settings)
    converted = use_converted(part, tmp_path, device=CPU)
    assert rests_as_published(converted)
    files = {tensor.file for group in converted.groups for tensor in group.tensors}
    assert [Path(file) for file in files] == list(tmp_path.glob("*.safetensors"))
    assert converted.resting_bytes == part.resting_bytes
    module = load(converted)
    assert resting_bytes(module) == part.resting_bytes
    assert_same(module, load(part))
    (file,) = tmp_path.glob("*.safetensors")
    held = sum(tensor.num_bytes for tensor in read_file_header(file).values())
    assert held == part.resting_bytes


def test_the_file_is_one_that_other_programs_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """By the safetensors library, and by this reader as a published checkpoint."""
    part = plan_of(tiny_checkpoint, precision="fp8")
    use_converted(part, tmp_path / "converted", device=CPU)
    (file,) = (tmp_path / "converted").glob("*.safetensors")
    tensors = load_file(file)
    layer = "transformer_blocks.0.attn.to_q"
    codes, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.scale_weight"]
    assert codes.dtype == torch.float8_e4m3fn
    assert scale.shape == (codes.shape[0], 1)
    original: dict[str, torch.Tensor] = {}
    for path in (tiny_checkpoint / "transformer").glob("*.safetensors"):
        original |= load_file(path)
    expected = original[f"{layer}.weight"].float()
    off = (codes.float() * scale - expected).norm() / expected.norm()
    assert float(off) < 0.03
    folder = tmp_path / "published"
    folder.mkdir()
    shutil.copy(tiny_checkpoint / "transformer" / "config.json", folder)
    shutil.copy(file, folder / "model.safetensors")
    again = plan_of(tiny_checkpoint, precision="fp8", source=str(folder))
    assert {g.name for g in again.groups} == {"fp8_as_published_row", "high_precision"}
    assert_same(load(again), load(part))


@pytest.mark.parametrize("layout", ["mixed", "plain"])
def test_published_weights_are_converted_too(
    tiny_checkpoint: Path, tmp_path: Path, layout: str
) -> None:
    published = publish_fp8(tiny_checkpoint / "transformer", tmp_path / "fp8", layout)
    for precision in ("fp8", "bf16"):
        part = plan_of(tiny_checkpoint, precision=precision, source=str(published))
        converted = use_converted(part, tmp_path / "converted", device=CPU)
        assert rests_as_published(converted)
        assert_same(load(converted), load(part))


def test_it_is_written_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    part = plan_of(tiny_checkpoint, precision="fp8")
    counted: list[int] = []
    first = use_converted(part, tmp_path, device=CPU, on_progress=counted.append)
    source_bytes = sum(
        tensor.num_bytes for tensor in read_inventory(tiny_checkpoint / "transformer").values()
    )
    assert sum(counted) == source_bytes
    (file,) = tmp_path.glob("*.safetensors")
    written = file.stat().st_mtime_ns
    assert use_converted(part, tmp_path, device=CPU, on_progress=counted.append) == first
    assert sum(counted) == source_bytes
    assert file.stat().st_mtime_ns == written
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("granularity", ["layer", "block", "model"])
def test_what_is_fetched_together_lies_together(
    tiny_checkpoint: Path, tmp_path: Path, granularity: str
) -> None:
    part = plan_of(tiny_checkpoint, precision="fp8", offload="disk", granularity=granularity)
    converted = use_converted(part, tmp_path, device=CPU)
    (file,) = tmp_path.glob("*.safetensors")
    header = read_file_header(file)
    begins = min(tensor.start for tensor in header.values())
    for unit in component_units(converted):
        keys = [
            key
            for parcel in unit.parcels
            for slot in parcel.slots
            for key in (
                slot.tensor.source_key,
                *([slot.tensor.published_scale.key] if slot.tensor.published_scale else []),
            )
        ]
        assert header[keys[0]].start == begins
        for one, next_one in pairwise(keys):
            assert header[one].end == header[next_one].start
        begins = header[keys[-1]].end


@pytest.mark.parametrize("change", ["source", "scaling", "layers", "precision", "compute_dtype"])
def test_a_file_of_other_sources_or_settings_is_not_used(
    tiny_checkpoint: Path, tmp_path: Path, change: str
) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, source)
    part = plan_of(source, precision="fp8")
    use_converted(part, tmp_path / "converted", device=CPU)
    settings: dict[str, Any] = {"precision": "fp8"}
    if change == "source":
        path = next((source / "transformer").glob("*.safetensors"))
        tensors = load_file(path)
        save_file({key: value + 1 for key, value in tensors.items()}, path, {"format": "pt"})
        os.utime(path, ns=(1, 2))
    elif change == "scaling":
        settings["fp8"] = {"scaling": "none"}
    elif change == "layers":
        settings["fp8"] = {"keep_high_precision": ["attn.to_q"]}
    elif change == "precision":
        settings = {}
    if change == "compute_dtype":
        model = ModelConfig.model_validate(
            {
                "family": "qwen_image",
                "source": str(source),
                "compute_dtype": "fp16",
                "dit": settings,
            }
        )
        other = build_inference_plan(model, device="cpu").component("dit")
    else:
        other = plan_of(source, **settings)
    converted = use_converted(other, tmp_path / "converted", device=CPU)
    assert len(list((tmp_path / "converted").glob("*.safetensors"))) == 2
    assert_same(load(converted), load(other))


@pytest.mark.parametrize("damage", ["cut", "header", "other"])
def test_a_damaged_file_is_written_anew(tiny_checkpoint: Path, tmp_path: Path, damage: str) -> None:
    part = plan_of(tiny_checkpoint, precision="fp8")
    use_converted(part, tmp_path, device=CPU)
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    if damage == "other":
        save_file({"weight": torch.ones(3)}, file)
    else:
        file.write_bytes(whole[:-100] if damage == "cut" else b"\xff" * 64 + whole[64:])
    use_converted(part, tmp_path, device=CPU)
    assert file.read_bytes() == whole


def test_a_source_that_fails_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, source)
    part = plan_of(source, precision="fp8")
    path = next((source / "transformer").glob("*.safetensors"))
    tensors = load_file(path)
    key = next(k for k, v in tensors.items() if v.ndim == 2 and "transformer_blocks" in k)
    save_file(tensors | {key: torch.full_like(tensors[key], float("nan"))}, path, {"format": "pt"})
    with pytest.raises(Exception, match="finite"):
        use_converted(part, tmp_path / "converted", device=CPU)
    assert not list((tmp_path / "converted").glob("*.safetensors"))
    assert not list((tmp_path / "converted").glob("*.partial"))


def test_a_folder_that_can_not_be_written_is_said(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    part = plan_of(tiny_checkpoint, precision="fp8")
    with pytest.raises(SourceError, match="can't be written") as error:
        use_converted(part, tmp_path / "file" / "inside", device=CPU)
    assert "converted_dir" in error.value.hint


def test_two_processes_at_once_get_the_same_whole_file(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    part = plan_of(tiny_checkpoint, precision="fp8")
    plan = tmp_path / "plan.json"
    plan.write_text(part.model_dump_json(exclude_computed_fields=True))
    code = (
        "import sys, torch; from pathlib import Path;"
        "from framework.plan.types import ComponentPlan; from framework.runtime.converted import use_converted;"
        "part = ComponentPlan.model_validate_json(Path(sys.argv[1]).read_text());"
        "print(use_converted(part, Path(sys.argv[2]), device=torch.device('cpu')).groups[0].tensors[0].file)"
    )
    command = [sys.executable, "-c", code, str(plan), str(tmp_path / "converted")]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
        for _ in range(2)
    ]
    files = {process.communicate(timeout=120)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    (file,) = (tmp_path / "converted").glob("*.safetensors")
    assert files == {str(file)}
    assert not list((tmp_path / "converted").glob("*.partial"))
    assert_same(load(use_converted(part, tmp_path / "converted", device=CPU)), load(part))

"""Fully trained components are written so that diffusers and transformers load them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from framework.errors import PlanError
from framework.inventory import read_inventory
from framework.models import Family
from framework.models import published_layout as layout
from framework.models.published_layout import save_component
from tests.checkpoints import rename_keys
from tests.published import publish_fp8
from tests.unit.models.conftest import load


def change_(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


def test_a_dit_loads_in_diffusers(family: Family, tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = tiny_checkpoint / "transformer"
    dit = change_(load(family, "dit", source))
    save_component(
        family.spec.components["dit"],
        dit,
        tmp_path / "transformer",
        source_folder=source,
        storage_dtype=torch.float32,
    )
    loaded = QwenImageTransformer2DModel.from_pretrained(tmp_path / "transformer")
    for name, values in dit.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], values), name
    index = json.loads(
        (tmp_path / "transformer/diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in dit.parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["transformer"]


def test_the_published_dtype_is_kept_unless_told_otherwise(
    family: Family, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    vae = change_(load(family, "vae", tiny_checkpoint / "vae"))
    save_component(
        family.spec.components["vae"], vae, tmp_path / "vae", source_folder=tiny_checkpoint / "vae"
    )
    saved = load_file(tmp_path / "vae/diffusion_pytorch_model.safetensors")
    for name, values in vae.state_dict().items():
        assert torch.equal(saved[name], values.bfloat16()), name


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"^$", ""),
        # How transformers before 4.52 named the same tensors.
        (r"^model\.(language_model\.)?(?!visual)|^model\.(?=visual)", None),
    ],
)
def test_a_text_encoder_loads_in_transformers(
    pattern: str, replacement: str | None, family: Family, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint / "text_encoder", source)
    if replacement is None:
        rename_keys(source, r"^model\.visual\.", "visual.")
        rename_keys(source, r"^model\.language_model\.", "model.")
    encoder = change_(load(family, "text_encoder", source))
    target = tmp_path / "text_encoder"
    save_component(
        family.spec.components["text_encoder"],
        encoder,
        target,
        source_folder=source,
        storage_dtype=torch.float32,
    )
    assert set(read_inventory(target)) == set(read_inventory(source))
    original = Qwen2_5_VLForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    loaded, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        target, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, values in encoder.state_dict().items():
        assert torch.equal(loaded.model.language_model.state_dict()[name], values), name
    for name, values in original.model.visual.state_dict().items():
        assert torch.equal(loaded.model.visual.state_dict()[name], values), name
    assert torch.equal(loaded.lm_head.weight, original.lm_head.weight)


def test_weights_trained_from_scaled_fp8_are_saved_without_scales(
    family: Family, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = publish_fp8(tiny_checkpoint / "transformer", tmp_path / "fp8", "mixed")
    dit = change_(load(family, "dit", tiny_checkpoint / "transformer"))
    target = tmp_path / "transformer"
    save_component(family.spec.components["dit"], dit, target, source_folder=source)
    saved = load_file(target / "fp8.safetensors")
    assert saved.keys() == dit.state_dict().keys()
    for name, values in dit.state_dict().items():
        assert torch.equal(saved[name], values.bfloat16()), name


def test_a_whole_checkpoint_with_a_saved_part_loads(
    family: Family, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    dit = change_(load(family, "dit", checkpoint / "transformer"))
    # In place: the folder that is read is also the one that is replaced.
    save_component(
        family.spec.components["dit"],
        dit,
        checkpoint / "transformer",
        source_folder=checkpoint / "transformer",
    )
    pipeline = QwenImagePipeline.from_pretrained(checkpoint, dtype=torch.float32)
    assert torch.equal(pipeline.transformer.img_in.weight, dit.img_in.weight.bfloat16().float())


def test_a_failed_save_leaves_the_old_folder(
    family: Family, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = load(family, "vae", tiny_checkpoint / "vae")
    save_component(
        family.spec.components["vae"], vae, tmp_path / "vae", source_folder=tiny_checkpoint / "vae"
    )
    before = {p.name: p.read_bytes() for p in (tmp_path / "vae").iterdir()}

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(layout, "_write_configs", fail)
    with pytest.raises(OSError, match="no space left"):
        save_component(
            family.spec.components["vae"],
            change_(vae),
            tmp_path / "vae",
            source_folder=tiny_checkpoint / "vae",
        )
    assert {p.name: p.read_bytes() for p in (tmp_path / "vae").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["vae"]


def test_other_tensors_than_published_are_refused(
    family: Family, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    vae = load(family, "vae", tiny_checkpoint / "vae")
    vae.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    with pytest.raises(PlanError, match="no place for extra"):
        save_component(
            family.spec.components["vae"],
            vae,
            tmp_path / "vae",
            source_folder=tiny_checkpoint / "vae",
        )
    del vae.extra, vae.quant_conv
    with pytest.raises(PlanError, match="has no quant_conv"):
        save_component(
            family.spec.components["vae"],
            vae,
            tmp_path / "vae",
            source_folder=tiny_checkpoint / "vae",
        )
    assert not list(tmp_path.iterdir())

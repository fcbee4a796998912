"""Wan 2.2 A14B against diffusers' own pipeline: what differs from Wan 2.1, which is the two experts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import nn

from framework.errors import SourceError
from framework.models import Clip, Family, SampleSettings, get_family
from framework.models.published_layout import save_component
from framework.models.wan2_2 import Wan22Family
from tests.families.parts import psnr
from tests.families.wan2_1 import build_checkpoint as build_one_expert
from tests.families.wan2_2 import build_checkpoint
from tests.unit.models.conftest import load

PROMPTS = ["a red apple", "a house with a garden"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("wan2_2") / "tiny-wan2-2")


def load_extras(family: Family, checkpoint: Path) -> None:
    family.load_extras({name: checkpoint / f for name, f in family.spec.extras.items()})


@pytest.fixture(scope="module")
def family(checkpoint: Path) -> Family:
    family = get_family("wan2_2")
    load_extras(family, checkpoint)
    return family


@pytest.fixture(scope="module")
def modules(family: Family, checkpoint: Path) -> dict[str, nn.Module]:
    return {
        name: load(family, name, checkpoint / spec.subfolder)
        for name, spec in family.spec.components.items()
    }


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(str(checkpoint), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Counted(nn.Module):
    """A denoiser that notes the times at which it is asked."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.config, self.cache_context = inner.config, inner.cache_context
        self.times: list[float] = []

    def forward(self, timestep: torch.Tensor, **others: torch.Tensor) -> tuple[torch.Tensor]:
        self.times += timestep.tolist()
        return self.inner(timestep=timestep, **others)


@pytest.mark.cell("wan2_2", "diffusers")
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_same_clips_as_the_pipeline_by_both_experts(
    guidance: float, family: Family, modules: dict[str, nn.Module], pipeline: WanPipeline
) -> None:
    settings = SampleSettings((64, 32), 4, guidance, seed=7, num_frames=5)
    with torch.no_grad():
        positive = family.encode_text(PROMPTS, modules)
        negative = family.encode_text([""], modules)
    counted = {name: Counted(modules[name]) for name in ("dit", "dit_2")}
    made = family.sample(positive, negative, {**modules, **counted}, settings)
    assert min(counted["dit"].times) >= 875 > max(counted["dit_2"].times)
    for index, prompt in enumerate(PROMPTS):
        expected = pipeline(
            prompt,
            negative_prompt="",
            guidance_scale=guidance,
            width=64,
            height=32,
            num_frames=5,
            num_inference_steps=4,
            output_type="pil",
            generator=torch.Generator("cpu").manual_seed(7 + index),
        ).frames[0]
        clip = made[index]
        assert isinstance(clip, Clip)
        for frame, other in zip(clip.frames, expected, strict=True):
            assert psnr(frame, other) >= 40
        assert np.asarray(expected[0]).std() > 1  # a flat picture would prove nothing


def test_both_experts_matter(family: Family, modules: dict[str, nn.Module]) -> None:
    settings = SampleSettings((32, 32), 4, 1.0, num_frames=1)
    with torch.no_grad():
        text = family.encode_text(["a cat"], modules)

    def frame(**changed: nn.Module) -> np.ndarray:
        clip = family.sample(text, None, {**modules, **changed}, settings)[0]
        assert isinstance(clip, Clip)
        return np.asarray(clip.frames[0])

    both = frame()
    assert not np.array_equal(both, frame(dit=modules["dit_2"]))
    assert not np.array_equal(both, frame(dit_2=modules["dit"]))


def test_each_expert_predicts_as_its_transformer(
    family: Family, modules: dict[str, nn.Module], pipeline: WanPipeline
) -> None:
    noisy = torch.randn(2, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.9, 0.2])
    with torch.no_grad():
        text = family.encode_text(["a cat", ""], modules)
        embeds, _ = pipeline.encode_prompt(
            ["a cat", ""], do_classifier_free_guidance=False, max_sequence_length=512
        )
        for name, transformer in (("dit", pipeline.transformer), ("dit_2", pipeline.transformer_2)):
            found = family.predict(noisy, sigma, text, modules[name])
            expected = transformer(noisy, 1000 * sigma, embeds, return_dict=False)[0]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_noise_levels_are_split_at_the_checkpoints_boundary(
    family: Family, checkpoint: Path, tmp_path: Path
) -> None:
    assert family.sigma_range("dit") == (0.875, 1.0)
    assert family.sigma_range("dit_2") == (0.0, 0.875)
    (tmp_path / "scheduler").mkdir()
    for name in ("scheduler/scheduler_config.json", "model_index.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    folders = {"tokenizer": checkpoint / "tokenizer", "scheduler": tmp_path / "scheduler"}
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 0.5}))
    other = Wan22Family()
    other.load_extras(folders)
    assert other.sigma_range("dit_2") == (0.0, 0.5)
    (tmp_path / "model_index.json").unlink()  # as where it was fetched from the hub
    published = Wan22Family()
    published.load_extras(folders)
    assert published.boundary == 0.875


def test_a_checkpoint_with_one_denoiser_is_sent_to_its_own_family(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="needs a boundary_ratio") as caught:
        load_extras(get_family("wan2_2"), build_one_expert(tmp_path / "tiny-wan2-1"))
    assert "wan2_1" in str(caught.value)


def test_a_saved_expert_loads_in_diffusers(
    family: Family, checkpoint: Path, modules: dict[str, nn.Module], tmp_path: Path
) -> None:
    source = checkpoint / "transformer_2"
    save_component(
        family.spec.components["dit_2"], modules["dit_2"], tmp_path / "out", source_folder=source
    )
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "out")
    for key, values in loaded.named_parameters():
        assert torch.equal(values.float(), modules["dit_2"].get_parameter(key)), key


def test_other_models_are_refused_for_both_experts(
    family: Family, checkpoint: Path, tmp_path: Path
) -> None:
    values = json.loads((checkpoint / "transformer_2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "in_channels": 48}))
    for component in ("dit", "dit_2"):
        with pytest.raises(SourceError, match="in_channels 48"):
            family.build_module(component, tmp_path)
    with pytest.raises(ValueError, match="wan2_2 has no component 'dit_3'"):
        family.build_module("dit_3", tmp_path)

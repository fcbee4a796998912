"""Qwen-Image-Edit against diffusers' own edit pipelines, in float32 on tiny checkpoints."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image
from torch import nn
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

from framework.errors import DataError, SourceError
from framework.models import Family, SampleSettings, TextConditioning, get_family, qwen_image_edit
from framework.models.published_layout import save_component
from framework.models.qwen_image_edit import QwenImageEditFamily, fitted_size
from tests.checkpoints import rename_keys
from tests.families.qwen_image_edit import build_checkpoint
from tests.unit.models.conftest import load

EDITIONS = {"edit": QwenImageEditPipeline, "plus": QwenImageEditPlusPipeline}
# Instead of 1024 x 1024 and 384 x 384, which take seconds on a CPU.
CONTROL_PX, SMALL_PX = 64 * 64, 56 * 56


class PilProcessor(Qwen2VLProcessor):
    """The published processor where torchvision isn't installed: it would look for a class of video processors."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)


class WithPictureTokens(nn.Module):
    """The published text encoder, told which tokens are pictures, which the pipelines leave out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner: Any = inner
        self.dtype = torch.float32
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
        others["mm_token_type_ids"] = (input_ids == self.inner.config.image_token_id).int()
        return self.inner(input_ids=input_ids, **others)


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen_image_edit, "CONTROL_PX", CONTROL_PX)
    monkeypatch.setattr(qwen_image_edit, "SMALL_PX", SMALL_PX)
    for pipeline in EDITIONS.values():
        module = sys.modules[pipeline.__module__]
        original = module.calculate_dimensions

        def small(area: int, ratio: float, original: Any = original) -> Any:
            return original(CONTROL_PX if area > 384 * 384 else SMALL_PX, ratio)

        monkeypatch.setattr(module, "calculate_dimensions", small)


def read_family(folder: Path) -> Family:
    family = get_family("qwen_image_edit")
    family.load_extras({name: folder / sub for name, sub in family.spec.extras.items()})
    return family


def read_modules(family: Family, folder: Path) -> dict[str, nn.Module]:
    parts = family.spec.components.items()
    return {name: load(family, name, folder / spec.subfolder) for name, spec in parts}


def read_pipeline(edition: str, folder: Path) -> Any:
    """Diffusers' pipeline, put together by hand because the published processor needs torchvision."""
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder / "text_encoder", dtype=torch.float32
    )
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    pipeline = EDITIONS[edition](
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        text_encoder=WithPictureTokens(whole.eval()),
        tokenizer=tokenizer,
        processor=PilProcessor(
            image_processor=Qwen2VLImageProcessorPil.from_pretrained(folder / "processor"),
            tokenizer=tokenizer,
            video_processor=None,
        ),
        transformer=QwenImageTransformer2DModel.from_pretrained(
            folder / "transformer", torch_dtype=torch.float32
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("edit")
    return {
        "edit": build_checkpoint(root / "edit", edition="edit"),
        "plus": build_checkpoint(root / "plus", zero_cond_t=True),
    }


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, tuple[Family, dict[str, nn.Module], Any]]:
    found = {}
    for edition, folder in folders.items():
        family = read_family(folder)
        found[edition] = (family, read_modules(family, folder), read_pipeline(edition, folder))
    return found


def picture(seed: int, size_px: tuple[int, int] = (90, 60)) -> Image.Image:
    """Smooth colours, so that scaling it twice differs little from once."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size_px, Image.Resampling.BICUBIC)


def psnr(first: Image.Image, second: Image.Image) -> float:
    error = np.mean((np.asarray(first, np.float64) - np.asarray(second, np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(float(error), 1e-12)))


def encoded(
    family: Family, modules: dict[str, nn.Module], prompt: str, controls: list[Image.Image]
) -> TextConditioning:
    """What a sample is told: caption and pictures by the encoder, and the pictures' latents."""
    with torch.no_grad():
        text = family.encode_text([prompt], modules, controls=[controls])
        latents = tuple(family.encode_control(control, modules["vae"]) for control in controls)
    return replace(text, controls=latents)


CONTROLS = {"edit": [picture(0)], "plus": [picture(0), picture(1, (50, 80))]}


@pytest.mark.cell("qwen_image_edit", "diffusers")
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("edition", EDITIONS)
def test_same_pictures_as_the_pipelines(edition: str, guidance: float, loaded: Any) -> None:
    family, modules, pipeline = loaded[edition]
    controls = CONTROLS[edition]
    positive = encoded(family, modules, "make it {red}", controls)
    negative = encoded(family, modules, " ", controls)
    steps: list[tuple[int, int]] = []
    found = family.sample(
        positive,
        negative,
        modules,
        SampleSettings((48, 32), num_inference_steps=2, guidance_scale=guidance, seed=3),
        on_step=lambda done, in_all: steps.append((done, in_all)),
    )
    expected = pipeline(
        image=controls if edition == "plus" else controls[0],
        prompt="make it {red}",
        negative_prompt=" " if guidance > 1 else None,
        true_cfg_scale=guidance,
        width=48,
        height=32,
        num_inference_steps=2,
        generator=torch.Generator("cpu").manual_seed(3),
    ).images[0]
    assert found[0].size == expected.size == (48, 32)
    assert psnr(found[0], expected) >= 40
    assert np.asarray(expected).std() > 1
    assert steps == [(1, 2), (2, 2)]


def test_captions_and_both_ways_of_the_controls_change_the_velocity(loaded: Any) -> None:
    family, modules, _ = loaded["plus"]
    one = encoded(family, modules, "make it red", [picture(0)])
    other = encoded(family, modules, "make it red", [picture(2)])
    noisy = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocity, *others = (
            family.predict(noisy, torch.tensor([0.5]), text, modules["dit"])
            for text in (
                one,
                encoded(family, modules, "make it a blue house", [picture(0)]),
                replace(one, controls=other.controls),
                replace(one, embeds=other.embeds),
            )
        )
    assert all(float((velocity - changed).abs().max()) > 1e-4 for changed in others)


@pytest.mark.parametrize("edition", EDITIONS)
def test_text_is_encoded_as_by_the_pipelines(edition: str, loaded: Any) -> None:
    family, modules, pipeline = loaded[edition]
    size = pipeline.image_processor
    area = SMALL_PX if edition == "plus" else CONTROL_PX
    shown = []
    for control in CONTROLS[edition]:
        width, height = fitted_size(control.size, area)
        shown.append(size.resize(control, height, width))
    for prompt in ("a red apple", "", "a {curly} house with a garden"):
        with torch.no_grad():
            found = family.encode_text([prompt], modules, controls=[CONTROLS[edition]])
            embeds, mask = pipeline.encode_prompt(
                prompt, image=shown if edition == "plus" else shown[0]
            )
        assert mask is None
        assert not found.is_padded
        torch.testing.assert_close(found.embeds, embeds, rtol=0, atol=1e-5)


def test_a_batch_of_captions_with_different_pictures_is_the_captions_alone(loaded: Any) -> None:
    family, modules, _ = loaded["plus"]
    prompts = ["a red apple", "", "a house with a garden, a cat and a dog"]
    controls = [[picture(0)], [picture(1), picture(2, (40, 90))], [picture(3, (64, 64))]]
    with torch.no_grad():
        together = family.encode_text(prompts, modules, controls=controls)
        for index, prompt in enumerate(prompts):
            alone = family.encode_text([prompt], modules, controls=[controls[index]])
            torch.testing.assert_close(together.row(index).embeds, alone.embeds, rtol=0, atol=1e-5)
    assert together.is_padded
    assert (
        family.count_text_tokens(prompts[:1])
        == (
            family.encode_text(prompts[:1], modules, controls=[[picture(3, (64, 64))]]).mask.shape[
                1
            ]
        )
    )


def test_picture_tokens_have_their_places_in_two_dimensions(loaded: Any) -> None:
    """The pipelines' own call numbers all tokens in one line, which gives other states."""
    family, modules, pipeline = loaded["plus"]
    width, height = fitted_size(picture(0).size, SMALL_PX)
    shown = [pipeline.image_processor.resize(picture(0), height, width)]
    whole = pipeline.text_encoder.inner
    with torch.no_grad():
        pipeline.text_encoder, told = whole, pipeline.text_encoder
        try:
            in_line, _ = pipeline.encode_prompt("red", image=shown)
        finally:
            pipeline.text_encoder = told
        found = family.encode_text(["red"], modules, controls=[[picture(0)]])
    assert found.embeds.shape == in_line.shape
    assert float((found.embeds - in_line).abs().max()) > 1e-3


@pytest.mark.cell("qwen_image_edit", "diffusers")
@pytest.mark.parametrize("edition", EDITIONS)
def test_velocity_is_the_transformers_for_the_noisy_tokens(edition: str, loaded: Any) -> None:
    family, modules, pipeline = loaded[edition]
    generator = torch.Generator().manual_seed(0)
    text = encoded(family, modules, "a cat", CONTROLS[edition])
    both = TextConditioning.collate([text, encoded(family, modules, "", CONTROLS[edition])])
    noisy = torch.randn(2, 16, 4, 6, generator=generator)
    sigma = torch.tensor([0.3, 0.9])
    with torch.no_grad():
        found = family.predict(noisy, sigma, both, modules["dit"])
        packed = [pipeline._pack_latents(x, 2, 16, *x.shape[-2:]) for x in (noisy, *both.controls)]
        shapes = [(1, x.shape[-2] // 2, x.shape[-1] // 2) for x in (noisy, *both.controls)]
        expected = pipeline.transformer(
            hidden_states=torch.cat(packed, dim=1),
            timestep=sigma,
            encoder_hidden_states=both.embeds,
            encoder_hidden_states_mask=both.mask,
            img_shapes=[shapes] * 2,
            return_dict=False,
        )[0][:, : packed[0].shape[1]]
    assert found.shape == noisy.shape
    unpacked = pipeline._unpack_latents(expected, 32, 48, 8)[:, :, 0]
    torch.testing.assert_close(found, unpacked, rtol=0, atol=1e-5)


def test_control_latents_are_the_pipelines(loaded: Any) -> None:
    family, modules, pipeline = loaded["plus"]
    control = picture(0)
    width, height = fitted_size(control.size, CONTROL_PX)
    pixels = pipeline.image_processor.preprocess(control, height, width).unsqueeze(2)
    with torch.no_grad():
        expected = pipeline._encode_vae_image(pixels, torch.Generator())[:, :, 0]
        found = family.encode_control(control, modules["vae"])
    assert found.shape == (1, 16, height // 8, width // 8)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("size_px", "expected"),
    [((1000, 1000), (1024, 1024)), ((1920, 1080), (1376, 768)), ((1, 5000), (32, 72416))],
)
def test_control_sizes(size_px: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fitted_size(size_px, 1024 * 1024) == expected


def test_gradients_reach_both_halves_of_the_text_encoder(folders: dict[str, Path]) -> None:
    family = read_family(folders["plus"])
    encoder = load(family, "text_encoder", folders["plus"] / "text_encoder").requires_grad_(True)
    text = family.encode_text(["a cat"], {"text_encoder": encoder}, controls=[[picture(0)]])
    text.embeds.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


def test_both_generations_of_key_names_are_read_and_saved(
    folders: dict[str, Path], tmp_path: Path, loaded: Any
) -> None:
    family, modules, _ = loaded["plus"]
    source = tmp_path / "source"
    shutil.copytree(folders["plus"] / "text_encoder", source)
    rename_keys(source, r"^model\.visual\.", "visual.")
    rename_keys(source, r"^model\.language_model\.", "model.")
    encoder = load(family, "text_encoder", source)
    expected = modules["text_encoder"].state_dict()
    assert all(torch.equal(encoder.state_dict()[name], value) for name, value in expected.items())
    save_component(
        family.spec.components["text_encoder"],
        encoder,
        tmp_path / "saved",
        source_folder=source,
        storage_dtype=torch.float32,
    )
    whole, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, value in whole.model.visual.state_dict().items():
        assert torch.equal(value, expected[f"visual.{name}"]), name


def test_blank_and_rehearsed_captions_have_the_lengths_asked_for(loaded: Any) -> None:
    family, modules, _ = loaded["plus"]
    blank = family.blank_text(5, modules["dit"], batch_size=2, device=torch.device("cpu"))
    assert blank.embeds.shape == (2, 5, 16)
    assert [tuple(control.shape) for control in blank.controls] == [(2, 16, 8, 8)]
    assert family.rehearse_text(5, modules, batch_size=2).embeds.shape == (2, 5, 16)


def test_wrong_requests_are_refused(loaded: Any) -> None:
    family, modules, _ = loaded["edit"]
    two = [[picture(0), picture(1)]]
    with pytest.raises(DataError, match="one control picture, not 2"):
        family.encode_text(["red"], modules, controls=two)
    with pytest.raises(DataError, match="stands for a control picture"):
        family.encode_text(["a <|image_pad|>"], modules, controls=[two[0][:1]])
    for controls in ([], [[]]):
        with pytest.raises(ValueError, match="needs control pictures"):
            family.encode_text(["red"], modules, controls=controls)
    with pytest.raises(ValueError, match="latents of control pictures"):
        family.predict(
            torch.zeros(1, 16, 4, 4),
            torch.ones(1),
            TextConditioning(torch.zeros(1, 3, 16), torch.ones(1, 3, dtype=torch.bool)),
            modules["dit"],
        )
    with pytest.raises(RuntimeError, match="before pictures"):
        _ = QwenImageEditFamily().image_processor


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"_class_name": "QwenImagePipeline"}, "no QwenImageEditPipeline or"),
        ("processor/preprocessor_config.json", None, "picture processor can't be read"),
        ("text_encoder/config.json", {"model_type": "t5"}, "no qwen2_5_vl"),
    ],
)
def test_other_checkpoints_are_refused(
    file: str, values: dict[str, Any] | None, message: str, folders: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["plus"], tmp_path / "checkpoint")
    if values is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(
            json.dumps({**json.loads((folder / file).read_text()), **values})
        )
    with pytest.raises(SourceError, match=message):
        read_family(folder).build_module("text_encoder", folder / "text_encoder")

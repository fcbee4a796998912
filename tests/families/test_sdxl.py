"""SDXL against diffusers' own pipeline, in float32 on tiny checkpoints."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from framework.diffusion.ddpm import DdpmSchedule
from framework.errors import SourceError
from framework.models import Family, SampleSettings, TextConditioning, get_family
from framework.models.published_layout import save_component
from framework.plan.match import module_name
from tests.families.sdxl import FIRST_WIDTH, SECOND_WIDTH, build_checkpoint
from tests.unit.models.conftest import load

# diffusers' schedulers hand torch's tensors to numpy.array in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy")

PROMPTS = [
    "a red apple",
    "a cat and a dog",
    "a house with a garden and two blue cars beside it all",
]
WIDTH = FIRST_WIDTH + SECOND_WIDTH


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("sdxl") / "tiny-sdxl")


@pytest.fixture(scope="module")
def family(checkpoint: Path) -> Family:
    return loaded_family(checkpoint)


@pytest.fixture(scope="module")
def modules(family: Family, checkpoint: Path) -> dict[str, nn.Module]:
    return load_all(family, checkpoint)


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> StableDiffusionXLPipeline:
    return load_pipeline(checkpoint)


@pytest.fixture(scope="module")
def text(family: Family, modules: dict[str, nn.Module]) -> TextConditioning:
    with torch.no_grad():
        return family.encode_text(PROMPTS, modules)


def loaded_family(checkpoint: Path) -> Family:
    family = get_family("sdxl")
    family.load_extras({name: checkpoint / f for name, f in family.spec.extras.items()})
    return family


def load_all(family: Family, checkpoint: Path) -> dict[str, nn.Module]:
    return {
        name: load(family, name, checkpoint / spec.subfolder)
        for name, spec in family.spec.components.items()
    }


def load_pipeline(checkpoint: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        str(checkpoint), dtype=torch.float32, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def psnr(first: Image.Image, second: Image.Image) -> float:
    error = np.mean((np.asarray(first, np.float64) - np.asarray(second, np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def test_text_is_encoded_as_by_the_pipeline(
    text: TextConditioning, pipeline: StableDiffusionXLPipeline
) -> None:
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert text.embeds.shape == (3, 77, WIDTH)
    assert text.pooled is not None
    assert bool(text.mask.all())
    torch.testing.assert_close(text.embeds, embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(text.pooled, pooled, rtol=0, atol=1e-5)


def test_long_captions_are_cut_as_by_the_pipeline(
    family: Family, modules: dict[str, nn.Module], pipeline: StableDiffusionXLPipeline
) -> None:
    prompt = "a cat and a dog " * 30
    with torch.no_grad():
        text = family.encode_text([prompt], modules)
        embeds, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    torch.testing.assert_close(text.embeds, embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(text.pooled, pooled, rtol=0, atol=1e-5)
    assert family.count_text_tokens([prompt, ""]) == 77


@pytest.mark.parametrize("zeros", [True, False])
def test_blank_captions_are_what_the_pipeline_takes_for_no_negative_prompt(
    zeros: bool, tmp_path: Path
) -> None:
    folder = build_checkpoint(tmp_path / "checkpoint", zeros_for_empty=zeros)
    family, pipeline = loaded_family(folder), load_pipeline(folder)
    modules = load_all(family, folder)
    with torch.no_grad():
        text = family.encode_text(["", PROMPTS[0], " "], modules)
        embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(PROMPTS[0])
    assert text.pooled is not None
    for index, (states, vector) in enumerate(
        [(negative, negative_pooled), (embeds, pooled), (negative, negative_pooled)]
    ):
        torch.testing.assert_close(text.embeds[index : index + 1], states, rtol=0, atol=1e-5)
        torch.testing.assert_close(text.pooled[index : index + 1], vector, rtol=0, atol=1e-5)
    assert bool(text.embeds[0].any()) is not zeros


def test_gradients_reach_both_text_encoders(family: Family, checkpoint: Path) -> None:
    encoders = {
        name: load(family, name, checkpoint / name).requires_grad_(True)
        for name in family.spec.text_encoders
    }
    text = family.encode_text(PROMPTS, encoders)
    (text.embeds.square().sum() + text.pooled.square().sum()).backward()
    without = [
        name
        for encoder in encoders.values()
        for name, p in encoder.named_parameters()
        if p.grad is None or not p.grad.any()
    ]
    # What comes after the states that are taken has a part in the pooled caption alone, which the first has none of.
    assert all(name.startswith(("encoder.layers.2.", "final_layer_norm.")) for name in without)


def test_made_up_captions_have_the_shapes_of_real_ones(
    family: Family, modules: dict[str, nn.Module]
) -> None:
    with torch.no_grad():
        rehearsed = family.rehearse_text(77, modules, batch_size=2)
    blank = family.blank_text(77, modules["dit"], batch_size=2, device=torch.device("cpu"))
    for made in (rehearsed, blank):
        assert made.embeds.shape == (2, 77, WIDTH)
        assert made.pooled is not None
        assert made.pooled.shape == (2, SECOND_WIDTH)
        assert not made.is_padded


def test_pictures_are_encoded_and_decoded_as_by_the_pipeline(
    family: Family, modules: dict[str, nn.Module], pipeline: StableDiffusionXLPipeline
) -> None:
    pixels = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae: Any = pipeline.vae
    factor = vae.config.scaling_factor
    with torch.no_grad():
        latents = family.encode_image(pixels, modules["vae"])
        decoded = family.decode_image(latents, modules["vae"])
        expected = vae.encode(pixels).latent_dist.mode() * factor
        expected_pixels = vae.decode(expected / factor, return_dict=False)[0].clamp(-1, 1)
    assert latents.shape == (2, 4, 4, 8)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded, expected_pixels, rtol=0, atol=1e-5)


def test_the_vae_never_computes_in_float16(
    family: Family, checkpoint: Path, modules: dict[str, nn.Module]
) -> None:
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = load(family, "vae", checkpoint / "vae", torch.float16)
    seen = []
    vae.get_submodule("decoder.conv_in").register_forward_hook(lambda *a: seen.append(a[2].dtype))
    with torch.no_grad():
        latents = family.encode_image(pixels, vae)
        expected = family.encode_image(pixels, modules["vae"])
        family.decode_image(latents, vae)
        with torch.autocast("cpu", torch.float16):
            family.decode_image(latents, vae)
    torch.testing.assert_close(latents, expected, rtol=0, atol=2e-3)
    assert seen == [torch.float32] * 2
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float16}


@pytest.mark.parametrize("sized", [False, True])
def test_predict_is_the_pipelines_call_of_the_unet(
    sized: bool,
    family: Family,
    modules: dict[str, nn.Module],
    pipeline: StableDiffusionXLPipeline,
    text: TextConditioning,
) -> None:
    noisy = torch.randn(3, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([0, 500, 999])
    sizes = [((64, 96), (0, 0), (64, 96))] * 3
    if sized:
        sizes = [
            ((200, 300), (1, 2), (64, 96)),
            ((64, 96), (0, 0), (64, 96)),
            ((9, 8), (7, 6), (5, 4)),
        ]
        geometry = torch.tensor([[*a, *b, *c] for a, b, c in sizes])
        text = TextConditioning(text.embeds, text.mask, text.padded, text.pooled, geometry=geometry)
    ids = [pipeline._get_add_time_ids(*size, torch.float32, SECOND_WIDTH) for size in sizes]
    with torch.no_grad():
        found = family.predict(noisy, steps, text, modules["dit"])
        expected = pipeline.unet(
            noisy,
            steps,
            encoder_hidden_states=text.embeds,
            added_cond_kwargs={"text_embeds": text.pooled, "time_ids": torch.cat(ids)},
            return_dict=False,
        )[0]
        alone = family.predict(noisy[1:2], steps[1:2], text.row(1), modules["dit"])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1:2], alone, rtol=0, atol=1e-5)


@pytest.mark.cell("sdxl", "diffusers")
@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (5.0, None), (5.0, "a blue car")])
def test_same_pictures_as_the_pipeline(
    guidance: float,
    negative: str | None,
    family: Family,
    modules: dict[str, nn.Module],
    pipeline: StableDiffusionXLPipeline,
    text: TextConditioning,
) -> None:
    seen: list[tuple[int, int]] = []
    settings = SampleSettings((64, 32), num_inference_steps=3, guidance_scale=guidance, seed=7)
    with torch.no_grad():
        away = family.encode_text([negative or ""], modules)
    pictures = family.sample(
        text, away, modules, settings, on_step=lambda done, in_all: seen.append((done, in_all))
    )
    assert seen == [(done, 9) for done in range(1, 10)]
    for index, prompt in enumerate(PROMPTS):
        expected = expected_picture(pipeline, prompt, settings, index, negative_prompt=negative)
        assert pictures[index].size == expected.size == (64, 32)
        assert psnr(pictures[index], expected) >= 40
        assert np.asarray(expected).std() > 1  # a flat picture would prove nothing


def expected_picture(
    pipeline: StableDiffusionXLPipeline,
    prompt: str,
    settings: SampleSettings,
    index: int,
    **others: Any,
) -> Image.Image:
    width, height = settings.size_px
    picture: Image.Image = pipeline(
        prompt,
        guidance_scale=settings.guidance_scale,
        width=width,
        height=height,
        num_inference_steps=settings.num_inference_steps,
        generator=torch.Generator("cpu").manual_seed(settings.seed + index),
        **others,
    ).images[0]
    return picture


def test_pictures_can_be_made_for_other_sizes(
    family: Family,
    modules: dict[str, nn.Module],
    pipeline: StableDiffusionXLPipeline,
    text: TextConditioning,
) -> None:
    geometry = torch.tensor([[20, 30, 3, 4, 500, 600]])
    row = text.row(0)
    sized = TextConditioning(row.embeds, row.mask, pooled=row.pooled, geometry=geometry)
    settings = SampleSettings((32, 32), num_inference_steps=2, guidance_scale=1.0)
    expected = expected_picture(
        pipeline,
        PROMPTS[0],
        settings,
        0,
        original_size=(20, 30),
        crops_coords_top_left=(3, 4),
        target_size=(500, 600),
    )
    found = family.sample(sized, None, modules, settings)[0]
    plain = family.sample(row, None, modules, settings)[0]
    assert psnr(found, expected) >= 40
    assert np.asarray(found).tobytes() != np.asarray(plain).tobytes()


def test_v_prediction_is_sampled_as_by_the_pipeline(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "v", prediction="v_prediction")
    family, pipeline = loaded_family(folder), load_pipeline(folder)
    modules = load_all(family, folder)
    with torch.no_grad():
        text = family.encode_text(PROMPTS[:1], modules)
        away = family.encode_text([""], modules)
    settings = SampleSettings((32, 32), num_inference_steps=2, guidance_scale=3.0)
    found = family.sample(text, away, modules, settings)[0]
    assert psnr(found, expected_picture(pipeline, PROMPTS[0], settings, 0)) >= 40


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_what_is_learned_leads_the_sampler_back_to_the_picture(
    prediction: str, tmp_path: Path
) -> None:
    """One step of the published sampler from a noisy picture, with the training target, removes just its noise."""
    from diffusers import EulerDiscreteScheduler

    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule = DdpmSchedule({**config, "prediction_type": prediction})
    x0, noise = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    scheduler = EulerDiscreteScheduler(**config, prediction_type=prediction)
    scheduler.set_timesteps(1)
    step = scheduler.timesteps[:1].long()
    noisy = schedule.add_noise(x0, noise, step)
    # The sampler counts in noise over signal.
    in_sigma = noisy * (scheduler.sigmas[0] ** 2 + 1).sqrt()
    scheduler.scale_model_input(in_sigma, scheduler.timesteps[0])
    target = schedule.target(x0, noise, step)
    found = scheduler.step(target, scheduler.timesteps[0], in_sigma).prev_sample
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-4)


def test_bf16_modules_take_and_give_float32(
    family: Family, checkpoint: Path, modules: dict[str, nn.Module], text: TextConditioning
) -> None:
    unet = load(family, "dit", checkpoint / "unet", torch.bfloat16)
    vae = load(family, "vae", checkpoint / "vae", torch.bfloat16)
    with torch.no_grad():
        latents = family.encode_image(torch.zeros(3, 3, 32, 32), vae)
        predicted = family.predict(latents, torch.full((3,), 500), text, unet)
    assert latents.dtype == predicted.dtype == torch.float32
    settings = SampleSettings((32, 32), 2, 3.0)
    row = text.row(0)
    found = family.sample(row, text.row(1), {"dit": unet, "vae": vae}, settings)[0]
    assert psnr(found, family.sample(row, text.row(1), modules, settings)[0]) > 25


def test_float32_weights_work_under_autocast(family: Family, checkpoint: Path) -> None:
    parts = {
        name: load(family, name, checkpoint / spec.subfolder).requires_grad_(True)
        for name, spec in family.spec.components.items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        text = family.encode_text(PROMPTS[:2], parts)
        noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        predicted = family.predict(noisy, torch.tensor([3, 900]), text, parts["dit"])
    assert predicted.dtype == torch.float32
    predicted.square().mean().backward()
    assert all(p.grad is not None for p in parts["dit"].parameters())
    assert parts["text_encoder_2"].get_submodule("text_projection").weight.grad is not None


def test_checkpointing_changes_no_gradient(
    family: Family, checkpoint: Path, text: TextConditioning
) -> None:
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointed in (False, True):
        unet: Any = load(family, "dit", checkpoint / "unet").requires_grad_(True).train()
        if checkpointed:
            unet.enable_gradient_checkpointing()
        family.predict(noisy, torch.tensor([500]), text.row(0), unet).square().sum().backward()
        gradients.append({name: p.grad for name, p in unet.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def changed(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    return module


@pytest.mark.parametrize(
    ("component", "published_class"),
    [("dit", UNet2DConditionModel), ("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)],
)  # fmt: skip
def test_saved_components_load_elsewhere(
    component: str, published_class: Any, family: Family, checkpoint: Path, tmp_path: Path
) -> None:
    source = checkpoint / family.spec.components[component].subfolder
    module = changed(load(family, component, source))
    target = tmp_path / component
    save_component(
        family.spec.components[component],
        module,
        target,
        source_folder=source,
        storage_dtype=torch.float32,
    )
    loaded = published_class.from_pretrained(target, dtype=torch.float32)
    for name, values in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], values), name


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_positions_that_older_files_store_are_left_out(component: str, family: Family) -> None:
    spec = family.spec.components[component]
    assert module_name("text_model.embeddings.position_ids", spec) is None


def test_schedulers_with_the_same_noise_schedule_are_taken(
    checkpoint: Path, tmp_path: Path
) -> None:
    family = get_family("sdxl")
    folders = {name: checkpoint / f for name, f in family.spec.extras.items()}
    EulerAncestralDiscreteScheduler.from_pretrained(checkpoint / "scheduler").save_pretrained(
        tmp_path / "scheduler"
    )
    family.load_extras({**folders, "scheduler": tmp_path / "scheduler"})
    modules = load_all(family, checkpoint)
    with torch.no_grad():
        text = family.encode_text(PROMPTS[:1], modules)
    picture = family.sample(text, None, modules, SampleSettings((32, 32), 1, 1.0))[0]
    assert np.asarray(picture).std() > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "no EulerDiscreteScheduler"),
        ({"prediction_type": "sample"}, "epsilon or v_prediction"),
    ],
)
def test_other_schedulers_are_refused(
    change: dict[str, str], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    family = get_family("sdxl")
    folders = {name: checkpoint / f for name, f in family.spec.extras.items()}
    shutil.copytree(checkpoint / "scheduler", tmp_path / "scheduler")
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(SourceError, match=message):
        family.load_extras({**folders, "scheduler": tmp_path / "scheduler"})


@pytest.mark.parametrize(
    ("component", "change", "message"),
    [
        ("dit", {"_class_name": "FluxTransformer2DModel"}, "no UNet2DConditionModel"),
        ("dit", {"in_channels": 9}, "in_channels 9"),
        ("dit", {"addition_embed_type": None}, "addition_embed_type None"),
        ("dit", {"time_cond_proj_dim": 256}, "time_cond_proj_dim 256"),
        ("vae", {"_class_name": "AutoencoderKLQwenImage"}, "no AutoencoderKL"),
        ("vae", {"latent_channels": 16}, "16 channels, 8-fold"),
        ("vae", {"latents_mean": [0.0] * 4}, "latents_mean"),
        ("text_encoder", {"model_type": "t5"}, "no clip_text_model"),
        ("text_encoder_2", {"model_type": "clip"}, "no clip_text_model"),
    ],
)
def test_other_models_are_refused(
    component: str,
    change: dict[str, object],
    message: str,
    family: Family,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    subfolder = family.spec.components[component].subfolder
    values = json.loads((checkpoint / subfolder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(SourceError) as caught:
        family.build_module(component, tmp_path)
    assert message in f"{caught.value.args[0]} {caught.value.found}"


def test_extras_must_be_loaded_first() -> None:
    family = get_family("sdxl")
    with pytest.raises(RuntimeError, match="load_extras before the scheduler"):
        _ = family.scheduler_config
    with pytest.raises(RuntimeError, match="load_extras before text"):
        family.encode_text(["a"], {})

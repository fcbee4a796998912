"""FLUX.1 against diffusers' own pipeline, in float32 on tiny checkpoints."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, T5EncoderModel

from framework.errors import SourceError
from framework.models import Family, SampleSettings, TextConditioning, get_family
from framework.models.published_layout import save_component
from framework.plan.match import module_name
from tests.families.flux import POOLED, WIDTH, build_checkpoint
from tests.unit.models.conftest import load

PROMPTS = ["a red apple", "", "a house with a garden, a cat, a dog and two blue cars beside it all"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("flux") / "tiny-flux")


@pytest.fixture(scope="module")
def family(checkpoint: Path) -> Family:
    return loaded_family(checkpoint)


@pytest.fixture(scope="module")
def modules(family: Family, checkpoint: Path) -> dict[str, nn.Module]:
    return load_all(family, checkpoint)


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> FluxPipeline:
    return load_pipeline(checkpoint)


@pytest.fixture(scope="module")
def text(family: Family, modules: dict[str, nn.Module]) -> TextConditioning:
    with torch.no_grad():
        return family.encode_text(PROMPTS, modules)


def loaded_family(checkpoint: Path) -> Family:
    family = get_family("flux")
    family.load_extras({name: checkpoint / f for name, f in family.spec.extras.items()})
    return family


def load_all(family: Family, checkpoint: Path) -> dict[str, nn.Module]:
    return {
        name: load(family, name, checkpoint / spec.subfolder)
        for name, spec in family.spec.components.items()
    }


def load_pipeline(checkpoint: Path) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(str(checkpoint), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def psnr(first: Image.Image, second: Image.Image) -> float:
    error = np.mean((np.asarray(first, np.float64) - np.asarray(second, np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def test_text_is_encoded_as_by_the_pipeline(text: TextConditioning, pipeline: FluxPipeline) -> None:
    with torch.no_grad():
        embeds, pooled, _ = pipeline.encode_prompt(PROMPTS)
    assert text.embeds.shape == (3, 512, WIDTH)
    assert text.pooled is not None
    assert text.pooled.shape == (3, POOLED)
    assert bool(text.mask.all())
    torch.testing.assert_close(text.embeds, embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(text.pooled, pooled, rtol=0, atol=1e-5)


def test_long_captions_are_cut_as_by_the_pipeline(
    family: Family, modules: dict[str, nn.Module], pipeline: FluxPipeline
) -> None:
    prompt = "a cat and a dog " * 60
    with torch.no_grad():
        text = family.encode_text([prompt], modules)
        embeds, pooled, _ = pipeline.encode_prompt(prompt)
    torch.testing.assert_close(text.embeds, embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(text.pooled, pooled, rtol=0, atol=1e-5)
    assert family.count_text_tokens([prompt, ""]) == 512


def test_gradients_reach_both_text_encoders(family: Family, checkpoint: Path) -> None:
    encoders = {
        name: load(family, name, checkpoint / name).requires_grad_(True)
        for name in family.spec.text_encoders
    }
    text = family.encode_text(PROMPTS[:2], encoders)
    (text.embeds.square().sum() + text.pooled.square().sum()).backward()
    for encoder in encoders.values():
        for name, parameter in encoder.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()), name


def test_the_second_text_encoder_has_one_table_of_embeddings(
    family: Family, modules: dict[str, nn.Module]
) -> None:
    names = modules["text_encoder_2"].state_dict()
    assert [name for name in names if "shared" in name or "embed" in name] == ["shared.weight"]
    # Files that hold it twice are read as well.
    spec = family.spec.components["text_encoder_2"]
    assert module_name("encoder.embed_tokens.weight", spec) is None


def test_made_up_captions_have_the_shapes_of_real_ones(
    family: Family, modules: dict[str, nn.Module]
) -> None:
    with torch.no_grad():
        rehearsed = family.rehearse_text(9, modules, batch_size=2)
    blank = family.blank_text(9, modules["dit"], batch_size=2, device=torch.device("cpu"))
    for made in (rehearsed, blank):
        assert made.embeds.shape == (2, 9, WIDTH)
        assert made.pooled is not None
        assert made.pooled.shape == (2, POOLED)
        assert not made.is_padded


def test_pictures_are_encoded_and_decoded_as_by_the_pipeline(
    family: Family, modules: dict[str, nn.Module], pipeline: FluxPipeline
) -> None:
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae: Any = pipeline.vae
    shift, factor = vae.config.shift_factor, vae.config.scaling_factor
    with torch.no_grad():
        latents = family.encode_image(pixels, modules["vae"])
        decoded = family.decode_image(latents, modules["vae"])
        expected = (vae.encode(pixels).latent_dist.mode() - shift) * factor
        expected_pixels = vae.decode(expected / factor + shift, return_dict=False)[0].clamp(-1, 1)
    assert latents.shape == (2, 16, 4, 6)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded, expected_pixels, rtol=0, atol=1e-5)


def test_reconstruction_follows_the_posterior(
    family: Family, modules: dict[str, nn.Module], pipeline: FluxPipeline
) -> None:
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae: Any = pipeline.vae
    noise = torch.ones(1, 16, 4, 4)
    with torch.no_grad():
        found, mean, logvar = family.reconstruct(pixels, modules["vae"], noise=noise)
        posterior = vae.encode(pixels).latent_dist
        expected = vae.decode(posterior.mean + posterior.std * noise, return_dict=False)[0]
    torch.testing.assert_close(mean, posterior.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(logvar, posterior.logvar, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance", [None, 3.5])
def test_predict_is_the_pipelines_call_of_the_transformer(
    guidance: float | None,
    family: Family,
    modules: dict[str, nn.Module],
    pipeline: FluxPipeline,
    text: TextConditioning,
) -> None:
    noisy = torch.randn(3, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 0.5, 1.0])
    with torch.no_grad():
        found = family.predict(noisy, sigma, text, modules["dit"], guidance=guidance)
        expected = pipeline.transformer(
            hidden_states=pipeline._pack_latents(noisy, 3, 16, 4, 6),
            timestep=1000 * sigma / 1000,
            guidance=torch.full((3,), guidance or 1.0),
            pooled_projections=text.pooled,
            encoder_hidden_states=text.embeds,
            txt_ids=torch.zeros(512, 3),
            img_ids=pipeline._prepare_latent_image_ids(3, 2, 3, "cpu", torch.float32),
            return_dict=False,
        )[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found, pipeline._unpack_latents(expected, 32, 48, 8), rtol=0, atol=1e-5
    )


def test_a_batch_predicts_what_its_captions_predict_alone(
    family: Family, modules: dict[str, nn.Module], text: TextConditioning
) -> None:
    noisy = torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.2, 0.4, 0.6])
    with torch.no_grad():
        together = family.predict(noisy, sigma, text, modules["dit"])
        alone = [
            family.predict(noisy[i : i + 1], sigma[i : i + 1], text.row(i), modules["dit"])
            for i in range(3)
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_captions_come_back_from_the_cache_whole(text: TextConditioning) -> None:
    rows = [TextConditioning.from_tensors(text.row(i).tensors()) for i in range(3)]
    again = TextConditioning.collate(rows)
    assert torch.equal(again.embeds, text.embeds)
    assert again.pooled is not None
    assert text.pooled is not None
    assert torch.equal(again.pooled, text.pooled)


@pytest.mark.cell("flux", "diffusers")
@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_same_pictures_as_the_pipeline(
    guidance: float,
    family: Family,
    modules: dict[str, nn.Module],
    pipeline: FluxPipeline,
    text: TextConditioning,
) -> None:
    seen: list[tuple[int, int]] = []
    settings = SampleSettings((64, 32), num_inference_steps=3, guidance_scale=guidance, seed=7)
    pictures = family.sample(
        text, None, modules, settings, on_step=lambda done, in_all: seen.append((done, in_all))
    )
    assert seen == [(done, 9) for done in range(1, 10)]
    for index, prompt in enumerate(PROMPTS):
        expected = expected_picture(pipeline, prompt, settings, index)
        assert pictures[index].size == expected.size == (64, 32)
        assert psnr(pictures[index], expected) >= 40
        assert np.asarray(expected).std() > 1  # a flat picture would prove nothing


def expected_picture(
    pipeline: FluxPipeline, prompt: str, settings: SampleSettings, index: int
) -> Image.Image:
    width, height = settings.size_px
    picture: Image.Image = pipeline(
        prompt,
        guidance_scale=settings.guidance_scale,
        width=width,
        height=height,
        num_inference_steps=settings.num_inference_steps,
        generator=torch.Generator("cpu").manual_seed(settings.seed + index),
    ).images[0]
    return picture


def test_guidance_is_an_input_of_dev(
    family: Family, modules: dict[str, nn.Module], text: TextConditioning
) -> None:
    first, second = (
        family.sample(text.row(0), None, modules, SampleSettings((32, 32), 1, scale))[0]
        for scale in (1.0, 30.0)
    )
    assert np.asarray(first).tobytes() != np.asarray(second).tobytes()


def test_schnell_takes_no_guidance(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "schnell", guidance=False)
    family, pipeline = loaded_family(folder), load_pipeline(folder)
    modules = load_all(family, folder)
    with torch.no_grad():
        text = family.encode_text(PROMPTS[:1], modules)
        noisy = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
        velocities = [
            family.predict(noisy, torch.tensor([0.5]), text, modules["dit"], guidance=scale)
            for scale in (None, 3.5)
        ]
    assert torch.equal(*velocities)
    settings = SampleSettings((32, 32), num_inference_steps=2, guidance_scale=3.5)
    picture = family.sample(text, None, modules, settings)[0]
    assert psnr(picture, expected_picture(pipeline, PROMPTS[0], settings, 0)) >= 40


def test_bf16_modules_take_and_give_float32(
    family: Family, checkpoint: Path, modules: dict[str, nn.Module], text: TextConditioning
) -> None:
    dit = load(family, "dit", checkpoint / "transformer", torch.bfloat16)
    vae = load(family, "vae", checkpoint / "vae", torch.bfloat16)
    with torch.no_grad():
        latents = family.encode_image(torch.zeros(3, 3, 32, 32), vae)
        velocity = family.predict(latents, torch.full((3,), 0.5), text, dit)
    assert latents.dtype == velocity.dtype == torch.float32
    settings = SampleSettings((32, 32), 2, 3.5)
    found = family.sample(text.row(0), None, {"dit": dit, "vae": vae}, settings)[0]
    assert psnr(found, family.sample(text.row(0), None, modules, settings)[0]) > 25


def test_float32_weights_work_under_autocast(family: Family, checkpoint: Path) -> None:
    parts = {
        name: load(family, name, checkpoint / spec.subfolder).requires_grad_(True)
        for name, spec in family.spec.components.items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        text = family.encode_text(PROMPTS[:2], parts)
        noisy = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
        velocity = family.predict(noisy, torch.tensor([0.3, 0.9]), text, parts["dit"])
    assert velocity.dtype == torch.float32
    velocity.square().mean().backward()
    for name in ("dit", "text_encoder", "text_encoder_2"):
        assert all(p.grad is not None for p in parts[name].parameters()), name


def test_checkpointing_changes_no_gradient(
    family: Family, checkpoint: Path, text: TextConditioning
) -> None:
    noisy = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointed in (False, True):
        dit: Any = load(family, "dit", checkpoint / "transformer").requires_grad_(True).train()
        if checkpointed:
            dit.enable_gradient_checkpointing()
        family.predict(noisy, torch.tensor([0.5]), text.row(0), dit).square().sum().backward()
        gradients.append({name: p.grad for name, p in dit.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def changed(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    return module


@pytest.mark.parametrize(
    ("component", "published_class"),
    [("dit", FluxTransformer2DModel), ("text_encoder", CLIPTextModel), ("text_encoder_2", T5EncoderModel)],
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


def test_a_vae_with_older_names_is_the_same(
    family: Family, checkpoint: Path, modules: dict[str, nn.Module], tmp_path: Path
) -> None:
    shutil.copytree(checkpoint / "vae", tmp_path / "vae")
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, values in load_file(file).items():
        name = next((key.replace(new, old) for new, old in older.items() if new in key), key)
        tensors[name] = values
    assert any(".query." in name for name in tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    vae = load(family, "vae", tmp_path / "vae")
    for name, values in modules["vae"].state_dict().items():
        assert torch.equal(vae.state_dict()[name], values), name


@pytest.mark.parametrize(
    ("component", "change", "message"),
    [
        ("dit", {"_class_name": "QwenImageTransformer2DModel"}, "no FluxTransformer2DModel"),
        ("dit", {"in_channels": 384, "out_channels": 64}, "in_channels 384"),
        ("vae", {"_class_name": "AutoencoderKLQwenImage"}, "no AutoencoderKL"),
        ("vae", {"latent_channels": 4}, "4 channels, 8-fold"),
        ("vae", {"shift_factor": None}, "shift_factor None"),
        ("text_encoder", {"model_type": "t5"}, "no clip_text_model"),
        ("text_encoder_2", {"model_type": "umt5"}, "no t5"),
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
    with pytest.raises(SourceError, match=message):
        family.build_module(component, tmp_path)


def test_missing_extras_are_named(checkpoint: Path, tmp_path: Path) -> None:
    family = get_family("flux")
    with pytest.raises(RuntimeError, match="load_extras before the scheduler"):
        _ = family.scheduler_config
    with pytest.raises(RuntimeError, match="load_extras before text"):
        family.encode_text(
            ["a"], {"text_encoder": nn.Linear(1, 1), "text_encoder_2": nn.Linear(1, 1)}
        )
    folders = {name: checkpoint / f for name, f in family.spec.extras.items()}
    with pytest.raises(SourceError, match="tokenizer is missing"):
        family.load_extras({**folders, "tokenizer_2": tmp_path / "none"})
    for name in ("tokenizer", "tokenizer_2"):
        with pytest.raises(SourceError, match="isn't in its vocabulary"):
            family.load_extras({**folders, name: tmp_path})
    with pytest.raises(SourceError, match=r"scheduler_config\.json"):
        family.load_extras({**folders, "scheduler": tmp_path})

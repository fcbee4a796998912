"""Wan 2.1 against diffusers' own pipeline, in float32 on a tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from torch import nn

from framework.errors import SourceError
from framework.models import Clip, Family, SampleSettings, TextConditioning, get_family
from framework.models.published_layout import save_component
from tests.families.parts import psnr
from tests.families.wan2_1 import FLOW_SHIFT, build_checkpoint
from tests.families.wan2_2 import build_checkpoint as build_two_experts
from tests.unit.models.conftest import load

PROMPTS = ["a red apple", "", " a cat   &amp;amp; a dog, a house with\n a garden "]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("wan2_1") / "tiny-wan2-1")


@pytest.fixture(scope="module")
def family(checkpoint: Path) -> Family:
    family = get_family("wan2_1")
    family.load_extras({name: checkpoint / f for name, f in family.spec.extras.items()})
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


@pytest.fixture(scope="module")
def text(family: Family, modules: dict[str, nn.Module]) -> TextConditioning:
    with torch.no_grad():
        return family.encode_text(PROMPTS, modules)


def clips(batch: int, frames: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, size, size, generator=generator) * 2 - 1


def encoded_by_the_pipeline(pipeline: WanPipeline, prompts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        embeds, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=512
        )
    return embeds


def test_text_is_encoded_as_by_the_pipeline(
    text: TextConditioning, family: Family, pipeline: WanPipeline
) -> None:
    expected = encoded_by_the_pipeline(pipeline, PROMPTS)
    length = text.embeds.shape[1]
    assert length == family.count_text_tokens(PROMPTS) < 60
    assert text.mask.sum(1).tolist() == expected.any(-1).sum(1).tolist()
    assert text.mask[1].sum() == 1  # an empty caption is its end token
    torch.testing.assert_close(text.embeds, expected[:, :length], rtol=0, atol=1e-5)
    assert not expected[:, length:].any()
    assert not text.embeds[~text.mask].any()


def test_long_prompts_are_cut_as_by_the_pipeline(
    family: Family, modules: dict[str, nn.Module], pipeline: WanPipeline
) -> None:
    prompt = "q " * 700
    with torch.no_grad():
        found = family.encode_text([prompt], modules)
    assert found.embeds.shape[1] == family.count_text_tokens([prompt]) == 512
    expected = encoded_by_the_pipeline(pipeline, [prompt])
    torch.testing.assert_close(found.embeds, expected, rtol=0, atol=1e-5)


def test_gradients_reach_the_text_encoder_and_no_mode_changes_what_it_says(
    family: Family, checkpoint: Path, text: TextConditioning
) -> None:
    encoder = load(family, "text_encoder", checkpoint / "text_encoder").requires_grad_(True)
    found = family.encode_text(PROMPTS, {"text_encoder": encoder.train()})
    torch.testing.assert_close(found.embeds, text.embeds, rtol=0, atol=1e-5)
    found.embeds.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name


def test_no_weight_of_the_text_encoder_is_looked_at_beside_its_product(
    family: Family, checkpoint: Path, text: TextConditioning
) -> None:
    """A layer in FP8 or in host memory would be decoded or fetched once more for it."""
    encoder = load(family, "text_encoder", checkpoint / "text_encoder")
    for name, layer in [*encoder.named_modules()]:
        if isinstance(layer, nn.Linear):
            hidden = nn.Module()
            hidden.forward = layer.forward
            encoder.set_submodule(name, hidden)
    with torch.no_grad():
        found = family.encode_text(PROMPTS, {"text_encoder": encoder})
    torch.testing.assert_close(found.embeds, text.embeds, rtol=0, atol=1e-5)


def test_a_second_table_of_embeddings_in_the_file_is_not_read(
    family: Family, checkpoint: Path, modules: dict[str, nn.Module]
) -> None:
    from framework.plan.match import module_name

    spec = family.spec.components["text_encoder"]
    assert module_name("encoder.embed_tokens.weight", spec) is None
    assert module_name("shared.weight", spec) == "embed_tokens.weight"
    assert "embed_tokens.weight" in dict(modules["text_encoder"].named_parameters())


def test_predict_is_the_pipelines_call_of_the_transformer(
    family: Family,
    modules: dict[str, nn.Module],
    pipeline: WanPipeline,
    text: TextConditioning,
) -> None:
    noisy = torch.randn(3, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 0.5, 1.0])
    with torch.no_grad():
        expected = pipeline.transformer(
            hidden_states=noisy,
            timestep=1000 * sigma,
            encoder_hidden_states=encoded_by_the_pipeline(pipeline, PROMPTS),
            return_dict=False,
        )[0]
        found = family.predict(noisy, sigma, text, modules["dit"])
        alone = [
            family.predict(noisy[i : i + 1], sigma[i : i + 1], text.row(i), modules["dit"])
            for i in range(3)
        ]
    assert found.shape == noisy.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-5)


def test_rehearsed_and_blank_captions_have_the_shapes_of_real_ones(
    family: Family, modules: dict[str, nn.Module]
) -> None:
    blank = family.blank_text(5, modules["dit"], batch_size=2, device=torch.device("cpu"))
    with torch.no_grad():
        rehearsed = family.rehearse_text(5, modules, batch_size=2)
    assert rehearsed.embeds.shape == blank.embeds.shape == (2, 5, 16)
    assert rehearsed.is_padded  # as a batch of real captions may be


@pytest.mark.parametrize("frames", [1, 5])
def test_clips_are_encoded_and_decoded_as_by_the_pipeline(
    frames: int, family: Family, modules: dict[str, nn.Module], pipeline: WanPipeline
) -> None:
    pixels = clips(2, frames, 32)
    vae = pipeline.vae
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        latents = family.encode_image(pixels, modules["vae"])
        decoded = family.decode_image(3 * latents, modules["vae"])
        mode = vae.encode(pixels).latent_dist.mode()
        expected = vae.decode(3 * latents * std + mean, return_dict=False)[0]
    assert latents.shape == (2, 16, 1 + frames // 4, 4, 4)
    assert family.initial_latents(32, 32, 0, num_frames=frames).shape[1:] == latents.shape[1:]
    torch.testing.assert_close(latents, (mode - mean) / std, rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)
    assert decoded.shape == pixels.shape


def test_a_clip_with_frames_to_spare_is_refused(
    family: Family, modules: dict[str, nn.Module], text: TextConditioning
) -> None:
    with pytest.raises(ValueError, match="multiple of 4 plus one, not 6"):
        family.encode_image(clips(1, 6, 16), modules["vae"])
    settings = SampleSettings((32, 32), 1, 1.0, num_frames=6)
    with pytest.raises(ValueError, match="multiple of 4 plus one"):
        family.sample(text, None, modules, settings)


def test_reconstruction_has_gradients_everywhere_and_is_the_decoders_before_its_clamp(
    family: Family, checkpoint: Path
) -> None:
    vae = load(family, "vae", checkpoint / "vae").requires_grad_(True)
    pixels = 4 * clips(1, 9, 16)
    found, mean, logvar = family.reconstruct(pixels, vae)
    drawn, _, _ = family.reconstruct(pixels, vae, noise=torch.ones_like(mean))
    with torch.no_grad():
        expected = family.decode_image(family.encode_image(pixels, vae), vae)
    torch.testing.assert_close(found.clamp(-1, 1), expected, rtol=0, atol=1e-4)
    assert float(found.detach().abs().max()) > 1
    assert mean.shape == logvar.shape == (1, 16, 3, 2, 2)
    assert not torch.equal(drawn, found)
    (drawn.square().mean() + logvar.square().mean()).backward()
    assert all(p.grad is not None for p in vae.parameters())


@pytest.mark.cell("wan2_1", "diffusers")
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_same_clips_as_the_pipeline(
    guidance: float, family: Family, modules: dict[str, nn.Module], pipeline: WanPipeline
) -> None:
    settings = SampleSettings((64, 32), 3, guidance, seed=7, num_frames=5)
    with torch.no_grad():
        positive = family.encode_text(PROMPTS[::2], modules)
        negative = family.encode_text([""], modules)
    steps: list[tuple[int, int]] = []
    made = family.sample(
        positive, negative, modules, settings, on_step=lambda done, of: steps.append((done, of))
    )
    assert steps == [(i, 6) for i in range(1, 7)]
    for index, prompt in enumerate(PROMPTS[::2]):
        expected = pipeline(
            prompt,
            negative_prompt="",
            guidance_scale=guidance,
            width=64,
            height=32,
            num_frames=5,
            num_inference_steps=3,
            output_type="pil",
            generator=torch.Generator("cpu").manual_seed(7 + index),
        ).frames[0]
        clip = made[index]
        assert isinstance(clip, Clip)
        assert (len(clip.frames), clip.fps) == (5, 16)
        for frame, other in zip(clip.frames, expected, strict=True):
            assert frame.size == other.size == (64, 32)
            assert psnr(frame, other) >= 40
        assert np.asarray(expected[0]).std() > 1  # a flat picture would prove nothing


def test_velocity_points_from_clip_to_noise(
    family: Family, modules: dict[str, nn.Module], pipeline: WanPipeline
) -> None:
    """One clip in one step: the start minus the velocity, as the sampler steps from sigma 1 to 0."""
    with torch.no_grad():
        row = family.encode_text(["a cat"], modules)
        noise = family.initial_latents(32, 32, seed=3, num_frames=5)
        velocity = family.predict(noise, torch.full((1,), 0.999), row, modules["dit"])
        latents = pipeline(
            "a cat", guidance_scale=1.0, width=32, height=32, num_frames=5, num_inference_steps=1,
            generator=torch.Generator("cpu").manual_seed(3), output_type="latent",
        ).frames  # fmt: skip
    torch.testing.assert_close(noise - velocity, latents, rtol=0, atol=1e-4)


def test_mixed_formats_and_gradient_checkpointing(
    family: Family, checkpoint: Path, modules: dict[str, nn.Module], text: TextConditioning
) -> None:
    noisy = torch.randn(3, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.2, 0.4, 0.6])
    dit = load(family, "dit", checkpoint / "transformer", torch.bfloat16)
    with torch.no_grad():
        rough = family.predict(noisy, sigma, text, dit)
        exact = family.predict(noisy, sigma, text, modules["dit"])
    assert rough.dtype == torch.float32
    assert 0 < float((rough - exact).abs().max()) < 0.1
    trained = load(family, "dit", checkpoint / "transformer").requires_grad_(True).train()
    trained.enable_gradient_checkpointing()
    with torch.autocast("cpu", torch.bfloat16):
        velocity = family.predict(noisy, sigma, text, trained)
    velocity.square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained.parameters())


@pytest.mark.parametrize("component", ["dit", "vae", "text_encoder"])
def test_a_saved_component_loads_in_its_own_library(
    component: str, family: Family, checkpoint: Path, tmp_path: Path
) -> None:
    import diffusers
    import transformers

    source = checkpoint / family.spec.components[component].subfolder
    module = load(family, component, source)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    save_component(
        family.spec.components[component], module, tmp_path / "out", source_folder=source
    )
    loaders = {
        "dit": diffusers.WanTransformer3DModel,
        "vae": diffusers.AutoencoderKLWan,
        "text_encoder": transformers.UMT5EncoderModel,
    }
    loaded, info = loaders[component].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    if component == "text_encoder":
        assert loaded.shared.weight is loaded.encoder.embed_tokens.weight
        loaded = loaded.encoder
    found = dict(loaded.named_parameters())
    for key, values in module.named_parameters():
        assert torch.equal(found[key].float(), values.bfloat16().float()), key


def test_scheduler_and_noise_levels(family: Family) -> None:
    assert family.scheduler_config["flow_shift"] == FLOW_SHIFT
    assert family.sigma_range("dit") == (0.0, 1.0)
    with pytest.raises(RuntimeError, match="load_extras before text"):
        get_family("wan2_1").count_text_tokens(["a"])


def test_a_checkpoint_with_two_experts_is_sent_to_its_own_family(tmp_path: Path) -> None:
    other = build_two_experts(tmp_path / "tiny-wan2-2")
    family = get_family("wan2_1")
    with pytest.raises(SourceError, match="this checkpoint has two") as caught:
        family.load_extras({name: other / f for name, f in family.spec.extras.items()})
    assert "wan2_2" in str(caught.value)


@pytest.mark.parametrize(
    ("component", "change", "message"),
    [
        ("dit", {"_class_name": "WanVACETransformer3DModel"}, "no WanTransformer3DModel"),
        ("dit", {"in_channels": 36}, "in_channels 16"),
        ("dit", {"image_dim": 1280, "added_kv_proj_dim": 8}, "image_dim None, added_kv_proj_dim"),
        ("vae", {"_class_name": "AutoencoderKLQwenImage"}, "no AutoencoderKLWan"),
        ("vae", {"z_dim": 48, "is_residual": True}, "z_dim 16, is_residual False"),
        ("text_encoder", {"model_type": "t5"}, "no umt5"),
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
    folder = checkpoint / family.spec.components[component].subfolder
    values = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(SourceError, match=message):
        family.build_module(component, tmp_path)

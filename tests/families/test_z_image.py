"""Z-Image against diffusers' own pipeline, in float32 on a tiny checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from safetensors.torch import load_file
from torch import nn

from framework.errors import SourceError
from framework.models import Family, SampleSettings, TextConditioning, get_family
from framework.models.published_layout import save_component
from tests.checkpoints import rename_keys
from tests.families.parts import psnr
from tests.families.z_image import SHIFT, build_checkpoint
from tests.unit.models.conftest import load

PROMPTS = ["a red apple", "", "a house with a garden, a cat, a dog and two blue cars beside it all"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("z_image") / "tiny-z-image")


@pytest.fixture(scope="module")
def family(checkpoint: Path) -> Family:
    family = get_family("z_image")
    family.load_extras({name: checkpoint / f for name, f in family.spec.extras.items()})
    return family


@pytest.fixture(scope="module")
def modules(family: Family, checkpoint: Path) -> dict[str, nn.Module]:
    return {
        name: load(family, name, checkpoint / spec.subfolder)
        for name, spec in family.spec.components.items()
    }


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> ZImagePipeline:
    pipeline = ZImagePipeline.from_pretrained(str(checkpoint), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def text(family: Family, modules: dict[str, nn.Module]) -> TextConditioning:
    with torch.no_grad():
        return family.encode_text(PROMPTS, modules)


def test_text_is_encoded_as_by_the_pipeline(
    text: TextConditioning, family: Family, pipeline: ZImagePipeline
) -> None:
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    assert len({len(states) for states in expected}) == 3
    for index, states in enumerate(expected):
        found = text.row(index).embeds[0]
        torch.testing.assert_close(found, states, rtol=0, atol=1e-5)
    assert family.count_text_tokens(PROMPTS) == text.embeds.shape[1]
    assert not text.embeds[~text.mask].any()


def test_long_prompts_are_cut_as_by_the_pipeline(
    family: Family, modules: dict[str, nn.Module], pipeline: ZImagePipeline
) -> None:
    prompt = "q" * 700
    with torch.no_grad():
        found = family.encode_text([prompt], modules)
        expected, _ = pipeline.encode_prompt([prompt], do_classifier_free_guidance=False)
    assert found.embeds.shape[1] == family.count_text_tokens([prompt]) == 512
    torch.testing.assert_close(found.embeds[0], expected[0], rtol=0, atol=1e-5)


def test_gradients_reach_all_of_the_text_encoder_that_counts(
    family: Family, checkpoint: Path
) -> None:
    encoder = load(family, "text_encoder", checkpoint / "text_encoder").requires_grad_(True)
    text = family.encode_text(PROMPTS, {"text_encoder": encoder})
    text.embeds.square().sum().backward()
    without = {n.split(".")[1] for n, p in encoder.named_parameters() if p.grad is None}
    assert without == {"2"}  # the last of three layers, which the DiT doesn't see


def test_predict_is_the_pipelines_call_of_the_transformer(
    family: Family,
    modules: dict[str, nn.Module],
    pipeline: ZImagePipeline,
    text: TextConditioning,
) -> None:
    noisy = torch.randn(3, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 0.5, 1.0])
    with torch.no_grad():
        captions, _ = pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
        answers = pipeline.transformer(
            list(noisy[:, :, None].unbind(0)),
            (1000 - 1000 * sigma) / 1000,
            captions,
            return_dict=False,
        )[0]
        found = family.predict(noisy, sigma, text, modules["dit"])
        alone = [
            family.predict(noisy[i : i + 1], sigma[i : i + 1], text.row(i), modules["dit"])
            for i in range(3)
        ]
    assert found.shape == noisy.shape
    torch.testing.assert_close(found, -torch.stack(answers)[:, :, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-5)


def test_captions_of_one_length_need_no_mask(family: Family, modules: dict[str, nn.Module]) -> None:
    text = family.blank_text(5, modules["dit"], batch_size=2, device=torch.device("cpu"))
    noisy = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rehearsed = family.rehearse_text(5, modules, batch_size=2)
        found = family.predict(noisy, torch.full((2,), 0.5), text, modules["dit"])
        told = TextConditioning(text.embeds, text.mask)
        expected = family.predict(noisy, torch.full((2,), 0.5), told, modules["dit"])
    assert rehearsed.embeds.shape == text.embeds.shape == (2, 5, 16)
    assert torch.equal(found, expected)


def test_pictures_are_encoded_and_decoded_as_by_the_pipeline(
    family: Family, modules: dict[str, nn.Module], pipeline: ZImagePipeline
) -> None:
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = pipeline.vae
    with torch.no_grad():
        latents = family.encode_image(pixels, modules["vae"])
        decoded = family.decode_image(3 * latents, modules["vae"])
        mode = vae.encode(pixels).latent_dist.mode()
        expected = vae.decode(3 * latents / 0.3611 + 0.1159, return_dict=False)[0]
    assert latents.shape == (2, 16, 4, 6)
    torch.testing.assert_close(latents, (mode - 0.1159) * 0.3611, rtol=0, atol=1e-6)
    torch.testing.assert_close(decoded, expected.clamp(-1, 1), rtol=0, atol=1e-5)


def test_reconstruction_has_gradients_everywhere_and_is_the_decoders_before_its_clamp(
    family: Family, checkpoint: Path
) -> None:
    vae = load(family, "vae", checkpoint / "vae").requires_grad_(True)
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found, mean, logvar = family.reconstruct(pixels, vae)
    drawn, _, _ = family.reconstruct(pixels, vae, noise=torch.ones_like(mean))
    with torch.no_grad():
        expected = family.decode_image(family.encode_image(pixels, vae), vae)
    torch.testing.assert_close(found.clamp(-1, 1), expected, rtol=0, atol=1e-5)
    assert not torch.equal(drawn, found)
    (drawn.square().mean() + logvar.square().mean()).backward()
    assert all(p.grad is not None for p in vae.parameters())


@pytest.mark.cell("z_image", "diffusers")
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_same_pictures_as_the_pipeline(
    guidance: float, family: Family, modules: dict[str, nn.Module], pipeline: ZImagePipeline
) -> None:
    settings = SampleSettings((64, 32), num_inference_steps=3, guidance_scale=guidance, seed=7)
    with torch.no_grad():
        positive = family.encode_text(PROMPTS[::2], modules)
        negative = family.encode_text(["a dog"], modules)
    steps: list[tuple[int, int]] = []
    pictures = family.sample(
        positive, negative, modules, settings, on_step=lambda done, of: steps.append((done, of))
    )
    assert steps == [(i, 6) for i in range(1, 7)]
    for index, prompt in enumerate(PROMPTS[::2]):
        expected = pipeline(
            prompt,
            negative_prompt="a dog",
            guidance_scale=guidance if guidance > 1 else 0.0,
            width=64,
            height=32,
            num_inference_steps=3,
            generator=torch.Generator("cpu").manual_seed(7 + index),
        ).images[0]
        assert pictures[index].size == expected.size == (64, 32)
        assert psnr(pictures[index], expected) >= 40
        assert np.asarray(expected).std() > 1  # a flat picture would prove nothing


def test_velocity_points_from_picture_to_noise(
    family: Family, modules: dict[str, nn.Module], pipeline: ZImagePipeline
) -> None:
    """One picture in one step: the start minus the velocity, as the sampler steps from sigma 1 to 0."""
    with torch.no_grad():
        row = family.encode_text(["a cat"], modules)
        noise = family.initial_latents(32, 32, seed=3)
        velocity = family.predict(noise, torch.ones(1), row, modules["dit"])
        latents = pipeline(
            "a cat", guidance_scale=0.0, width=32, height=32, num_inference_steps=1,
            generator=torch.Generator("cpu").manual_seed(3), output_type="latent",
        ).images  # fmt: skip
    torch.testing.assert_close(noise - velocity, latents, rtol=0, atol=1e-5)


def test_mixed_formats_and_gradient_checkpointing(
    family: Family, checkpoint: Path, modules: dict[str, nn.Module], text: TextConditioning
) -> None:
    noisy = torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
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
        "dit": diffusers.ZImageTransformer2DModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.Qwen3Model,
    }
    loaded, info = loaders[component].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    found = dict(loaded.named_parameters())
    for key, values in module.named_parameters():
        assert torch.equal(found[key].float(), values.bfloat16().float()), key


def test_scheduler_and_sizes(family: Family, checkpoint: Path, tmp_path: Path) -> None:
    assert family.scheduler_config["shift"] == SHIFT
    assert family.image_tokens(1024, 512) == 64 * 32
    base = get_family("z_image")
    other = build_checkpoint(tmp_path / "base", shift=6.0)
    base.load_extras({"tokenizer": other / "tokenizer", "scheduler": other / "scheduler"})
    assert base.scheduler_config["shift"] == 6.0
    with pytest.raises(RuntimeError, match="load_extras before text"):
        get_family("z_image").count_text_tokens(["a"])


@pytest.mark.parametrize(
    ("component", "change", "message"),
    [
        ("dit", {"_class_name": "FluxTransformer2DModel"}, "no ZImageTransformer2DModel"),
        ("dit", {"siglip_feat_dim": 8}, "siglip_feat_dim"),
        ("dit", {"in_channels": 4}, "in_channels 4"),
        ("dit", {"all_patch_size": [2, 4]}, r"all_patch_size \[2, 4\]"),
        ("vae", {"_class_name": "AutoencoderKLWan"}, "no AutoencoderKL"),
        ("vae", {"latent_channels": 4}, "4 channels, 8-fold"),
        ("text_encoder", {"model_type": "qwen2_5_vl"}, "no qwen3"),
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


def test_a_tokenizer_without_a_chat_template_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(SourceError, match="no chat template"):
        get_family("z_image").load_extras(
            {"tokenizer": tmp_path / "tokenizer", "scheduler": checkpoint / "scheduler"}
        )


def test_pad_tokens_and_the_older_names_of_the_vae_are_read(
    family: Family, checkpoint: Path, modules: dict[str, nn.Module], tmp_path: Path
) -> None:
    assert bool(modules["dit"].cap_pad_token.any())
    assert bool(modules["dit"].x_pad_token.any())
    folder = tmp_path / "vae"
    folder.mkdir()
    for file in (checkpoint / "vae").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), (r"to_out\.0", "proj_attn")):  # fmt: skip
        rename_keys(folder, rf"attentions\.0\.{new}\.", f"attentions.0.{old}.")
    assert any("proj_attn" in key for key in load_file(next(folder.glob("*.safetensors"))))
    older = dict(load(family, "vae", folder).named_parameters())
    for name, values in modules["vae"].named_parameters():
        assert torch.equal(older[name], values), name

"""The family against diffusers' own pipeline, in float32 on a tiny checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import QwenImagePipeline
from torch import nn

from framework.errors import ConfigError, SourceError
from framework.models import Family, TextConditioning, get_family
from framework.models.base import input_dtype
from framework.models.qwen_image import PROMPT_TEMPLATE, pack_latents, unpack_latents
from tests.unit.models.conftest import load

PROMPTS = [
    "a red apple",
    "",
    "a {curly} house with a garden, a cat, a dog and two blue cars beside it",
]


@pytest.fixture
def text(family: Family, modules: dict[str, nn.Module]) -> TextConditioning:
    with torch.no_grad():
        return family.encode_text(PROMPTS, modules)


def test_text_is_encoded_as_by_the_pipeline(
    text: TextConditioning, pipeline: QwenImagePipeline
) -> None:
    embeds, mask = pipeline.encode_prompt(PROMPTS)
    assert torch.equal(text.mask, mask.bool())
    torch.testing.assert_close(text.embeds, embeds, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_prompt_has_no_padding(
    prompt: str, family: Family, modules: dict[str, nn.Module], pipeline: QwenImagePipeline
) -> None:
    with torch.no_grad():
        text = family.encode_text([prompt], modules)
    embeds, mask = pipeline.encode_prompt(prompt)
    assert mask is None
    assert bool(text.mask.all())
    torch.testing.assert_close(text.embeds, embeds, rtol=0, atol=1e-5)


def test_a_prompt_does_not_depend_on_the_padding_of_its_batch(
    text: TextConditioning, family: Family, modules: dict[str, nn.Module]
) -> None:
    for index, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            alone = family.encode_text([prompt], modules)
        torch.testing.assert_close(text.row(index).embeds, alone.embeds, rtol=0, atol=1e-5)


def test_long_prompts_are_cut_as_by_the_pipeline(
    family: Family, modules: dict[str, nn.Module], pipeline: QwenImagePipeline
) -> None:
    prompt = "q" * 1500
    with torch.no_grad():
        text = family.encode_text([prompt], modules)
    embeds, _ = pipeline.encode_prompt(prompt)
    assert text.embeds.shape[1] == 1024
    torch.testing.assert_close(text.embeds, embeds, rtol=0, atol=1e-5)


def test_gradients_reach_the_text_encoder(family: Family, tiny_checkpoint: Path) -> None:
    encoder = load(family, "text_encoder", tiny_checkpoint / "text_encoder").requires_grad_(True)
    family.encode_text(
        ["a cat", "a dog and a cat"], {"text_encoder": encoder}
    ).embeds.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("nested", [False, True])
def test_older_text_configs_build_the_same_model(
    nested: bool,
    family: Family,
    tiny_checkpoint: Path,
    modules: dict[str, nn.Module],
    tmp_path: Path,
) -> None:
    """transformers 4 wrote `rope_scaling` and `rope_theta`, first flat, later in `text_config`."""
    folder = tmp_path / "text_encoder"
    shutil.copytree(tiny_checkpoint / "text_encoder", folder)
    values = json.loads((folder / "config.json").read_text())
    text = values.pop("text_config")
    del text["rope_parameters"]
    text.pop("layer_types", None)
    text["rope_theta"] = 1e6
    if nested:
        text["rope_scaling"] = {
            "type": "default",
            "rope_type": "default",
            "mrope_section": [1, 1, 2],
        }
        values["text_config"] = text
    else:
        text["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 2]}
        values = {**text, **values, "model_type": "qwen2_5_vl"}
    (folder / "config.json").write_text(json.dumps(values))
    encoder = load(family, "text_encoder", folder)
    with torch.no_grad():
        found = family.encode_text(PROMPTS, {"text_encoder": encoder})
        expected = family.encode_text(PROMPTS, modules)
    assert torch.equal(found.embeds, expected.embeds)


def test_older_tokenizer_folders_are_read(
    family: Family, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """As published: vocab.json and merges.txt, special tokens in the tokenizer's config."""
    whole = json.loads((tiny_checkpoint / "tokenizer" / "tokenizer.json").read_text())
    special = {str(t["id"]): {**t, "id": None} for t in whole["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]]
    for entry in special.values():
        del entry["id"]
    config = {
        "added_tokens_decoder": special,
        "tokenizer_class": "Qwen2Tokenizer",
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "model_max_length": 131072,
    }
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    other = get_family("qwen_image")
    other.load_extras({"tokenizer": folder, "scheduler": tiny_checkpoint / "scheduler"})
    for prompt in PROMPTS:
        text = PROMPT_TEMPLATE.format(prompt)
        assert other.tokenizer(text).input_ids == family.tokenizer(text).input_ids


def test_text_encoder_is_the_language_model_alone(modules: dict[str, nn.Module]) -> None:
    names = {name.partition(".")[0] for name, _ in modules["text_encoder"].named_parameters()}
    assert names == {"embed_tokens", "layers", "norm"}


def test_images_are_encoded_and_decoded_as_by_the_pipeline(
    family: Family, modules: dict[str, nn.Module], pipeline: QwenImagePipeline
) -> None:
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = pipeline.vae
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        latents = family.encode_image(pixels, modules["vae"])
        decoded = family.decode_image(3 * latents, modules["vae"])
        posterior = vae.encode(pixels[:, :, None]).latent_dist
        expected_latents = (posterior.mode() - mean) / std
        expected = vae.decode(3 * expected_latents * std + mean, return_dict=False)[0]
    assert latents.shape == (2, 16, 4, 6)
    torch.testing.assert_close(latents, expected_latents[:, :, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(decoded, expected[:, :, 0], rtol=0, atol=1e-5)
    assert float(decoded.abs().max()) <= 1


def test_reconstruction_is_the_decoders_before_its_clamp(
    family: Family, modules: dict[str, nn.Module]
) -> None:
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vae = modules["vae"]
    with torch.no_grad():
        found, mean, logvar = family.reconstruct(pixels, vae)
        expected = family.decode_image(family.encode_image(pixels, vae), vae)
        noise = torch.ones_like(mean)
        drawn, _, _ = family.reconstruct(pixels, vae, noise=noise)
    torch.testing.assert_close(found.clamp(-1, 1), expected, rtol=0, atol=1e-5)
    assert mean.shape == logvar.shape == (1, 16, 4, 4)
    assert not torch.equal(drawn, found)


def test_reconstruction_has_gradients_everywhere(family: Family, tiny_checkpoint: Path) -> None:
    vae = load(family, "vae", tiny_checkpoint / "vae").requires_grad_(True)
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found, mean, logvar = family.reconstruct(pixels, vae, noise=torch.zeros(1, 16, 2, 2))
    (found.square().mean() + mean.square().mean() + logvar.square().mean()).backward()
    # Convolutions over time see no second frame; they exist but take no part in still images.
    without = {n for n, p in vae.named_parameters() if p.grad is None}
    assert all("time_conv" in name for name in without), without


def test_predict_is_the_pipelines_call_of_the_transformer(
    family: Family,
    modules: dict[str, nn.Module],
    pipeline: QwenImagePipeline,
    text: TextConditioning,
) -> None:
    noisy = torch.randn(3, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 0.5, 1.0])
    embeds, mask = pipeline.encode_prompt(PROMPTS)
    packed = pipeline._pack_latents(noisy, 3, 16, 4, 6)
    with torch.no_grad():
        found = family.predict(noisy, sigma, text, modules["dit"])
        expected = pipeline.transformer(
            hidden_states=packed,
            timestep=1000 * sigma / 1000,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, 2, 3)]] * 3,
            return_dict=False,
        )[0]
    assert found.shape == noisy.shape
    assert found.dtype == torch.float32
    expected = pipeline._unpack_latents(expected, 32, 48, 8)[:, :, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_padded_caption_predicts_what_it_predicts_alone(
    family: Family, modules: dict[str, nn.Module], text: TextConditioning
) -> None:
    noisy = torch.randn(3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.2, 0.4, 0.6])
    with torch.no_grad():
        together = family.predict(noisy, sigma, text, modules["dit"])
        for i in range(3):
            alone = family.predict(noisy[i : i + 1], sigma[i : i + 1], text.row(i), modules["dit"])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


def test_velocity_points_from_picture_to_noise(family: Family) -> None:
    """One Euler step of the published scheduler with the true velocity lands on the straight path."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from framework.diffusion.flow_matching import interpolate, velocity_target

    x0, noise = torch.randn(2, 1, 16, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(family.scheduler_config))
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=0.7)
    start = interpolate(x0, noise, scheduler.sigmas[:1])
    stepped = scheduler.step(velocity_target(x0, noise), scheduler.timesteps[0], start).prev_sample
    torch.testing.assert_close(stepped, interpolate(x0, noise, scheduler.sigmas[1:2]))


def test_packing_is_the_pipelines_and_is_undone() -> None:
    latents = torch.arange(2 * 16 * 4 * 6, dtype=torch.float32).view(2, 16, 4, 6)
    packed = pack_latents(latents)
    assert torch.equal(packed, QwenImagePipeline._pack_latents(latents, 2, 16, 4, 6))
    assert torch.equal(unpack_latents(packed, 4, 6), latents)


def test_sizes_and_noise(family: Family) -> None:
    assert family.image_tokens(1024, 512) == 64 * 32
    noise = family.initial_latents(64, 32, seed=3)
    assert noise.shape == (1, 16, 4, 8)
    assert torch.equal(noise, family.initial_latents(64, 32, seed=3))
    assert not torch.equal(noise, family.initial_latents(64, 32, seed=4))


def test_bf16_modules_take_and_give_float32_latents(
    family: Family, tiny_checkpoint: Path, text: TextConditioning
) -> None:
    dit = load(family, "dit", tiny_checkpoint / "transformer", torch.bfloat16)
    vae = load(family, "vae", tiny_checkpoint / "vae", torch.bfloat16)
    assert input_dtype(dit) == torch.bfloat16
    with torch.no_grad():
        latents = family.encode_image(torch.zeros(3, 3, 32, 32), vae)
        velocity = family.predict(latents, torch.full((3,), 0.5), text, dit)
        pixels = family.decode_image(latents, vae)
    assert latents.dtype == velocity.dtype == pixels.dtype == torch.float32


def test_float32_weights_work_under_autocast(family: Family, tiny_checkpoint: Path) -> None:
    encoder = load(family, "text_encoder", tiny_checkpoint / "text_encoder").requires_grad_(True)
    dit = load(family, "dit", tiny_checkpoint / "transformer").requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        text = family.encode_text(PROMPTS[:2], {"text_encoder": encoder})
        noisy = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
        velocity = family.predict(noisy, torch.tensor([0.3, 0.9]), text, dit)
    assert velocity.dtype == torch.float32
    velocity.square().mean().backward()
    assert dit.img_in.weight.grad.dtype == torch.float32
    assert encoder.embed_tokens.weight.grad is not None


def test_adapters_do_not_decide_the_input_dtype() -> None:
    module = nn.ModuleDict(
        {"lora_A": nn.Linear(2, 2), "base": nn.Linear(2, 2, dtype=torch.bfloat16)}
    )
    assert input_dtype(module) == torch.bfloat16
    with pytest.raises(ValueError, match="no floating-point weight"):
        input_dtype(nn.Identity())


def test_collate_pads_with_zeros_and_row_takes_the_padding_off(text: TextConditioning) -> None:
    rows = [text.row(i) for i in range(3)]
    assert len({row.embeds.shape[1] for row in rows}) == 3
    again = TextConditioning.collate(rows)
    assert torch.equal(again.mask, text.mask)
    assert torch.equal(again.embeds, text.embeds)
    assert not again.embeds[~again.mask].any()
    moved = again.to("cpu", torch.bfloat16)
    assert moved.embeds.dtype == torch.bfloat16
    assert moved.mask.dtype == torch.bool
    with pytest.raises(ValueError, match="no captions"):
        TextConditioning.collate([])
    with pytest.raises(ValueError, match="mask must be bool"):
        TextConditioning(text.embeds, text.mask.long())


def test_unknown_family_is_refused() -> None:
    with pytest.raises(ConfigError, match="'cogview' is no model family"):
        get_family("cogview")


def test_extras_must_be_loaded_first() -> None:
    family = get_family("qwen_image")
    with pytest.raises(RuntimeError, match="load_extras before the scheduler"):
        _ = family.scheduler_config
    with pytest.raises(RuntimeError, match="load_extras before text"):
        family.encode_text(["a"], {"text_encoder": nn.Linear(1, 1)})


def test_missing_extras_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    family = get_family("qwen_image")
    with pytest.raises(SourceError, match=r"scheduler_config\.json"):
        family.load_extras({"tokenizer": tiny_checkpoint / "tokenizer", "scheduler": tmp_path})
    with pytest.raises(SourceError, match="tokenizer is missing"):
        family.load_extras(
            {"tokenizer": tmp_path / "tokenizer", "scheduler": tiny_checkpoint / "scheduler"}
        )
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(SourceError, match="tokenizer can't be read"):
        family.load_extras(
            {"tokenizer": tmp_path / "tokenizer", "scheduler": tiny_checkpoint / "scheduler"}
        )


@pytest.mark.parametrize(
    ("component", "subfolder", "change", "message"),
    [
        ("dit", "transformer", {"_class_name": "FluxTransformer2DModel"}, "no QwenImageTransformer2DModel"),
        ("dit", "transformer", {"guidance_embeds": True}, "guidance_embeds"),
        ("dit", "transformer", {"use_layer3d_rope": True}, "use_layer3d_rope"),
        ("dit", "transformer", {"in_channels": 16}, "in_channels 16"),
        ("vae", "vae", {"_class_name": "AutoencoderKL"}, "no AutoencoderKLQwenImage"),
        ("vae", "vae", {"z_dim": 4}, "4 channels, 8-fold"),
        ("text_encoder", "text_encoder", {"model_type": "t5"}, "no qwen2_5_vl"),
    ],
)  # fmt: skip
def test_other_models_are_refused(
    component: str,
    subfolder: str,
    change: dict[str, object],
    message: str,
    family: Family,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    values = json.loads((tiny_checkpoint / subfolder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(SourceError, match=message):
        family.build_module(component, tmp_path)


def test_broken_configs_are_named(family: Family, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="config file is missing"):
        family.build_module("dit", tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceError, match="isn't JSON"):
        family.build_module("dit", tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(SourceError, match="isn't a JSON object"):
        family.build_module("dit", tmp_path)

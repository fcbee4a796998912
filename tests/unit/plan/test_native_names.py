"""Single files in other programs' names: the same tensors come out as of diffusers' own converters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers.loaders import single_file_utils as diffusers_names
from safetensors.torch import load_file, save_file
from torch import Tensor

from framework.errors import SourceError
from framework.hub import ComponentHeaders
from framework.inventory import read_file_header
from framework.plan.native_names import check_contents, read_component
from framework.plan.native_names.tables import CONTENTS, NAMES
from framework.plan.published import PublishedTensors
from framework.runtime.streaming import read_tensors
from framework.schema.families import FAMILIES
from framework.schema.family import ComponentSpec
from framework.storage.fp8 import dequantise
from tests import native
from tests.native import State


def spec_of(family: str, component: str = "dit") -> ComponentSpec:
    return FAMILIES[family].components[component]


def read(file: Path, family: str, component: str = "dit") -> State:
    """All tensors of a file under published names."""
    published = read_component(read_file_header(file), spec_of(family, component))
    assert published.problems == []
    return values_of(published)


def values_of(published: PublishedTensors) -> State:
    found = {stored: values.clone() for stored, values in read_tensors(published.tensors.values())}
    return {key: found[stored] for key, stored in published.tensors.items()}


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].shape == value.shape, key
        assert torch.equal(found[key], value), key


def some(keys: Mapping[str, tuple[int, ...]]) -> State:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) for key, shape in keys.items()}


def tiny_flux() -> State:
    """Tensors by FLUX's names. The model's own width, for diffusers' converter knows no other; all else is narrow."""
    width = 3072
    keys: dict[str, tuple[int, ...]] = {}
    for name in ("x_embedder", "context_embedder", "proj_out"):
        keys |= layer(name, 4)
    for name in ("timestep", "text", "guidance"):
        keys |= layer(f"time_text_embed.{name}_embedder.linear_1", 4)
        keys |= layer(f"time_text_embed.{name}_embedder.linear_2", 4)
    keys |= layer("norm_out.linear", 8)
    for i in range(2):
        block = f"transformer_blocks.{i}"
        for name in ("norm1.linear", "norm1_context.linear", "ff.net.0.proj", "ff.net.2",
                     "ff_context.net.0.proj", "ff_context.net.2", "attn.to_out.0", "attn.to_add_out",
                     "attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj",
                     "attn.add_v_proj"):  # fmt: skip
            keys |= layer(f"{block}.{name}", 4)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            keys[f"{block}.attn.{name}.weight"] = (4,)
    for name in ("norm.linear", "proj_out"):
        keys |= layer(f"single_transformer_blocks.0.{name}", 4)
    for name in ("to_q", "to_k", "to_v"):
        keys |= layer(f"single_transformer_blocks.0.attn.{name}", width)
    keys |= layer("single_transformer_blocks.0.proj_mlp", 4 * width)
    keys["single_transformer_blocks.0.attn.norm_q.weight"] = (4,)
    keys["single_transformer_blocks.0.attn.norm_k.weight"] = (4,)
    return some(keys)


def layer(name: str, rows: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, 2), f"{name}.bias": (rows,)}


def z_image() -> State:
    from tests.families.z_image import _transformer

    return dict(_transformer().state_dict())


def wan() -> State:
    from tests.families.wan2_1 import _transformer

    return dict(_transformer().state_dict())


def wan_vae() -> State:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=2,
        temperal_downsample=[False, True, True],
    )  # fmt: skip
    return dict(vae.state_dict())


def unet() -> State:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8, 8), layers_per_block=2, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2, 2), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=4, transformer_layers_per_block=(1, 1, 2),
        projection_class_embeddings_input_dim=36, cross_attention_dim=20,
    )  # fmt: skip
    return dict(model.state_dict())


def kl_vae() -> State:
    from tests.families import parts

    return dict(
        parts.kl_vae(latent_channels=4, scaling=0.13025, shift=None, quant=True).state_dict()
    )


def convert_vae(state: State) -> State:
    config = {"down_block_types": [""] * 4, "up_block_types": [""] * 4}
    converted: State = diffusers_names.convert_ldm_vae_checkpoint(dict(state), config)
    return converted


def convert_unet(state: State) -> State:
    state = {f"model.diffusion_model.{key}": value for key, value in state.items()}
    config = {"layers_per_block": 2, "addition_embed_type": "text_time"}
    converted: State = diffusers_names.convert_ldm_unet_checkpoint(state, config)
    return converted


CASES = {
    "flux": (
        "flux", "dit", tiny_flux, native.flux,
        diffusers_names.convert_flux_transformer_checkpoint_to_diffusers,
    ),
    "z_image": (
        "z_image", "dit", z_image, native.z_image,
        diffusers_names.convert_z_image_transformer_checkpoint_to_diffusers,
    ),
    "wan": (
        "wan2_1", "dit", wan, native.wan, diffusers_names.convert_wan_transformer_to_diffusers,
    ),
    "wan_vae": (
        "wan2_1", "vae", wan_vae, native.wan_vae, diffusers_names.convert_wan_vae_to_diffusers,
    ),
    "qwen_vae": (
        "qwen_image", "vae", wan_vae, native.wan_vae, diffusers_names.convert_wan_vae_to_diffusers,
    ),
    "sdxl": ("sdxl", "dit", unet, lambda state: native.unet(state, layers=2), convert_unet),
    "kl_vae": ("flux", "vae", kl_vae, native.ldm_vae, convert_vae),
}  # fmt: skip
Case = tuple[str, str, Callable[[], State], Callable[[State], State], Callable[[State], State]]


@pytest.mark.parametrize("prefix", ["", "whole"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_names_and_values_are_those_of_diffusers(case: Case, prefix: str, tmp_path: Path) -> None:
    family, component, build, to_native, convert = case
    state = build()
    stored = to_native(state)
    assert stored.keys() != state.keys()
    prefix = (
        {"dit": "model.diffusion_model.", "vae": "first_stage_model."}[component] if prefix else ""
    )
    beside = {"other.weight": torch.zeros(2)} if prefix else {}
    file = tmp_path / "one.safetensors"
    save_file({prefix + k: v.contiguous() for k, v in stored.items()} | beside, file)
    found = read(file, family, component)
    assert_equal(found, state)
    assert_equal(found, convert(dict(stored)))


def test_a_part_is_a_range_of_the_files_bytes(tmp_path: Path) -> None:
    file = native.write(native.flux(tiny_flux()), tmp_path / "flux.safetensors")
    tensors = read_component(read_file_header(file), spec_of("flux")).tensors
    parts = [
        tensors[f"single_transformer_blocks.0.{name}.weight"]
        for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ]
    whole = read_file_header(file)["single_blocks.0.linear1.weight"]
    assert [part.key for part in parts] == ["single_blocks.0.linear1.weight"] * 4
    assert parts[0].start == whole.start
    for one, other in pairwise(parts):
        assert one.end == other.start
    assert parts[-1].end == whole.end


@pytest.mark.parametrize(
    "layout", ["plain", "comfyui", "comfyui_new", "musubi_channel", "musubi_block"]
)
def test_scales_go_with_the_parts(layout: str, tmp_path: Path) -> None:
    state = native.z_image({k: v for k, v in z_image().items() if "feed_forward" not in k})
    file = native.write(state, tmp_path / "z.safetensors", fp8=layout)
    published = read_component(read_file_header(file), spec_of("z_image"))
    assert published.problems == []
    raw = load_file(file)
    key = "layers.0.attention.qkv"
    name = next(
        (k for k in raw if k.startswith(f"{key}.") and "scale" in k and "input" not in k), None
    )
    codes = raw[f"{key}.weight"].view(torch.uint8)
    whole = None if name is None else raw[name].float()
    block = (1, 8) if layout == "musubi_block" else None
    if whole is not None and layout.startswith("comfyui"):
        whole = whole.reshape(1)
    elif whole is not None:
        whole = whole.reshape(96, -1) if block else whole.reshape(96)
    expected = dequantise(codes, whole, torch.float32, block).chunk(3)
    for part, (n, value) in enumerate(zip("qkv", expected, strict=True)):
        stored = published.tensors[f"layers.0.attention.to_{n}.weight"]
        scale = published.scales.get(f"layers.0.attention.to_{n}.weight")
        assert (scale is None) == (layout == "plain")
        values = next(iter(read_tensors([stored])))[1].clone()
        cut = None
        if scale is not None:
            [(_, cut)] = read_tensors(
                [read_file_header(file)[scale.key].cut_like(scale.shape, scale.excerpt)]
            )
            cut = cut.float().reshape((1,) if cut.numel() == 1 else (32, -1) if block else (32,))
            assert cut.numel() == 1 or torch.equal(cut.flatten(), whole.flatten().chunk(3)[part])  # type: ignore[union-attr]
        assert torch.equal(dequantise(values.view(torch.uint8), cut, torch.float32, block), value)


def test_block_scales_that_cross_a_parts_edge_are_refused(tmp_path: Path) -> None:
    state = {"layers.0.attention.qkv.weight": torch.ones(192, 256)}
    file = native.write(state, tmp_path / "z.safetensors", fp8="deepseek")
    problems = read_component(read_file_header(file), spec_of("z_image")).problems
    assert problems[0] == (
        "layers.0.attention.qkv.weight_scale_inv of shape [2, 2] can't be divided among the parts of "
        "layers.0.attention.qkv.weight"
    )


def test_the_second_clip_encoder_in_open_clips_names(tmp_path: Path) -> None:
    state = {
        "text_model.embeddings.token_embedding.weight": (10, 4),
        "text_model.embeddings.position_embedding.weight": (7, 4),
        "text_model.final_layer_norm.weight": (4,),
        "text_model.final_layer_norm.bias": (4,),
        "text_projection.weight": (6, 4),
    }
    block = "text_model.encoder.layers.0"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
                 "mlp.fc1", "mlp.fc2"):  # fmt: skip
        state |= {f"{block}.{name}.weight": (4, 4), f"{block}.{name}.bias": (4,)}
    for name in ("layer_norm1", "layer_norm2"):
        state |= {f"{block}.{name}.weight": (4,), f"{block}.{name}.bias": (4,)}
    tensors = some(state)
    prefix = "conditioner.embedders.1.model."
    file = native.write(native.open_clip(tensors), tmp_path / "sdxl.safetensors", prefix=prefix)
    assert_equal(read(file, "sdxl", "text_encoder_2"), tensors)


@pytest.mark.parametrize(
    ("family", "component", "prefix"),
    [
        ("flux", "text_encoder", "text_encoders.clip_l.transformer."),
        ("sdxl", "text_encoder", "conditioner.embedders.0.transformer."),
        ("flux", "text_encoder_2", "text_encoders.t5xxl.transformer."),
        ("wan2_1", "text_encoder", ""),
        ("z_image", "text_encoder", ""),
    ],
)
def test_text_encoders_need_no_new_names(
    family: str, component: str, prefix: str, tmp_path: Path
) -> None:
    t5 = "encoder.block.0.layer.0.SelfAttention.q.weight"
    clip = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    kept = {
        "t5": {t5: (4, 4), "shared.weight": (5, 4)},
        "umt5": {t5: (4, 4), "shared.weight": (5, 4)},
        "clip_text_model": {clip: (4, 4)},
        "qwen3": {"model.layers.0.self_attn.q_norm.weight": (4,)},
    }[spec_of(family, component).kind[1]]
    junk = {"spiece_model": torch.zeros(9, dtype=torch.uint8), "logit_scale": torch.ones(())}
    if "shared.weight" in kept:
        junk["encoder.embed_tokens.weight"] = torch.zeros(5, 4)
    if clip in kept:
        junk = {
            "logit_scale": torch.ones(()),
            "text_model.embeddings.position_ids": torch.arange(3),
            "text_projection.weight": torch.zeros(4, 4),
        }
    if spec_of(family, component).kind[1] == "qwen3":
        junk = {"lm_head.weight": torch.zeros(5, 4)}
    tensors = some(kept)
    file = native.write(tensors | junk, tmp_path / "te.safetensors", prefix=prefix)
    assert_equal(read(file, family, component), tensors)


def test_embeddings_by_their_other_name_alone_are_taken(tmp_path: Path) -> None:
    tensors = some(
        {
            "encoder.block.0.layer.0.SelfAttention.q.weight": (4, 4),
            "encoder.embed_tokens.weight": (5, 4),
        }
    )
    found = read(native.write(tensors, tmp_path / "t5.safetensors"), "flux", "text_encoder_2")
    assert torch.equal(found["shared.weight"], tensors["encoder.embed_tokens.weight"])


def test_a_fused_tensor_of_no_known_shape_is_a_problem(tmp_path: Path) -> None:
    state = {"layers.0.attention.qkv.weight": torch.zeros(7, 2)}
    file = native.write(state, tmp_path / "z.safetensors")
    [problem] = read_component(read_file_header(file), spec_of("z_image")).problems
    assert problem == "layers.0.attention.qkv.weight of shape [7, 2] can't be split into 3 parts"


def test_two_tensors_of_one_name_are_a_problem(tmp_path: Path) -> None:
    state = z_image()
    both = native.z_image(state) | {"layers.0.attention.to_out.0.weight": torch.zeros(2, 2)}
    file = native.write(both, tmp_path / "z.safetensors")
    [problem] = read_component(read_file_header(file), spec_of("z_image")).problems
    assert "are both layers.0.attention.to_out.0.weight" in problem


def headers(file: Path) -> ComponentHeaders:
    return ComponentHeaders(str(file.parent), None, read_file_header(file), file)


@pytest.mark.parametrize(
    ("keys", "family", "component", "message"),
    [
        (["double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight"], "z_image", "dit",
         r"(?s)one.safetensors: the weights for dit are not Z-Image's transformer.*Found: FLUX.1's transformer"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "sdxl", "dit",
         "Found: a UNet of Stable Diffusion 1 or 2"),
        (["lora_unet_x.lora_down.weight"], "flux", "dit", r"(?s)Found: a LoRA.*lora\.init_from"),
        (["a.weight"], "wan2_1", "dit", "nothing that is known here; its first tensor is a.weight"),
        (["blocks.0.self_attn.q.weight", "img_emb.proj.1.weight"], "wan2_1", "dit", "image-to-video"),
        (["encoder.downsamples.0.downsamples.0.residual.0.gamma", "decoder.middle.0.residual.0.gamma"],
         "wan2_2", "vae", "Wan 2.2's VAE in its authors' names"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight",
          "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"],
         "flux", "text_encoder_2", r"are not the T5 text encoder(?s:.*)Found: the UMT5 text encoder"),
        (["model.layers.0.self_attn.q_norm.weight", "model.layers.0.mlp.gate_proj.weight"],
         "qwen_image", "text_encoder", r"(?s)not the Qwen2.5-VL text encoder.*a Qwen3 text encoder"),
        (["first_stage_model.decoder.up.0.block.0.norm1.weight"], "sdxl", "dit",
         "Found: the VAE of SDXL, FLUX.1 or Z-Image"),
    ],
)  # fmt: skip
def test_another_models_file_is_told_what_it_is(
    keys: list[str], family: str, component: str, message: str, tmp_path: Path
) -> None:
    file = native.write({key: torch.zeros(2, 2) for key in keys}, tmp_path / "one.safetensors")
    with pytest.raises(SourceError, match=message):
        check_contents(headers(file), spec_of(family, component), component)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_file_of_the_family_is_recognised_in_either_naming(case: Case, tmp_path: Path) -> None:
    family, component, build, to_native, _ = case
    state = build()
    for name, tensors in (("a", state), ("b", to_native(state))):
        file = native.write(tensors, tmp_path / f"{name}.safetensors")
        check_contents(headers(file), spec_of(family, component), component)


def test_a_marker_must_agree_with_the_config(tmp_path: Path) -> None:
    keys = ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight", "__index_timestep_zero__")
    file = native.write({key: torch.zeros(2) for key in keys}, tmp_path / "edit_2511.safetensors")
    spec = spec_of("qwen_image_edit")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        SourceError,
        match=r"(?s)edit_2511\.safetensors: weights and config.*not zero_cond_t: true in",
    ):
        check_contents(headers(file), spec, "dit")
    (tmp_path / "config.json").write_text('{"zero_cond_t": true}')
    check_contents(headers(file), spec, "dit")
    assert "__index_timestep_zero__" not in read(file, "qwen_image_edit")


def test_every_kind_of_component_has_words_and_names() -> None:
    kinds = {part.kind[1] for family in FAMILIES.values() for part in family.components.values()}
    assert kinds <= {kind for content in CONTENTS for kind in content.kinds}
    assert kinds <= {kind for names in NAMES for kind in names.kinds}

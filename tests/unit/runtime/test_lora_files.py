"""LoRA files of every form, for every family: what programs read from them is what was trained."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from framework.errors import PlanError, SourceError
from framework.runtime.adapters import (
    LoraSettings,
    attach_lora_,
    is_adapter_name,
    layer_adapters,
    load_lora_,
    save_lora,
)
from framework.runtime.lora_files import named_as_here, read_lora
from framework.runtime.lora_fusing import LayerAdapter, fuse, split
from framework.runtime.lora_writing import write_lora
from framework.schema.lora_keys import FAMILY_NAMES, family_names, native_part
from tests.unit.runtime.comfyui_names import ComfyNames
from tests.unit.runtime.lora_models import build_denoiser, run_denoiser

PIPELINES = {
    "qwen_image": diffusers.QwenImagePipeline,
    "qwen_image_edit": diffusers.QwenImageEditPipeline,
    "flux": diffusers.FluxPipeline,
    "z_image": diffusers.ZImagePipeline,
    "wan2_1": diffusers.WanPipeline,
    "wan2_2": diffusers.WanPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
}
FAMILIES = sorted(FAMILY_NAMES)
FORMS = ("peft", "diffusers", "kohya", "comfyui")
DTYPES = {"atol": 2e-5, "rtol": 2e-5}
# diffusers cuts FLUX's fused single blocks at the published width alone.
WIDE_ONLY = {"flux": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}


def names_of(family: str) -> Any:
    return family_names(family, layers_per_block=1 if family == "sdxl" else None)


def layers_of(family: str, module: nn.Module, *, form: str = "kohya") -> list[str]:
    """Layers that every form has names for; of SDXL's many, one of each kind."""
    rules = names_of(family).components["dit"].rules
    found = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            part = native_part(name, rules)
            if part is not None and (part.rule.kohya or form != "kohya"):
                found.append(name)
    return found[::4] if family == "sdxl" else found


def adapted(family: str, base: nn.Module, layers: list[str], **settings: Any) -> nn.Module:
    """With a LoRA of which two layers have ranks of their own, stirred so that its effect is large."""
    module = copy.deepcopy(base)
    chosen = {"rank": 2, "alpha": 3.0, "use_rslora": False, "use_dora": False, **settings}
    attach_lora_(
        module,
        LoraSettings(dropout=0.0, layers=tuple(layers), ranks={layers[1]: 3}, **chosen),
        component="dit",
        seed=0,
        trains=False,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if is_adapter_name(name):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def pipeline_of(family: str, module: nn.Module) -> Any:
    """The family's pipeline of which only the denoiser is there."""
    kind = PIPELINES[family]
    parameters = inspect.signature(kind.__init__).parameters
    parts = {
        name: None if parameter.default is inspect.Parameter.empty else parameter.default
        for name, parameter in parameters.items()
        if name != "self"
    }
    return kind(**{**parts, "unet" if family == "sdxl" else "transformer": module})


def denoiser_of(family: str, pipeline: Any) -> Any:
    return pipeline.unet if family == "sdxl" else pipeline.transformer


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """diffusers warns of each component that a file has nothing for."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest) -> tuple[str, nn.Module, nn.Module, torch.Tensor]:
    """Family, its bare denoiser, one with an adapter, and what that one predicts."""
    family = request.param
    base = build_denoiser(family)
    ours = adapted(family, base, layers_of(family, base))
    wanted = run_denoiser(family, ours)
    assert (wanted - run_denoiser(family, base)).abs().max() > 0.05
    return family, base, ours, wanted


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_read_back(
    trained: tuple[str, nn.Module, nn.Module, torch.Tensor], tmp_path: Path, form: Any
) -> None:
    family, base, ours, wanted = trained
    path = tmp_path / ("lora" if form == "peft" else "lora.safetensors")
    save_lora(path, {"dit": ours}, form=form, family=family, scale_in_header=False)
    bare = copy.deepcopy(base)
    assert load_lora_(bare, path, "dit")
    torch.testing.assert_close(run_denoiser(family, bare), wanted, **DTYPES)
    before, after = layer_adapters(ours), layer_adapters(bare)
    assert {n: a.rank for n, a in before.items()} == {n: a.rank for n, a in after.items()}


def test_diffusers_reads_its_own_form(
    trained: tuple[str, nn.Module, nn.Module, torch.Tensor], tmp_path: Path
) -> None:
    family, base, ours, wanted = trained
    path = tmp_path / "lora.safetensors"
    save_lora(path, {"dit": ours}, family=family, scale_in_header=False)
    pipeline = pipeline_of(family, copy.deepcopy(base))
    pipeline.load_lora_weights(str(path))
    torch.testing.assert_close(
        run_denoiser(family, denoiser_of(family, pipeline)), wanted, **DTYPES
    )


@pytest.mark.parametrize("form", ["kohya", "comfyui"])
def test_diffusers_reads_the_forms_of_others(
    trained: tuple[str, nn.Module, nn.Module, torch.Tensor], tmp_path: Path, form: Any
) -> None:
    family, base, ours, wanted = trained
    if form == "kohya" and family == "flux":
        narrow = [
            name
            for name in layers_of(family, base)
            if not (name.startswith("single_") and name.endswith(WIDE_ONLY[family]))
        ]
        ours = adapted(family, base, narrow)
        wanted = run_denoiser(family, ours)
    path = tmp_path / "lora.safetensors"
    save_lora(path, {"dit": ours}, form=form, family=family)
    pipeline = pipeline_of(family, copy.deepcopy(base))
    pipeline.load_lora_weights(str(path))
    torch.testing.assert_close(
        run_denoiser(family, denoiser_of(family, pipeline)), wanted, **DTYPES
    )


def test_diffusers_cuts_the_fused_layers_of_flux_as_they_were(tmp_path: Path) -> None:
    """At the published width, which diffusers takes for granted; the module itself would be too large here."""
    generator = torch.Generator().manual_seed(0)
    block = "single_transformer_blocks.0"
    sizes = {"attn.to_q": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    layers = {
        f"{block}.{name}": LayerAdapter(
            torch.randn(rank, 3072, generator=generator),
            torch.randn(size, rank, generator=generator),
            1.5,
        )
        for (name, size), rank in zip(sizes.items(), (1, 2, 2), strict=True)
    }
    (path,) = write_lora(
        tmp_path / "lora.safetensors",
        {"dit": layers},
        form="kohya",
        names=family_names("flux"),
    )
    assert list(load_file(path)) == [
        f"lora_unet_single_blocks_0_linear1.{part}"
        for part in ("alpha", "lora_down.weight", "lora_up.weight")
    ]
    state = diffusers.FluxPipeline.lora_state_dict(path)
    for name, adapter in layers.items():
        a = state[f"transformer.{name}.lora_A.weight"]
        b = state[f"transformer.{name}.lora_B.weight"]
        torch.testing.assert_close((b @ a)[:50], adapter.delta()[:50], atol=1e-4, rtol=1e-4)
    assert not state[f"transformer.{block}.attn.to_k.lora_B.weight"].any()


def test_peft_reads_its_folder(
    trained: tuple[str, nn.Module, nn.Module, torch.Tensor], tmp_path: Path
) -> None:
    family, base, ours, wanted = trained
    (folder,) = save_lora(tmp_path / "lora", {"dit": ours}, form="peft", family=family)
    assert folder == tmp_path / "lora" / "transformer"
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    torch.testing.assert_close(run_denoiser(family, model.base_model.model), wanted, **DTYPES)


def test_comfyui_finds_a_weight_for_every_key(
    trained: tuple[str, nn.Module, nn.Module, torch.Tensor], tmp_path: Path
) -> None:
    """Its published rules applied to the file give each native weight what was trained."""
    family, base, ours, _ = trained
    path = tmp_path / "lora.safetensors"
    save_lora(path, {"dit": ours}, form="comfyui", family=family)
    comfy = ComfyNames(family, base, names_of(family).components["dit"].rules)
    found = comfy.deltas(load_file(path))
    wanted = comfy.wanted({n: a.delta() for n, a in layer_adapters(ours).items()})
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        torch.testing.assert_close(found[name], delta, **DTYPES)


def diffsynth_file(family: str, ours: nn.Module, path: Path, prefix: str) -> dict[str, Any]:
    """As DiffSynth-Studio saves a LoRA: peft's names inside the module, alpha equal to the rank, native names."""
    rules = names_of(family).components["dit"].rules
    is_native = family.startswith("wan")
    tensors = {}
    for name, adapter in layer_adapters(ours).items():
        part = native_part(name, rules)
        assert part is not None
        stem = f"{prefix}{part.name if is_native else name}"
        tensors[f"{stem}.lora_A.default.weight"] = adapter.down.clone()
        tensors[f"{stem}.lora_B.default.weight"] = adapter.folded().up.clone()
    save_file(tensors, path, metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("prefix", ["", "pipe.dit."])
def test_files_of_diffsynth_are_read(
    trained: tuple[str, nn.Module, nn.Module, torch.Tensor], tmp_path: Path, prefix: str
) -> None:
    family, base, ours, wanted = trained
    if prefix and family == "sdxl":
        prefix = "pipe.unet."
    path = tmp_path / "step-100.safetensors"
    diffsynth_file(family, ours, path, prefix)
    assert read_lora(path).form == "DiffSynth-Studio"
    bare = copy.deepcopy(base)
    assert load_lora_(bare, path, "dit")
    torch.testing.assert_close(run_denoiser(family, bare), wanted, **DTYPES)


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"use_dora": True}])
@pytest.mark.parametrize("family", ["flux", "sdxl", "wan2_1"])
def test_rslora_and_dora_keep_their_meaning(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    base = build_denoiser(family)
    ours = adapted(family, base, layers_of(family, base)[:12], alpha=5.0, **settings)
    wanted = run_denoiser(family, ours)
    forms = ("diffusers", "peft") if "use_dora" in settings else FORMS
    for form in forms:
        path = tmp_path / form
        written = save_lora(path, {"dit": ours}, form=form, family=family, scale_in_header=False)
        bare = copy.deepcopy(base)
        assert load_lora_(bare, path, "dit")
        torch.testing.assert_close(run_denoiser(family, bare), wanted, **DTYPES)
        if form == "diffusers":
            pipeline = pipeline_of(family, copy.deepcopy(base))
            pipeline.load_lora_weights(str(written[0]))
            theirs = run_denoiser(family, denoiser_of(family, pipeline))
            torch.testing.assert_close(theirs, wanted, **DTYPES)


def test_what_a_form_can_not_carry_is_refused_with_the_reason(tmp_path: Path) -> None:
    base = build_denoiser("flux")
    dora = adapted("flux", base, layers_of("flux", base)[:3], use_dora=True)
    for form, reason in (("kohya", "has no DoRA"), ("comfyui", "compute DoRA differently")):
        with pytest.raises(PlanError, match=reason):
            save_lora(tmp_path / "a.safetensors", {"dit": dora}, form=form, family="flux")  # type: ignore[arg-type]
    outside = adapted("flux", base, ["x_embedder", "context_embedder"])
    with pytest.raises(PlanError, match=r"(?s)dit.context_embedder.*diffusers loses"):
        save_lora(tmp_path / "a.safetensors", {"dit": outside}, form="kohya", family="flux")
    save_lora(tmp_path / "b.safetensors", {"dit": outside}, form="comfyui", family="flux")
    norm = adapted("flux", base, ["norm_out.linear", "proj_out"])
    with pytest.raises(PlanError, match="no other program"):
        save_lora(tmp_path / "a.safetensors", {"vae": norm}, form="kohya", family="flux")
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]


def test_the_swapped_layer_of_flux_comes_back_from_native_names(tmp_path: Path) -> None:
    """BFL keeps shift before scale in the last modulation; so do files that are trained on its code."""
    base = build_denoiser("flux")
    ours = adapted("flux", base, ["norm_out.linear", "proj_out"])
    norm = layer_adapters(ours)["norm_out.linear"]
    half = norm.up.shape[0] // 2
    path = tmp_path / "lora.safetensors"
    stem = "diffusion_model.final_layer.adaLN_modulation.1"
    save_file(
        {
            f"{stem}.lora_A.weight": norm.down,
            f"{stem}.lora_B.weight": torch.cat([norm.up[half:], norm.up[:half]]),
            f"{stem}.alpha": torch.tensor(3.0),
        },
        path,
    )
    found = read_lora(path).adapters["dit"]["norm_out.linear"]
    torch.testing.assert_close(found.delta(), norm.delta())


def test_the_second_expert_has_a_file_of_its_own(tmp_path: Path) -> None:
    base = build_denoiser("wan2_2")
    layers = layers_of("wan2_2", base)
    high, low = (adapted("wan2_2", base, layers, alpha=alpha) for alpha in (2.0, 5.0))
    path = tmp_path / "lora.safetensors"
    for form in ("diffusers", "kohya", "comfyui"):
        written = save_lora(
            path, {"dit": high, "dit_2": low}, form=form, family="wan2_2", scale_in_header=False
        )
        assert [file.name for file in written] == [
            "lora.safetensors",
            "lora_low_noise.safetensors",
        ]
        found = read_lora(tmp_path).adapters
        for component, module in (("dit", high), ("dit_2", low)):
            for name, adapter in layer_adapters(module).items():
                torch.testing.assert_close(found[component][name].delta(), adapter.delta())
    pipeline = pipeline_of("wan2_2", copy.deepcopy(base))
    pipeline.register_modules(transformer_2=copy.deepcopy(base))
    save_lora(path, {"dit_2": low}, family="wan2_2", scale_in_header=False)
    pipeline.load_lora_weights(
        str(tmp_path / "lora_low_noise.safetensors"), load_into_transformer_2=True
    )
    torch.testing.assert_close(
        run_denoiser("wan2_2", pipeline.transformer_2), run_denoiser("wan2_2", low), **DTYPES
    )


def test_text_encoders_are_called_as_each_program_calls_them(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2,
        vocab_size=32, max_position_embeddings=8, projection_dim=8,
    )  # fmt: skip
    first, second = CLIPTextModel(config).eval(), CLIPTextModelWithProjection(config).eval()
    parts = {}
    bare = {"text_encoder": copy.deepcopy(first), "text_encoder_2": copy.deepcopy(second)}
    for name, module in (("text_encoder", first), ("text_encoder_2", second)):
        layers = [n for n, _ in module.named_modules() if n.endswith(("_proj", "mlp.fc1"))]
        parts[name] = adapted("sdxl", module, layers)
    ids = torch.tensor([[0, 5, 6, 31]])
    for form, key in (
        ("kohya", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.alpha"),
        ("comfyui", "lora_te2_text_model_encoder_layers_1_mlp_fc1.lora_up.weight"),
        ("diffusers", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"),
    ):
        path = tmp_path / f"{form}.safetensors"
        save_lora(path, parts, form=form, family="sdxl", scale_in_header=False)
        assert key in load_file(path)
        for name, module in parts.items():
            again = copy.deepcopy(bare[name])
            assert load_lora_(again, path, name)
            with torch.no_grad():
                wanted, got = module(ids)[0], again(ids)[0]
            torch.testing.assert_close(got, wanted, **DTYPES)
        pipeline = pipeline_of("sdxl", build_denoiser("sdxl"))
        pipeline.register_modules(**copy.deepcopy(bare))
        pipeline.load_lora_weights(str(path))
        with torch.no_grad():
            wanted, got = first(ids)[0], pipeline.text_encoder(ids)[0]
            assert not torch.allclose(wanted, got)
            torch.testing.assert_close(got, parts["text_encoder"](ids)[0], **DTYPES)
            torch.testing.assert_close(
                pipeline.text_encoder_2(ids)[0], parts["text_encoder_2"](ids)[0], **DTYPES
            )


@pytest.mark.parametrize(
    ("family", "component", "layer", "stem"),
    [
        ("qwen_image", "text_encoder", "layers.0.self_attn.q_proj",
         "text_encoders.qwen25_7b.transformer.model.layers.0.self_attn.q_proj"),
        ("qwen_image_edit", "text_encoder", "language_model.layers.0.mlp.up_proj",
         "text_encoders.qwen25_7b.transformer.model.layers.0.mlp.up_proj"),
        ("z_image", "text_encoder", "layers.3.self_attn.o_proj",
         "text_encoders.qwen3_4b.transformer.model.layers.3.self_attn.o_proj"),
        ("wan2_1", "text_encoder", "encoder.block.0.layer.0.SelfAttention.q",
         "text_encoders.umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"),
        ("flux", "text_encoder", "encoder.layers.1.self_attn.q_proj",
         "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"),
        ("flux", "text_encoder_2", "encoder.block.1.layer.1.DenseReluDense.wo",
         "text_encoders.t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wo"),
    ],
)  # fmt: skip
def test_comfyui_knows_text_encoders_by_the_names_of_its_wrappers(
    family: str, component: str, layer: str, stem: str, tmp_path: Path
) -> None:
    path = tmp_path / "lora.safetensors"
    one = adapter(2, 4, seed=0, scale=0.5)
    write_lora(path, {component: {layer: one}}, form="comfyui", names=family_names(family))
    tensors = load_file(path)
    assert sorted(tensors) == [f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"]
    (found,) = read_lora(path, families=(family,)).adapters[component].items()
    # The decoder inside a vision-language model and the one alone have the same name there.
    assert layer.endswith(found[0])
    torch.testing.assert_close(found[1].delta(), one.delta())
    here = {layer, "visual.blocks.0.attn.proj"}
    assert list(named_as_here(dict([found]), here)) == [layer]


def test_kohya_files_say_what_its_programs_ask_for(tmp_path: Path) -> None:
    base = build_denoiser("sdxl")
    ours = adapted("sdxl", base, layers_of("sdxl", base))
    path = tmp_path / "lora.safetensors"
    save_lora(path, {"dit": ours}, form="kohya", metadata={"base_model": "a/b", "steps": "7"})
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
        alphas = {float(file.get_tensor(k)) for k in file.keys() if k.endswith(".alpha")}  # noqa: SIM118
    assert alphas == {3.0}  # one for all, though ranks differ
    assert said["ss_network_module"] == "networks.lora"
    assert said["ss_base_model_version"] == "sdxl_base_v1-0"
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (said["base_model"], said["steps"], said["octavo.format"]) == ("a/b", "7", "kohya")
    assert "lora_adapter_metadata" not in said


def test_lycoris_dora_is_read_over_its_outputs(tmp_path: Path) -> None:
    stem = "lora_unet_transformer_blocks_0_attn_to_q"
    tensors = {
        f"{stem}.lora_down.weight": torch.ones(2, 6),
        f"{stem}.lora_up.weight": torch.ones(4, 2),
        f"{stem}.alpha": torch.tensor(1.0),
        f"{stem}.dora_scale": torch.arange(4.0)[:, None],
    }
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    adapter = read_lora(path, families=("qwen_image",)).adapters["dit"][
        "transformer_blocks.0.attn.to_q"
    ]
    assert adapter.scale == 0.5
    assert adapter.magnitude is not None
    assert adapter.magnitude.tolist() == [0, 1, 2, 3]
    save_file({**tensors, f"{stem}.dora_scale": torch.ones(1, 6)}, path)
    with pytest.raises(SourceError, match="isn't over its outputs"):
        read_lora(path, families=("qwen_image",))


def test_unknown_names_are_told_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    stem = "lora_unet_double_blocks_0_img_atn_qkv"
    save_file(
        {f"{stem}.lora_down.weight": torch.ones(2, 6), f"{stem}.lora_up.weight": torch.ones(6, 2)},
        path,
    )
    with pytest.raises(
        SourceError, match=r"(?s)1 of 1 layers.*img_atn_qkv.*lora_unet_double_blocks_#_img_attn_qkv"
    ):
        read_lora(path, families=("flux",))


def test_a_folder_without_a_lora_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(SourceError, match=r"(?s)holds no LoRA.*notes\.txt"):
        read_lora(tmp_path)


def test_the_attached_scale_takes_the_files_up(tmp_path: Path) -> None:
    """A file of alpha 3 and an adapter of alpha 8: what is loaded does what the file did."""
    base = build_denoiser("wan2_1")
    layers = layers_of("wan2_1", base)
    ours = adapted("wan2_1", base, layers)
    path = tmp_path / "lora.safetensors"
    save_lora(path, {"dit": ours}, form="kohya")
    other = adapted("wan2_1", base, layers, alpha=8.0)
    assert load_lora_(other, path, "dit")
    torch.testing.assert_close(
        run_denoiser("wan2_1", other), run_denoiser("wan2_1", ours), **DTYPES
    )


def adapter(rank: int, outputs: int, *, seed: int, scale: float = 1.0) -> LayerAdapter:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, 5, generator=generator)
    return LayerAdapter(down, torch.randn(outputs, rank, generator=generator), scale)


def test_fusing_and_splitting_are_inverse() -> None:
    parts = [adapter(1, 4, seed=0), None, adapter(2, 4, seed=1, scale=0.3), adapter(2, 16, seed=2)]
    whole = fuse(parts, (1, 1, 1, 4))
    assert whole.rank == 8
    rows = torch.cat([p.delta() if p else torch.zeros(4, 5) for p in parts])
    torch.testing.assert_close(whole.delta(), rows)
    back = split(whole, (1, 1, 1, 4))
    assert [part.rank if part else None for part in back] == [1, None, 2, 2]
    for before, after in zip(parts, back, strict=True):
        if before is not None:
            assert after is not None
            torch.testing.assert_close(after.delta(), before.delta())


def test_a_fused_layer_that_was_trained_as_one_keeps_its_rank_in_every_part() -> None:
    whole = replace(adapter(3, 12, seed=4), magnitude=torch.arange(12.0))
    parts = split(whole, (1, 1, 1))
    assert all(part is not None and part.rank == 3 for part in parts)
    torch.testing.assert_close(torch.cat([p.delta() for p in parts if p]), whole.delta())
    assert torch.cat([p.magnitude for p in parts if p and p.magnitude is not None]).tolist() == [
        float(i) for i in range(12)
    ]
    with pytest.raises(ValueError, match="can't be cut as 1:1:1:4"):
        split(whole, (1, 1, 1, 4))


def test_merging_gives_rows_the_lengths_of_dora() -> None:
    """arXiv:2402.09353, equation 5, against float64."""
    one = replace(adapter(2, 4, seed=5, scale=0.7), magnitude=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(6))
    direction = weight.double() + 0.7 * one.up.double() @ one.down.double()
    lengths = torch.tensor([math.sqrt(float((row**2).sum())) for row in direction])
    assert one.magnitude is not None
    wanted = direction * (one.magnitude / lengths)[:, None]
    torch.testing.assert_close(one.merged(weight), wanted.float())


def test_settings_with_patterns_give_each_layer_its_scale(tmp_path: Path) -> None:
    """As diffusers and peft write what was trained with several ranks."""
    tensors = {
        f"transformer.transformer_blocks.{i}.attn.to_q.{part}": torch.ones(*shape)
        for i, rank in ((0, 2), (1, 4))
        for part, shape in (("lora_A.weight", (rank, 6)), ("lora_B.weight", (6, rank)))
    }
    settings = {
        "transformer.r": 2,
        "transformer.lora_alpha": 6,
        "transformer.alpha_pattern": {"transformer_blocks.1.attn.to_q": 2},
        "transformer.rank_pattern": {"transformer_blocks.1.attn.to_q": 4},
    }
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(settings)})
    found = read_lora(path).adapters["dit"]
    assert [a.scale for a in found.values()] == [3.0, 0.5]

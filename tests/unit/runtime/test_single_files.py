"""Components from single files: planned, loaded and written as those of a published folder are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from framework.errors import ConfigError, OctavoError, PlanError, SourceError
from framework.models import get_family
from framework.models.published_layout import save_component
from framework.plan.build import build_inference_plan
from framework.plan.types import ComponentPlan
from framework.runtime.encoding_error import SourceWeights
from framework.runtime.load import load_component
from framework.schema import ModelConfig
from framework.schema.families import FAMILIES
from tests import native
from tests.published import load_state

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.families.flux import build_checkpoint

    return build_checkpoint(tmp_path_factory.mktemp("flux") / "tiny-flux")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.families.sdxl import build_checkpoint

    return build_checkpoint(tmp_path_factory.mktemp("sdxl") / "tiny-sdxl")


def plan_of(family: str, base: Path, component: str = "dit", **settings: Any) -> ComponentPlan:
    model = {name: settings.pop(name) for name in ("variant",) if name in settings}
    config = ModelConfig.model_validate(
        {"family": family, "source": str(base), component: settings, **model}
    )
    return build_inference_plan(config, device="cpu").component(component)


def load(family: str, part: ComponentPlan) -> nn.Module:
    return load_component(part, get_family(family), device=CPU, compute_dtype=torch.float32)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    first: dict[str, Tensor] = one.state_dict()
    second: dict[str, Tensor] = other.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def native_flux(flux: Path, file: Path, **options: str) -> Path:
    return native.write(native.flux(load_state(flux / "transformer")), file, **options)


@pytest.mark.parametrize(
    "settings", [{}, {"precision": "fp8", "fp8": {"keep_high_precision": []}}], ids=["bf16", "fp8"]
)
def test_a_native_file_loads_as_the_folder_does(
    flux: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    file = native_flux(flux, tmp_path / "flux.safetensors", prefix="model.diffusion_model.")
    part = plan_of("flux", flux, source=str(file), **settings)
    assert part.folder == str(flux / "transformer")
    assert part.commit is None
    assert part.source_files(Path(part.folder)) == (file,)
    folder = plan_of("flux", flux, **settings)
    assert part.numel == folder.numel
    assert_same(load("flux", part), load("flux", folder))


def test_a_native_file_rests_on_disk(flux: Path, tmp_path: Path) -> None:
    file = native_flux(flux, tmp_path / "flux.safetensors")
    config = {"source": str(file), "precision": "fp8", "offload": "disk"}
    model = ModelConfig.model_validate(
        {"family": "flux", "source": str(flux), "dit": config, "converted_dir": str(tmp_path / "c")}
    )
    part = build_inference_plan(model, device="cpu").component("dit")
    module = load("flux", part)
    [converted] = (tmp_path / "c").glob("*.safetensors")
    written = load_file(converted)
    names = {f"single_transformer_blocks.0.attn.to_{n}.weight" for n in "qkv"}
    assert names <= set(written)
    plain = load("flux", plan_of("flux", flux, precision="fp8"))
    name = "single_transformer_blocks.0.attn.to_k"
    x = torch.randn(3, 32)
    with torch.no_grad():
        assert torch.equal(module.get_submodule(name)(x), plain.get_submodule(name)(x))


@pytest.mark.parametrize("offload", ["none", "host", "disk"])
@pytest.mark.parametrize("layout", ["comfyui", "musubi_channel"])
def test_scaled_codes_of_fused_layers_stay_as_they_are(
    flux: Path, tmp_path: Path, layout: str, offload: str
) -> None:
    file = native_flux(flux, tmp_path / "flux.safetensors", fp8=layout)
    model = ModelConfig.model_validate(
        {
            "family": "flux",
            "source": str(flux),
            "converted_dir": str(tmp_path / "converted"),
            "dit": {"source": str(file), "precision": "fp8", "offload": offload},
        }
    )
    module = load("flux", build_inference_plan(model, device="cpu").component("dit"))
    decoded = load("flux", plan_of("flux", flux, source=str(file)))
    x = torch.randn(3, 32)
    for name in ("attn.to_q", "attn.to_v", "proj_mlp"):
        layer = f"single_transformer_blocks.1.{name}"
        with torch.no_grad():
            found = module.get_submodule(layer)(x)
            expected = decoded.get_submodule(layer).float()(x)
        # Scales are rounded to bf16 where they are multiplied into the weight.
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_the_error_of_parts_can_be_measured(flux: Path, tmp_path: Path) -> None:
    file = native_flux(flux, tmp_path / "flux.safetensors")
    source = SourceWeights(plan_of("flux", flux, source=str(file), precision="fp8"))
    published = load_state(flux / "transformer")
    for layer, weight in source.read_all(CPU):
        assert torch.equal(weight, published[f"{layer}.weight"]), layer


def whole_sdxl(sdxl: Path, file: Path) -> Path:
    """A checkpoint of all four parts in one file, as sd_xl_base_1.0.safetensors."""
    layers = json.loads((sdxl / "unet" / "config.json").read_text())["layers_per_block"]
    parts = {
        "model.diffusion_model.": native.unet(load_state(sdxl / "unet"), layers=layers),
        "first_stage_model.": native.ldm_vae(load_state(sdxl / "vae")),
        "conditioner.embedders.0.transformer.": load_state(sdxl / "text_encoder"),
        "conditioner.embedders.1.model.": native.open_clip(load_state(sdxl / "text_encoder_2")),
    }
    state = {prefix + key: value for prefix, part in parts.items() for key, value in part.items()}
    return native.write(state, file)


@pytest.mark.parametrize("component", ["dit", "vae", "text_encoder", "text_encoder_2"])
def test_every_part_of_a_whole_checkpoint(sdxl: Path, tmp_path: Path, component: str) -> None:
    file = whole_sdxl(sdxl, tmp_path / "sd_xl_base_1.0.safetensors")
    part = plan_of("sdxl", sdxl, component, source=str(file))
    assert_same(load("sdxl", part), load("sdxl", plan_of("sdxl", sdxl, component)))


def test_a_whole_checkpoint_beside_its_configs_is_a_source_itself(
    sdxl: Path, tmp_path: Path
) -> None:
    shutil.copytree(sdxl, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors*"))
    file = whole_sdxl(sdxl, tmp_path / "m" / "sd_xl_base_1.0.safetensors")
    part = plan_of("sdxl", file, "text_encoder_2")
    assert part.folder == str(tmp_path / "m" / "text_encoder_2")
    assert_same(load("sdxl", part), load("sdxl", plan_of("sdxl", sdxl, "text_encoder_2")))


def test_what_is_trained_is_written_in_the_published_layout(flux: Path, tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    file = native_flux(flux, tmp_path / "flux.safetensors")
    part = plan_of("flux", flux, source=str(file))
    module = load("flux", part)
    folder = Path(part.folder)
    save_component(
        FAMILIES["flux"].components["dit"],
        module,
        tmp_path / "out",
        source_folder=folder,
        source_files=part.source_files(folder),
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    assert_same(loaded, FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16))


def as_variant(folder: Path, target: Path, *, keep_plain: bool = False) -> Path:
    """A copy of a checkpoint whose denoiser is published as fp16, sharded as it was."""
    shutil.copytree(folder, target)
    transformer = target / "transformer"
    for path in sorted(transformer.glob("*.safetensors")):
        name = path.name.replace("diffusion_pytorch_model", "diffusion_pytorch_model.fp16")
        shutil.copyfile(path, path.with_name(name))
        if not keep_plain:
            path.unlink()
    [index] = transformer.glob("*.index.json")
    content = json.loads(index.read_text())
    content["weight_map"] = {
        key: name.replace("diffusion_pytorch_model", "diffusion_pytorch_model.fp16")
        for key, name in content["weight_map"].items()
    }
    (transformer / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(
        json.dumps(content)
    )
    if not keep_plain:
        index.unlink()
    return target


def test_a_variant_is_loaded_and_written_without_its_name(flux: Path, tmp_path: Path) -> None:
    source = as_variant(flux, tmp_path / "m", keep_plain=True)
    part = plan_of("flux", source, variant="fp16")
    files = part.source_files(Path(part.folder))
    assert len(files) > 1
    assert all(".fp16-" in file.name for file in files)
    assert not any(".fp16" in t.file for g in plan_of("flux", source).groups for t in g.tensors)
    module = load("flux", part)
    save_component(
        FAMILIES["flux"].components["dit"], module, tmp_path / "out",
        source_folder=Path(part.folder), source_files=files,
    )  # fmt: skip
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not any("fp16" in name for name in names)
    assert "diffusion_pytorch_model.safetensors.index.json" in names
    assert_same(module, load("flux", plan_of("flux", flux)))
    written = load_state(tmp_path / "out")
    assert written.keys() == load_state(flux / "transformer").keys()


def test_variants_that_are_there_are_named(flux: Path, tmp_path: Path) -> None:
    source = as_variant(flux, tmp_path / "m")
    with pytest.raises(
        SourceError,
        match=r"(?s)no weights without a variant.*variants: fp16.*set model.variant=fp16",
    ):
        plan_of("flux", source)
    with pytest.raises(SourceError, match=r'(?s)no variant "bf16".*variants: fp16'):
        plan_of("flux", source, variant="bf16")
    with pytest.raises(
        ConfigError, match=r"model\.variant.*no component was published in a variant"
    ):
        plan_of("flux", flux, variant="fp16")


def test_faults_of_single_files_name_file_and_tensor(
    flux: Path, sdxl: Path, tmp_path: Path
) -> None:
    file = native_flux(flux, tmp_path / "flux.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-50])
    pickle = tmp_path / "flux.ckpt"
    pickle.write_bytes(b"")
    gguf = tmp_path / "flux.gguf"
    gguf.write_bytes(b"GGUF")
    for source, message in (
        (cut, r"(?s)cut\.safetensors: the weight file is cut short.*but \S+ ends at"),
        (pickle, r"(?s)flux\.ckpt: pickled weights.*weights_only=True.*save_file"),
        (gguf, r"(?s)flux\.gguf: the model file isn't a safetensors file"),
        (
            tmp_path / "fluxx.safetensors",
            r"(?s)model file .* does not exist.*nearest files in .*flux\.safetensors",
        ),
    ):
        with pytest.raises(OctavoError, match=message):
            plan_of("flux", flux, source=str(source))
    with pytest.raises(
        SourceError,
        match=r"(?s)flux\.safetensors: the weights for dit are not SDXL's UNet.*FLUX\.1's",
    ):
        plan_of("sdxl", sdxl, source=str(file))
    with pytest.raises(
        SourceError,
        match=r"(?s)no folder with configs for the weights in flux\.safetensors.*model\.dit\.source",
    ):
        plan_of("flux", file)


def test_shapes_that_do_not_fit_the_config_name_the_file(flux: Path, tmp_path: Path) -> None:
    state = native.flux(load_state(flux / "transformer"))
    state["img_in.weight"] = torch.zeros(32, 128, dtype=torch.bfloat16)
    file = native.write(state, tmp_path / "fill.safetensors")
    with pytest.raises(
        PlanError,
        match=r"(?s)fill\.safetensors with .*x_embedder\.weight is \[32, 128\]",
    ):
        load("flux", plan_of("flux", flux, source=str(file)))


def test_parts_are_fetched_from_a_native_file_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.families.z_image import build_checkpoint

    monkeypatch.chdir(tmp_path)
    base = build_checkpoint(tmp_path / "tiny-z-image")
    state = load_state(base / "transformer")
    file = native.write(native.z_image(state), tmp_path / "z.safetensors")
    module = load("z_image", plan_of("z_image", base, source=str(file), offload="disk"))
    assert not (tmp_path / ".octavo").exists()  # bf16 rests as it is, so nothing is converted
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    for name in ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"):
        layer = f"layers.1.{name}"
        with torch.no_grad():
            found = module.get_submodule(layer)(x)
        assert torch.equal(found, x @ state[f"{layer}.weight"].t()), layer

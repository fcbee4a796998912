"""LoRA files: written for diffusers, read back, refused where they don't fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import QwenImagePipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from framework.errors import SourceError
from framework.models import get_family
from framework.plan.build import build_run_plan
from framework.runtime.adapters import load_lora_, lora_state_dict, save_lora
from framework.runtime.load import adapter_parameters, load_component
from framework.schema import RunConfig


def load(source: Path, component: str = "dit", *, seed: int = 0, **lora: object) -> nn.Module:
    """A component in FP8 with an adapter; without `rank`, bare and frozen."""
    settings = {"trainable": "lora", "precision": "fp8", "lora": lora} if lora else {}
    other = "text_encoder" if component == "dit" else "dit"
    model = {
        "family": "qwen_image",
        "source": str(source),
        component: settings,
        other: {} if lora else {"trainable": "lora"},
    }
    config = RunConfig.model_validate(
        {"model": model, "data": {"path": "p", "cache": False}, "run": {"name": "t"}}
    )
    part = build_run_plan(config, device="cpu").component(component)
    return load_component(
        part,
        get_family("qwen_image"),
        device=torch.device("cpu"),
        compute_dtype=torch.bfloat16,
        seed=seed,
    )


def stir_(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(module).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


@pytest.fixture
def trained(tiny_checkpoint: Path) -> nn.Module:
    return stir_(load(tiny_checkpoint, rank=3, alpha=6.0))


def test_state_has_pefts_names(trained: nn.Module) -> None:
    state = lora_state_dict(trained)
    assert len(state) == 32
    assert "transformer_blocks.0.attn.to_out.0.lora_A.weight" in state
    assert all(value.dtype == torch.float32 for value in state.values())
    assert lora_state_dict(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize(
    "settings",
    [{"rank": 3, "alpha": 6.0}, {"rank": 2, "use_rslora": True}, {"rank": 2, "use_dora": True}],
)
def test_diffusers_loads_the_file(
    tiny_checkpoint: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    ours = stir_(load(tiny_checkpoint, **settings))
    file = tmp_path / "lora.safetensors"
    save_lora(file, {"dit": ours})
    pipeline = QwenImagePipeline.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    pipeline.load_lora_weights(str(file), adapter_name="default")
    theirs = pipeline.transformer
    wanted = adapter_parameters(ours)
    got = adapter_parameters(theirs)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    name = "transformer_blocks.0.attn.to_q"
    assert theirs.get_submodule(name).scaling == ours.get_submodule(name).scaling


def test_file_carries_settings_and_metadata(trained: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "new" / "lora.safetensors"
    save_lora(file, {"dit": trained, "vae": nn.Linear(2, 2)}, metadata={"octavo.run": "a/001"})
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        keys = set(opened.keys())
    assert all(key.startswith("transformer.") for key in keys)
    assert metadata["octavo.run"] == "a/001"
    settings = json.loads(metadata["lora_adapter_metadata"])
    assert settings["transformer.r"] == 3
    assert settings["transformer.lora_alpha"] == 6.0
    assert len(settings["transformer.target_modules"]) == 16
    assert [path.name for path in file.parent.iterdir()] == ["lora.safetensors"]


def test_a_failed_write_leaves_the_old_file(
    trained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lora.safetensors"
    save_lora(file, {"dit": trained})
    before = file.read_bytes()

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("framework.runtime.lora_writing.save_file", broken)
    with pytest.raises(OSError, match="No space left"):
        save_lora(file, {"dit": trained})
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no component carries an adapter"):
        save_lora(tmp_path / "lora.safetensors", {"dit": nn.Linear(2, 2)})


@pytest.mark.parametrize(
    "settings",
    [{"rank": 3}, {"rank": 2, "use_dora": True}, {"rank": 2, "target_modules": ["attn.to_q"]}],
)
@pytest.mark.parametrize("component", ["dit", "text_encoder"])
def test_round_trip_into_an_attached_and_into_a_bare_module(
    tiny_checkpoint: Path, tmp_path: Path, component: str, settings: dict[str, object]
) -> None:
    if component == "text_encoder" and "target_modules" in settings:
        settings = {**settings, "target_modules": ["self_attn.q_proj"]}
    source = stir_(load(tiny_checkpoint, component, **settings))
    file = tmp_path / "lora.safetensors"
    save_lora(file, {component: source})
    wanted = adapter_parameters(source)
    attached = load(tiny_checkpoint, component, seed=9, **settings)
    bare = load(tiny_checkpoint, component)
    for module in (attached, bare):
        assert load_lora_(module, file, component)
        got = adapter_parameters(module)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert all(p.requires_grad for p in adapter_parameters(attached).values())
    assert not any(p.requires_grad for p in bare.parameters())


def test_two_components_in_one_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    parts = {c: stir_(load(tiny_checkpoint, c, rank=2)) for c in ("dit", "text_encoder")}
    file = tmp_path / "lora.safetensors"
    save_lora(file, parts)
    for component, wanted in parts.items():
        bare = load(tiny_checkpoint, component)
        assert load_lora_(bare, file, component)
        got = adapter_parameters(bare)
        assert all(torch.equal(got[n], p) for n, p in adapter_parameters(wanted).items())


def test_a_file_for_another_component_changes_nothing(
    trained: nn.Module, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "lora.safetensors"
    save_lora(file, {"dit": trained})
    text = load(tiny_checkpoint, "text_encoder")
    assert load_lora_(text, file, "text_encoder") is False
    assert adapter_parameters(text) == {}


def test_init_from_starts_where_the_file_ended(
    trained: nn.Module, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "lora.safetensors"
    save_lora(file, {"dit": trained})
    module = load(tiny_checkpoint, rank=3, alpha=6.0, init_from=str(file))
    got = adapter_parameters(module)
    assert all(torch.equal(got[n], p) for n, p in adapter_parameters(trained).items())
    assert all(p.requires_grad for p in got.values())


def test_init_from_must_fit(trained: nn.Module, tiny_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    save_lora(file, {"dit": trained})
    with pytest.raises(
        SourceError,
        match=r"(?s)doesn't fit the adapter.*lora_A\.weight is \[3, 48\] in the file, \[2, 48\]",
    ):
        load(tiny_checkpoint, rank=2, init_from=str(file))
    with pytest.raises(SourceError, match=r"(?s)doesn't fit.*is only in the file"):
        load(tiny_checkpoint, rank=3, target_modules=["attn.to_q"], init_from=str(file))
    with pytest.raises(
        SourceError, match=r"(?s)doesn't fit.*lora_magnitude_vector is not in the file"
    ):
        load(tiny_checkpoint, rank=3, use_dora=True, init_from=str(file))
    text = {"rank": 2, "init_from": str(file)}
    with pytest.raises(SourceError, match=r"no adapter for text_encoder"):
        load(tiny_checkpoint, "text_encoder", **text)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_a.weight": torch.zeros(2, 2)}, "isn't a LoRA in diffusers' form"),
        ({"lora_unet_a.hada_w1_a": torch.zeros(2, 2)}, "the file holds LoHa, not LoRA"),
        ({"lora_unet_a.lora_down.weight": torch.zeros(2, 2)}, "both matrices of 1 of 1 layers"),
        (
            {
                "transformer.no.such.lora_A.weight": torch.zeros(2, 4),
                "transformer.no.such.lora_B.weight": torch.zeros(4, 2),
            },
            "1 layers of the LoRA don't exist",
        ),
        (
            {
                "transformer.img_in.lora_A.weight": torch.zeros(2, 64),
                "transformer.img_in.lora_B.weight": torch.zeros(48, 3),
            },
            "different ranks",
        ),
        (
            {
                "transformer.img_in.lora_A.weight": torch.zeros(2, 60),
                "transformer.img_in.lora_B.weight": torch.zeros(48, 2),
            },
            "doesn't fit the adapter",
        ),
    ],
)  # fmt: skip
def test_foreign_files_are_refused(
    tiny_checkpoint: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    with pytest.raises(SourceError, match=message):
        load_lora_(load(tiny_checkpoint), file, "dit")


def test_files_that_can_not_be_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    module = load(tiny_checkpoint)
    with pytest.raises(SourceError, match="can't be read"):
        load_lora_(module, tmp_path / "missing.safetensors", "dit")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(SourceError, match="can't be read"):
        load_lora_(module, tmp_path / "broken.safetensors", "dit")


def test_a_file_without_settings_is_read_as_diffusers_reads_it(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "lora.safetensors"
    save_file(
        {
            "transformer.img_in.lora_A.weight": torch.ones(2, 64),
            "transformer.img_in.lora_B.weight": torch.ones(48, 2),
        },
        file,
    )
    module = load(tiny_checkpoint)
    assert load_lora_(module, file, "dit")
    assert module.get_submodule("img_in").scaling == {"default": 1.0}

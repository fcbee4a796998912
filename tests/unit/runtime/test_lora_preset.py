"""A preset: a frozen LoRA that stays active under the one that trains (differential LoRA)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from framework.errors import ConfigError
from framework.models import get_family
from framework.plan.build import build_inference_plan, build_run_plan
from framework.plan.types import ComponentPlan
from framework.runtime.adapters import load_lora_, lora_state_dict, save_lora
from framework.runtime.load import adapter_parameters, load_component
from framework.schema import RunConfig

LAYER = "transformer_blocks.0.attn.to_q"


def config_of(source: Path, *, precision: str = "bf16", **lora: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {
                "family": "qwen_image",
                "source": str(source),
                "compute_dtype": "fp32",
                "dit": {"trainable": "lora", "precision": precision, "lora": lora},
            },
            "data": {"path": "p", "cache": False},
            "run": {"name": "t"},
        }
    )


def load(config: RunConfig) -> tuple[ComponentPlan, nn.Module]:
    part = build_run_plan(config, device="cpu").component("dit")
    module = load_component(
        part,
        get_family("qwen_image"),
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
    )
    return part, module


def stir_(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(module).values():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def run(module: Any) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    output: Tensor = module(
        hidden_states=torch.randn(1, 4, 64, generator=generator),
        encoder_hidden_states=torch.randn(1, 3, 16, generator=generator),
        timestep=torch.tensor([0.5]),
        img_shapes=[[(1, 2, 2)]],
        return_dict=False,
    )[0]
    return output


@pytest.fixture(scope="module")
def preset(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preset") / "turbo.safetensors"
    _, module = load(config_of(tiny_checkpoint, rank=3, alpha=6.0))
    save_lora(path, {"dit": stir_(module)}, form="kohya", family="qwen_image")
    return path


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_it_is_active_from_the_first_step_and_never_trains_or_is_saved(
    tiny_checkpoint: Path, preset: Path, tmp_path: Path, precision: str
) -> None:
    one = {"rank": 2, "target_modules": ["attn.to_q"]}
    _, bare = load(config_of(tiny_checkpoint, precision=precision, **one))
    _, alone = load(config_of(tiny_checkpoint, precision=precision, rank=3, alpha=6.0))
    assert load_lora_(alone, preset, "dit")
    part, both = load(config_of(tiny_checkpoint, precision=precision, preset=str(preset), **one))
    with torch.no_grad():
        assert not torch.allclose(run(both), run(bare), atol=1e-2)
        torch.testing.assert_close(run(both), run(alone), atol=1e-5, rtol=1e-5)
    run(both).sum().backward()
    trained = [name for name, p in both.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all(".default." in name for name in trained)
    frozen = [p for name, p in adapter_parameters(both).items() if ".preset." in name]
    assert len(frozen) == 32
    assert all(p.grad is None and p.dtype == torch.float32 for p in frozen)
    assert len(lora_state_dict(both)) == 4
    (path,) = save_lora(tmp_path / "lora.safetensors", {"dit": both})
    assert load_lora_(bare, path, "dit")
    held = sum(p.numel() * p.element_size() for p in adapter_parameters(both).values())
    assert part.adapter_bytes == held


def test_a_file_that_was_trained_fused_counts_as_it_is_loaded(tmp_path: Path) -> None:
    """Where one layer of the file is several here, each gets its whole rank, as the plan says from the header."""
    from safetensors.torch import save_file

    from framework.plan.preset import read_preset
    from framework.runtime.lora_files import read_lora
    from framework.schema.family import ComponentSpec

    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    path = tmp_path / "flux.safetensors"
    up = torch.block_diag(torch.ones(4, 2), torch.ones(4, 2), torch.ones(4, 2))
    save_file({f"{stem}.lora_down.weight": torch.ones(6, 5), f"{stem}.lora_up.weight": up}, path)
    shapes = {f"transformer_blocks.0.attn.to_{part}": (4, 5) for part in "qkv"}
    spec = ComponentSpec("transformer", ("_class_name", "FluxTransformer2DModel"))
    plan = read_preset(path, "dit", spec, shapes)
    loaded = read_lora(path, families=("flux",), keep_rank=True).adapters["dit"]
    assert {layer.name: layer.rank for layer in plan.layers} == {
        name: adapter.rank for name, adapter in loaded.items()
    }
    assert plan.numel == sum(a.down.numel() + a.up.numel() for a in loaded.values())


def test_generating_does_without_it(tiny_checkpoint: Path, preset: Path) -> None:
    config = config_of(tiny_checkpoint, rank=2, preset=str(preset), init_from=str(preset))
    lora = build_inference_plan(config.model, device="cpu").component("dit").lora
    assert lora is not None
    assert lora.preset is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.safetensors", r"lora\.preset: the LoRA file does not exist"),
        ("other.safetensors", r"lora\.preset: the preset's layer .* doesn't fit the model"),
        ("broken.safetensors", r"lora\.preset: .*damaged"),
    ],
)
def test_what_can_not_be_a_preset_is_told_before_weights_are_read(
    tiny_checkpoint: Path, tmp_path: Path, name: str, message: str
) -> None:
    from safetensors.torch import save_file

    stem = f"transformer.{LAYER}"
    save_file(
        {f"{stem}.lora_A.weight": torch.ones(2, 5), f"{stem}.lora_B.weight": torch.ones(48, 2)},
        tmp_path / "other.safetensors",
    )
    (tmp_path / "broken.safetensors").write_bytes(b"no safetensors file")
    config = config_of(tiny_checkpoint, rank=2, preset=str(tmp_path / name))
    with pytest.raises(ConfigError, match=message):
        build_run_plan(config, device="cpu")

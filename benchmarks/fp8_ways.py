"""The ways to store a frozen DiT under a LoRA that fp8_step.py and fp8_load.py put side by side.

Each builds the same Qwen-Image DiT from the same bf16 checkpoint and gives it the same float32 LoRA by peft.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from framework.models import get_family
from framework.plan.build import build_plan
from framework.plan.types import LoraLayer, LoraPlan, VramPlan
from framework.runtime.adapters import attach_lora_, is_adapter_name
from framework.runtime.load import load_component
from framework.schema import ModelConfig

LORA_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)
RANK = 16
PACKED_CHANNELS = 64
TEXT_WIDTH = 3584


def write_checkpoint(folder: Path, *, num_layers: int, width: int, seed: int = 0) -> None:
    """Write `folder/transformer` with random weights in bf16: blocks of 36 width**2 parameters, heads of 128."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(seed)
    dit = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=PACKED_CHANNELS,
        out_channels=PACKED_CHANNELS // 4,
        num_layers=num_layers,
        attention_head_dim=128,
        num_attention_heads=width // 128,
        joint_attention_dim=TEXT_WIDTH,
    )
    # diffusers starts biases and norms at 0 and 1; random values show errors there too.
    for name, parameter in dit.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.02)
    dit.to(torch.bfloat16).save_pretrained(folder / "transformer")


def octavo_plan(folder: Path, **dit: Any) -> VramPlan:
    """The plan of Octavo for this DiT alone."""
    settings = {
        "precision": "fp8",
        "trainable": "lora",
        "lora": {"rank": RANK, "alpha": RANK},
        **dit,
    }
    model = ModelConfig.model_validate(
        {"family": "qwen_image", "source": str(folder), "dit": settings}
    )
    return build_plan(
        model, purpose="train", phases=("train",), resident={"train": ("dit",)}, device="cpu"
    )


def load_octavo(folder: Path, **dit: Any) -> nn.Module:
    """Octavo: encoded as it streams in; the layers keep stored bytes for backward."""
    plan = octavo_plan(folder, **dit)
    module = load_component(
        plan.component("dit"),
        get_family("qwen_image"),
        device=torch.device("cpu"),
        compute_dtype=torch.bfloat16,
    )
    return module


def load_bf16(folder: Path) -> nn.Module:
    """Plain bf16 weights."""
    return with_lora(from_pretrained(folder, torch.bfloat16))


def load_float32(folder: Path) -> nn.Module:
    """Float32 weights and arithmetic, the truth that errors are measured against."""
    return with_lora(from_pretrained(folder, torch.float32))


def load_layerwise(folder: Path) -> nn.Module:
    """Diffusers' enable_layerwise_casting: no scales; weights are cast by hooks around each layer's forward."""
    module = with_lora(from_pretrained(folder, torch.bfloat16))
    module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    return module


def load_torchao(folder: Path) -> nn.Module:
    """Torchao's Float8WeightOnlyConfig: row scales, dequantised in forward."""
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    module = from_pretrained(folder, torch.bfloat16)
    quantize_(module, Float8WeightOnlyConfig())
    return with_lora(module)


def load_plain_cast(folder: Path) -> nn.Module:
    """The layer as trainers usually write it: unscaled codes, cast to bf16 in forward, multiplied by F.linear."""
    module = from_pretrained(folder, torch.bfloat16)
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.weight = nn.Parameter(
                layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False
            )
            layer.__class__ = PlainCastLinear
    return with_lora(module)


def load_diffsynth(folder: Path) -> nn.Module:
    """DiffSynth-Studio's own FP8 layers; its checkout must be importable (--diffsynth PATH)."""
    from diffsynth.core.vram.layers import AutoWrappedLinear, enable_vram_management

    module = from_pretrained(folder, torch.bfloat16)
    config = {
        "offload_dtype": torch.float8_e4m3fn,
        "offload_device": "cpu",
        "onload_dtype": torch.float8_e4m3fn,
        "onload_device": "cpu",
        "preparing_dtype": torch.float8_e4m3fn,
        "preparing_device": "cpu",
        "computation_dtype": torch.bfloat16,
        "computation_device": "cpu",
    }
    enable_vram_management(module, {nn.Linear: AutoWrappedLinear}, vram_config=config)
    return with_lora(module)


class PlainCastLinear(nn.Linear):
    """`nn.Linear` with an FP8 parameter that is cast whenever it is used."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., I) -> (..., O)."""
        return functional.linear(x, self.weight.to(torch.bfloat16), self.bias)


WAYS: dict[str, Callable[[Path], nn.Module]] = {
    "bf16": load_bf16,
    "diffusers layerwise casting": load_layerwise,
    "torchao Float8WeightOnly": load_torchao,
    "plain cast in forward": load_plain_cast,
    "DiffSynth-Studio": load_diffsynth,
    "Octavo": load_octavo,
}


def from_pretrained(folder: Path, dtype: torch.dtype) -> Any:
    """Diffusers' own loading."""
    from diffusers import QwenImageTransformer2DModel

    module = QwenImageTransformer2DModel.from_pretrained(folder / "transformer", dtype=dtype)
    return module.requires_grad_(False).eval()


def with_lora(module: nn.Module) -> nn.Module:
    """Attach the LoRA that Octavo's plan attaches, in float32, with the same start values."""
    layers = tuple(
        LoraLayer(name=name, kind="linear", shape=tuple(layer.weight.shape))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and name.endswith(LORA_TARGETS) and ".attn." in name
    )
    lora = LoraPlan(
        rank=RANK,
        alpha=RANK,
        dropout=0.0,
        use_rslora=False,
        use_dora=False,
        init_from=None,
        layers=layers,
    )
    attach_lora_(module, lora, component="dit", seed=0, trains=True)
    return module


def unsettle_adapter_(module: nn.Module) -> None:
    """Give the adapters' B random values instead of zeros, the same for all ways, so that A has gradients too."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(module.named_parameters()):
        if is_adapter_name(name):
            parameter.data = parameter.data.float()
            if ".lora_B." in name:
                parameter.data.normal_(0, 0.02, generator=generator)


def inputs(image_tokens: int, text_tokens: int, seed: int = 2) -> dict[str, Any]:
    """Arguments of the DiT for one square picture: hidden_states (1, image_tokens, 64), text (1, text_tokens, 3584)."""
    generator = torch.Generator().manual_seed(seed)
    side = int(image_tokens**0.5)
    return {
        "hidden_states": torch.randn(1, side * side, PACKED_CHANNELS, generator=generator),
        "encoder_hidden_states": torch.randn(1, text_tokens, TEXT_WIDTH, generator=generator),
        "encoder_hidden_states_mask": torch.ones(1, text_tokens, dtype=torch.bool),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, side, side)]],
        "return_dict": False,
    }


def say(**values: Any) -> None:
    """Answer the process that drives this one: one line of JSON."""
    print(json.dumps(values), flush=True)

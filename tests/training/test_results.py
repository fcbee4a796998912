"""What a run leaves behind is what other programs load."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from framework.plan.build import build_run_plan
from framework.runtime.load import adapter_parameters, resting_bytes
from framework.schema import RunConfig
from framework.training.lifecycle import RunLifecycle
from tests.training.runs import change, fit_values

SAMPLE = {
    "prompts": ["a red square"],
    "num_inference_steps": 4,
    "size_px": [64, 64],
    "guidance_scale": 3.0,
}


def psnr(one: Image.Image, other: Image.Image) -> float:
    difference = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    error = float((difference**2).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def pipeline_picture(pipeline: Any) -> Image.Image:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        SAMPLE["prompts"][0],
        negative_prompt=" ",
        true_cfg_scale=SAMPLE["guidance_scale"],
        width=64,
        height=64,
        num_inference_steps=SAMPLE["num_inference_steps"],
        generator=torch.Generator().manual_seed(0),
    ).images[0]


def test_diffusers_makes_the_same_picture_with_the_lora(
    values: dict[str, Any], tiny_checkpoint: Path
) -> None:
    from diffusers import QwenImagePipeline

    result = fit_values(change(values, model__compute_dtype="fp32", optim__lr=0.1, sample=SAMPLE))
    ours = Image.open(result.run_dir / "samples/step-000004/00.png")
    before = Image.open(result.run_dir / "samples/step-000000/00.png")
    pipeline = QwenImagePipeline.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    assert psnr(pipeline_picture(pipeline), before) >= 40
    pipeline.load_lora_weights(result.lora_path)
    assert psnr(pipeline_picture(pipeline), ours) >= 40
    assert psnr(before, ours) < 40


def test_fully_trained_components_load_in_diffusers_and_transformers(
    values: dict[str, Any], tiny_checkpoint: Path
) -> None:
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    full = {"trainable": "full"}
    result = fit_values(
        change(values, model__dit=full, model__text_encoder=full, optim__lr=1e-2, sample=SAMPLE)
    )
    assert result.model_path is not None
    transformer = QwenImageTransformer2DModel.from_pretrained(
        result.model_path / "transformer", dtype=torch.float32
    )
    text_encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        result.model_path / "text_encoder", dtype=torch.float32
    )
    pipeline = QwenImagePipeline.from_pretrained(
        tiny_checkpoint,
        transformer=transformer,
        text_encoder=text_encoder,
        dtype=torch.float32,
    )
    ours = Image.open(result.run_dir / "samples/step-000004/00.png")
    # Saved in the published bf16, trained in float32 and sampled under bf16 autocast.
    assert psnr(pipeline_picture(pipeline), ours) >= 25


@pytest.mark.parametrize(
    "changes",
    [
        {"model__dit": {"trainable": "lora", "precision": "fp8", "lora": {"rank": 3}}},
        {"model__dit": {"trainable": "full"}, "model__text_encoder": {"trainable": "full"}},
        {"model__dit": {"precision": "fp8"}, "model__text_encoder": {"trainable": "lora"}},
    ],
)
def test_training_holds_the_planned_bytes(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    values = change(values, **changes, optim__ema={"decay": 0.9}, trainer__max_steps=1)
    plan = build_run_plan(RunConfig.model_validate(values), device="cpu")
    found: dict[str, int] = {}
    original = RunLifecycle.on_train_end

    def measure(self: Any, trainer: Any, module: Any) -> None:
        trained = module.trained_parameters()
        found["weights"] = sum(
            resting_bytes(component)
            + sum(p.numel() * p.element_size() for p in adapter_parameters(component).values())
            for component in module.components.values()
        )
        found["gradients"] = 4 * sum(p.numel() for p in trained.values())
        found["optimizer"] = sum(
            value.numel() * value.element_size()
            for state in trainer.optimizers[0].state.values()
            for value in state.values()
            if value.ndim
        )
        found["ema"] = sum(a.numel() * a.element_size() for a in module.ema.averages.values())
        found["unused"] = 8 * sum(
            p.numel() for p in trained.values() if p not in trainer.optimizers[0].state
        )
        original(self, trainer, module)

    monkeypatch.setattr(RunLifecycle, "on_train_end", measure)
    fit_values(values)
    # AdamW makes its state when a parameter first has a gradient; the last block's text side never has one.
    unused = found.pop("unused")
    assert sum(found.values()) + unused == plan.phase("train").device_bytes

"""`generate` on a tiny checkpoint: the same pictures as diffusers' pipeline, in every storage."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from PIL import Image

from framework.errors import ConfigError, SourceError
from framework.inference.generate import generate, write_images
from framework.models import SampleSettings, get_family
from framework.plan.build import build_inference_plan
from framework.plan.types import LoraPlan
from framework.runtime.adapters import LoraSettings, attach_lora_, save_lora
from framework.runtime.load import load_component
from framework.schema import ModelConfig

PROMPTS = ("a red apple", "a house with a garden and a much longer caption than the first")


def model_of(folder: Path, **changes: object) -> ModelConfig:
    values = {
        "family": "qwen_image",
        "source": str(folder),
        "compute_dtype": "fp32",
        "device": "cpu",
    }
    return ModelConfig.model_validate({**values, **changes})


def psnr(first: Image.Image, second: Image.Image) -> float:
    error = np.mean((np.asarray(first, np.float64) - np.asarray(second, np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path) -> QwenImagePipeline:
    pipeline = QwenImagePipeline.from_pretrained(str(tiny_checkpoint), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference(pipeline: QwenImagePipeline, index: int, guidance: float) -> Image.Image:
    return pipeline(
        PROMPTS[index],
        negative_prompt=" " if guidance > 1 else None,
        true_cfg_scale=guidance,
        width=48,
        height=32,
        num_inference_steps=3,
        generator=torch.Generator("cpu").manual_seed(11 + index),
    ).images[0]


def settings_of(guidance: float) -> SampleSettings:
    return SampleSettings((48, 32), num_inference_steps=3, guidance_scale=guidance, seed=11)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_same_pictures_as_the_pipeline(
    guidance: float, tiny_checkpoint: Path, pipeline: QwenImagePipeline
) -> None:
    steps: list[tuple[int, int]] = []
    pictures = generate(
        model_of(tiny_checkpoint),
        prompts=PROMPTS,
        settings=settings_of(guidance),
        on_progress=lambda done, in_all: steps.append((done, in_all)),
    )
    assert steps == [(n, 6) for n in range(1, 7)]
    for index, picture in enumerate(pictures):
        assert psnr(picture, reference(pipeline, index, guidance)) >= 40


@pytest.mark.parametrize(("compute_dtype", "least_db"), [("fp32", 25), ("bf16", 20)])
def test_stored_in_fp8_the_pictures_stay_close(
    compute_dtype: str, least_db: float, tiny_checkpoint: Path
) -> None:
    """Linear layers, embeddings and the VAE's convolutions, all in codes."""
    exact = generate(model_of(tiny_checkpoint), prompts=PROMPTS[:1], settings=settings_of(4.0))
    model = model_of(
        tiny_checkpoint,
        compute_dtype=compute_dtype,
        dit={"precision": "fp8"},
        text_encoder={"precision": "fp8", "fp8": {"layers": ["linear", "embedding"], "keep_high_precision": []}},
        vae={"precision": "fp8", "fp8": {"layers": ["conv"]}},
    )  # fmt: skip
    found = generate(model, prompts=PROMPTS[:1], settings=settings_of(4.0))
    assert least_db < psnr(found[0], exact[0]) < 80


def test_bf16_works_without_autocast(tiny_checkpoint: Path) -> None:
    exact = generate(model_of(tiny_checkpoint), prompts=PROMPTS[:1], settings=settings_of(4.0))
    model = model_of(tiny_checkpoint, compute_dtype="bf16")
    found = generate(model, prompts=PROMPTS[:1], settings=settings_of(4.0))
    assert psnr(found[0], exact[0]) > 25


@pytest.fixture(scope="module")
def lora(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on DiT and text encoder whose effect can be seen."""
    plan = build_inference_plan(model_of(tiny_checkpoint), device="cpu")
    family = get_family("qwen_image")
    modules = {}
    for component, layers in (
        ("dit", ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0")),
        ("text_encoder", ("layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj")),
    ):
        module = load_component(
            plan.component(component),
            family,
            device=torch.device("cpu"),
            compute_dtype=torch.float32,
        )
        settings = LoraSettings(4, 8.0, 0.0, False, False, layers)
        attach_lora_(module, settings, component=component, seed=1, trains=True)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        modules[component] = module
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_lora(path, modules)
    return path


def test_a_lora_changes_the_pictures(tiny_checkpoint: Path, lora: Path) -> None:
    model = model_of(tiny_checkpoint)
    plain = generate(model, prompts=PROMPTS[:1], settings=settings_of(1.0))
    changed = generate(model, prompts=PROMPTS[:1], settings=settings_of(1.0), lora=lora)
    assert psnr(plain[0], changed[0]) < 40
    on_fp8 = model_of(tiny_checkpoint, dit={"precision": "fp8"})
    stored = generate(on_fp8, prompts=PROMPTS[:1], settings=settings_of(1.0), lora=lora)
    assert psnr(stored[0], changed[0]) > psnr(plain[0], changed[0])


def test_a_lora_of_the_dit_does_what_it_does_in_diffusers(
    tiny_checkpoint: Path, lora: Path, tmp_path: Path
) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "dit.safetensors"
    with safe_open(lora, framework="pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys() if k.startswith("transformer.")}  # noqa: SIM118
        save_file(tensors, path, metadata=file.metadata())
    pipeline = QwenImagePipeline.from_pretrained(str(tiny_checkpoint), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    found = generate(
        model_of(tiny_checkpoint), prompts=PROMPTS[:1], settings=settings_of(4.0), lora=path
    )
    assert psnr(found[0], reference(pipeline, 0, 4.0)) >= 40


def test_a_lora_for_nothing_here_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({f"unet.x.lora_{part}.weight": torch.zeros(2, 2) for part in "AB"}, path)
    with pytest.raises(SourceError, match="adapters for no component"):
        generate(
            model_of(tiny_checkpoint), prompts=PROMPTS[:1], settings=settings_of(1.0), lora=path
        )


def test_a_plan_for_training_generates_too(tiny_checkpoint: Path) -> None:
    """`trainable` is of no account here: a recipe's model section can be used as it is."""
    model = model_of(tiny_checkpoint, dit={"trainable": "lora", "lora": {"rank": 2}})
    plan = build_inference_plan(model, device="cpu")
    assert plan.purpose == "infer"
    assert not any(isinstance(c.lora, LoraPlan) and c.trainable != "none" for c in plan.components)
    generate(model, prompts=PROMPTS[:1], settings=SampleSettings((32, 32), 1, 1.0))


def test_wrong_requests_are_refused_in_one_report(tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="4 faults") as caught:
        generate(model_of(tiny_checkpoint), prompts=(), settings=SampleSettings((40, 30), 0))
    report = str(caught.value)
    assert "40 px is no multiple of 16" in report
    assert "Nearest: 32, 48" in report
    with pytest.raises(SourceError, match="nowhere"):
        generate(model_of(tiny_checkpoint / "nowhere"), prompts=("a",), settings=settings_of(1.0))


def test_pictures_are_numbered_on_and_carry_their_origin(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (10, 20)]
    settings = SampleSettings((8, 8), 5, 2.0, seed=3)
    (tmp_path / "0007.png").write_bytes(b"not ours")
    (tmp_path / "notes.txt").write_text("kept")
    paths = write_images(
        pictures,
        ["first", "zweites 猫"],
        tmp_path,
        settings=settings,
        source="assets/pocket",
        lora=Path("a.safetensors"),
    )
    assert [p.name for p in paths] == ["0008.png", "0009.png"]
    assert (tmp_path / "0007.png").read_bytes() == b"not ours"
    with Image.open(paths[1]) as image:
        image.load()
        assert image.getpixel((0, 0)) == (20, 0, 0)
        assert image.text == {
            "prompt": "zweites 猫",
            "seed": "4",
            "num_inference_steps": "5",
            "guidance_scale": "2.0",
            "model": "assets/pocket",
            "lora": "a.safetensors",
        }
    more = write_images(pictures, ["a", "b"], tmp_path, settings=settings, source="x")
    assert [p.name for p in more] == ["0010.png", "0011.png"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_failed_write_leaves_no_empty_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from framework.inference import generate as module

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module, "save_sample", fail)
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(OSError, match="disk full"):
        write_images([picture], ["a"], tmp_path, settings=SampleSettings((8, 8)), source="x")
    assert not list(tmp_path.iterdir())

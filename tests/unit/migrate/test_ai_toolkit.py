"""ai-toolkit's YAML becomes a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from framework.errors import ConfigError
from framework.migrate import migrate
from tests.unit.migrate.judging import assert_valid, notes, recipe, settings


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # no extra is missing


def job(**sections: Any) -> str:
    process = {
        "type": "sd_trainer",
        "training_folder": "output",
        "network": {"type": "lora", "linear": 16, "linear_alpha": 4},
        "datasets": [{"folder_path": "pictures", "resolution": [512, 1024]}],
        "train": {"dtype": "bf16", "lr": 1e-4, "optimizer": "adamw8bit", "steps": 2000},
        "model": {"name_or_path": "Qwen/Qwen-Image", "arch": "qwen_image"},
    }
    for name, values in sections.items():
        process[name] = (
            {**process[name], **values} if isinstance(process.get(name), dict) else values
        )  # type: ignore[dict-item]
    return yaml.safe_dump({"job": "extension", "config": {"name": "mine", "process": [process]}})


def migrated(**sections: Any) -> dict[str, Any]:
    return settings(recipe(job(**sections), "ai-toolkit"))


def test_a_job(tmp_path: Path) -> None:
    text = job(
        model={"quantize": True, "qtype": "uint3|a.safetensors"},
        sample={"prompts": ["a cat --w 512", "[trigger] dog"], "width": 1024, "sample_every": 250},
        trigger_word="sks",
    )
    found = recipe(text, "ai-toolkit")
    assert_valid(found, tmp_path)
    written = settings(found)
    assert (written["run.name"], written["run.output_dir"]) == ("mine", "output")
    assert written["model.dit.trainable"] == "lora"
    assert (written["model.dit.lora.rank"], written["model.dit.lora.alpha"]) == (16, 16)
    assert written["model.dit.precision"] == written["model.text_encoder.precision"] == "fp8"
    assert written["model.dit.gradient_checkpointing"] is True
    assert written["model.compute_dtype"] == "bf16"
    assert written["data.max_px"] == 1024 * 1024
    assert written["objective.timestep_sampling"] == "logit_normal"
    assert written["objective.shift"] == 1
    assert written["optim.name"] == "adamw_8bit"
    assert written["sample.prompts"] == ["a cat", "sks dog"]
    assert written["sample.size_px"] == [1024, 512]
    assert {"network.linear_alpha", "model.quantize"} <= set(notes(found, "changed"))
    assert {"datasets.resolution [512, 1024]", "trigger_word"} <= set(notes(found, "lost"))


@pytest.mark.parametrize(
    ("train", "steps", "accumulation"),
    [
        ({"steps": 2000}, 2000, None),
        ({"steps": 2000, "gradient_accumulation": 4}, 2000, 4),
        ({"steps": 2002, "gradient_accumulation_steps": 4}, 501, 4),
    ],
)
def test_length(train: dict[str, int], steps: int, accumulation: int | None) -> None:
    written = migrated(train=train)
    assert written["trainer.max_steps"] == steps
    assert written.get("trainer.accumulate_grad_batches") == accumulation


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sigmoid", ("logit_normal", 1)),
        ("linear", ("uniform", 1)),
        ("weighted", ("uniform", 1)),
        ("shift", ("uniform", "scheduler")),
        ("magic", ("logit_normal", 1)),
    ],
)
def test_noise_levels(kind: str, expected: tuple[str, object]) -> None:
    written = migrated(train={"timestep_type": kind})
    assert (written["objective.timestep_sampling"], written["objective.shift"]) == expected


def test_limits_count_from_the_noisy_end() -> None:
    written = migrated(train={"min_denoising_steps": 100, "max_denoising_steps": 599})
    assert (written["objective.sigma_max"], written["objective.sigma_min"]) == (0.9, 0.4)


def test_sdxl_reads_alpha_and_its_losses(tmp_path: Path) -> None:
    model = {"name_or_path": "stabilityai/stable-diffusion-xl-base-1.0", "arch": "sdxl"}
    train = {"min_snr_gamma": 5.0, "noise_scheduler": "ddpm", "train_text_encoder": True}
    found = recipe(job(model=model, train=train), "ai-toolkit")
    assert_valid(found, tmp_path)
    written = settings(found)
    assert written["model.dit.lora.alpha"] == written["model.text_encoder.lora.alpha"] == 4
    assert written["objective.name"] == "ddpm"
    assert written["objective.min_snr_gamma"] == 5


def test_several_folders_and_editing() -> None:
    datasets = [{"folder_path": "a", "num_repeats": 2, "control_path": "c"}, {"folder_path": "b"}]
    model = {"name_or_path": "Qwen/Qwen-Image-Edit-2509", "arch": "qwen_image_edit_plus:tag"}
    found = recipe(job(datasets=datasets, model=model, sample={"prompts": ["x"]}), "ai-toolkit")
    written = settings(found)
    assert written["model.family"] == "qwen_image_edit"
    assert written["data.sources"] == [{"path": "a", "repeats": 2}, {"path": "b", "repeats": 1}]
    assert written["data.max_px"] == 512 * 512
    assert "sample.prompts" not in written  # each would need a control picture
    assert {"datasets.control_path", "sample.prompts"} <= set(notes(found, "check"))


def test_full_training_and_the_rest() -> None:
    text = yaml.safe_load(
        job(train={"ema_config": {"use_ema": True}, "optimizer_params": {"eps": 1}})
    )
    process = text["config"]["process"][0]
    del process["network"]
    process["model"] |= {"quantize": True, "layer_offloading": True}
    process["nonsense"] = 1
    found = recipe(yaml.safe_dump(text), "ai-toolkit")
    written = settings(found)
    assert written["model.dit.trainable"] == "full"
    assert written["optim.ema.decay"] == 0.999
    assert "model.dit.precision" not in written
    assert written["model.text_encoder.offload"] == "host"
    lost = set(notes(found, "lost"))
    assert {
        "model.quantize",
        "model.layer_offloading",
        "train.optimizer_params.eps",
        "nonsense",
    } <= lost


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("a: [", "not readable as YAML"),
        ("a: 1", "isn't a job of ai-toolkit"),
        (job(model={"name_or_path": "", "arch": "flux"}), "names no model"),
        (job(model={"name_or_path": "x/y", "arch": "hidream"}), "no recipe can be made for the model"),
        (job(model={"name_or_path": "black-forest-labs/FLUX.1-Kontext-dev", "arch": "flux"}), "text alone"),
    ],
)  # fmt: skip
def test_what_makes_no_recipe(text: str, phrase: str) -> None:
    with pytest.raises(ConfigError, match="1 fault") as caught:
        migrate("ai-toolkit", text, where="a.yaml", is_command=False)
    assert phrase in str(caught.value)

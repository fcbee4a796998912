"""A run's LoRA in every form, and merged: through the commands, from the run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from framework.cli.main import main
from framework.errors import ConfigError
from framework.models import get_family
from framework.plan.build import build_inference_plan
from framework.runtime.load import load_component
from framework.runtime.lora_files import read_lora
from framework.schema import ModelConfig
from framework.schema.lora_keys import FORMAT_NAMES
from framework.storage.fp8 import encode_e4m3
from tests.training.runs import change, fit_values, run_values, write_pictures

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has written all forms."""
    folder = tmp_path_factory.mktemp("run")
    values = run_values(tiny_checkpoint, write_pictures(folder / "pictures"), folder)
    lora = {"rank": 4, "alpha": 2.0}
    values = change(values, model__dit__lora=lora, export={"formats": list(FORMAT_NAMES)})
    result = fit_values(change(values, optim__lr=0.1))
    assert result.lora_path == result.run_dir / "lora_peft" / "transformer"
    return result.run_dir


def deltas(path: Path) -> dict[str, torch.Tensor]:
    return {name: a.delta() for name, a in read_lora(path).adapters["dit"].items()}


def test_a_run_writes_every_form_with_where_it_is_from(run: Path, tiny_checkpoint: Path) -> None:
    files = {
        "diffusers": "lora.safetensors",
        "kohya": "lora_kohya.safetensors",
        "comfyui": "lora_comfyui.safetensors",
        "peft": "lora_peft/transformer/adapter_model.safetensors",
    }
    wanted = deltas(run / files["diffusers"])
    assert len(wanted) == 16
    for form, name in files.items():
        for layer, delta in deltas(run / name).items():
            torch.testing.assert_close(delta, wanted[layer])
        with safe_open(run / name, framework="pt") as file:
            said = file.metadata()
        assert (said["octavo.format"], said["steps"]) == (form, "4")
        assert said["base_model"] == str(tiny_checkpoint)
        assert json.loads(said["octavo.config"])["model"]["dit"]["lora"]["alpha"] == 2.0
        assert len(said["octavo.dataset_hash"]) == 64
        assert said["modelspec.title"] == "tiny"


def test_alpha_is_in_the_weights_for_programs_that_read_no_header(run: Path) -> None:
    tensors = load_file(run / "lora.safetensors")
    stem = "transformer.transformer_blocks.0.attn.to_q"
    product = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
    torch.testing.assert_close(
        product, deltas(run / "lora_kohya.safetensors")["transformer_blocks.0.attn.to_q"]
    )


def test_export_writes_what_is_asked_and_writes_nothing_over(
    run: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["export", str(run), "--format", "kohya"]) == 2
    assert "nothing is written over" in capsys.readouterr().err.replace("\n", " ")
    out = tmp_path / "out"
    arguments = ["--format", "kohya", "--format", "peft", "--out", str(out)]
    assert main(["export", str(run), *arguments]) == 0
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == [
        str(out / "lora_kohya.safetensors"),
        str(out / "lora_peft" / "transformer"),
    ]
    assert load_file(printed[-1]).keys() == load_file(run / "lora_kohya.safetensors").keys()
    assert main(["export", printed[-1], "--format", "comfyui"]) == 0
    again = out / "lora_kohya_comfyui.safetensors"
    assert load_file(again).keys() == load_file(run / "lora_comfyui.safetensors").keys()
    with safe_open(again, framework="pt") as file:
        assert file.metadata()["steps"] == "4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --format, once or several times, or --merge"),
        (["--merge"], "--merge needs --out FOLDER"),
        (["--format", "kohya", "--precision", "fp8"], "--precision is for --merge"),
        (["--format", "koya"], "koya"),
    ],
)
def test_what_the_command_lacks_is_said(
    run: Path, arguments: list[str], message: str, capsys: Capture
) -> None:
    assert main(["export", str(run), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert main(["export", "nowhere", "--format", "kohya"]) == 2
    assert "nowhere doesn't exist" in " ".join(capsys.readouterr().err.split())


def test_merging_writes_a_checkpoint_that_needs_no_lora(
    run: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    from diffusers import QwenImageTransformer2DModel

    out = tmp_path / "merged"
    assert main(["export", str(run), "--merge", "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == [str(out)]
    added = deltas(run / "lora.safetensors")
    transformer = out / "transformer"
    for file in sorted((tiny_checkpoint / "transformer").glob("*.safetensors")):
        before, after = load_file(file), load_file(transformer / file.name)
        assert before.keys() == after.keys()
        for key, weight in before.items():
            delta = added.get(key.removesuffix(".weight"), torch.zeros(()))
            assert torch.equal(after[key], (weight.float() + delta).to(torch.bfloat16)), key
    index = "diffusion_pytorch_model.safetensors.index.json"
    assert json.loads((transformer / index).read_text()) == json.loads(
        (tiny_checkpoint / "transformer" / index).read_text()
    )
    QwenImageTransformer2DModel.from_pretrained(transformer)
    for path in sorted(tiny_checkpoint.rglob("*")):
        name = path.relative_to(tiny_checkpoint)
        if (
            path.is_file()
            and name.parts[0] != "transformer"
            and not path.name.endswith("index.json")
        ):
            assert (out / name).read_bytes() == path.read_bytes(), name
    assert not [entry for entry in tmp_path.iterdir() if entry != out]
    assert main(["export", str(run), "--merge", "--out", str(out)]) == 2
    assert "nothing is written over" in " ".join(capsys.readouterr().err.split())


def test_a_file_of_others_is_merged_into_the_model_that_is_named(
    run: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "foreign.safetensors"
    save_file(load_file(run / "lora_kohya.safetensors"), file)
    out = ["--merge", "--out", str(tmp_path / "merged")]
    assert main(["export", str(file), *out]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "says which checkpoint the LoRA is for" in said
    assert "recipe=NAME" in said
    model = ["recipe=pocket_lora", f"model.source={tiny_checkpoint}"]
    assert main(["export", str(file), *model, *out]) == 0
    before, after = whole(tiny_checkpoint / "transformer"), whole(tmp_path / "merged/transformer")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    # What the last block makes of the caption reaches no output, so two adapters there never trained.
    trained = {name for name, delta in deltas(run / "lora.safetensors").items() if delta.any()}
    assert changed == {f"{layer}.weight" for layer in trained}
    assert len(changed) == 14


def test_a_lora_for_another_model_is_not_merged(
    run: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    tensors = load_file(run / "lora_kohya.safetensors")
    key = "lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight"
    tensors[key] = torch.cat([tensors[key], tensors[key]], dim=1)
    file = tmp_path / "wide.safetensors"
    save_file(tensors, file)
    model = ["recipe=pocket_lora", f"model.source={tiny_checkpoint}"]
    out = tmp_path / "merged"
    assert main(["export", str(file), *model, "--merge", "--out", str(out)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "doesn't fit the checkpoint: dit.transformer_blocks.0.attn.to_q" in said
    assert not out.exists()


def test_merging_to_fp8_encodes_the_merged_weights(
    run: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    arguments = ["--merge", "--precision", "fp8", "--out", str(out)]
    assert main(["export", str(run / "lora_kohya.safetensors"), *arguments]) == 0
    added = deltas(run / "lora.safetensors")
    before = whole(tiny_checkpoint / "transformer")
    after = whole(out / "transformer")
    encoded = {key for key, value in after.items() if value.dtype == torch.float8_e4m3fn}
    assert len(encoded) == 28
    for key in encoded:
        layer = key.removesuffix(".weight")
        merged = before[key].float() + added.get(layer, torch.zeros(()))
        codes, scale = encode_e4m3(merged, "row")
        assert scale is not None
        assert torch.equal(after[key].view(torch.uint8), codes)
        assert torch.equal(after[f"{layer}.scale_weight"].flatten(), scale)
    model = {"family": "qwen_image", "source": str(out), "dit": {"precision": "fp8"}}
    plan = build_inference_plan(ModelConfig.model_validate(model), device="cpu").component("dit")
    kinds = {group.scaling for group in plan.groups if group.name.startswith("fp8_as_published")}
    assert kinds == {"row"}
    dit = load_component(
        plan,
        get_family("qwen_image"),
        device=torch.device("cpu"),
        compute_dtype=torch.bfloat16,
    )
    key = "transformer_blocks.0.attn.to_q.weight"
    weight = after[key].float() * after[key.replace("weight", "scale_weight")]
    got = dit.get_submodule(key.removesuffix(".weight")).weight
    assert torch.equal(got, weight.to(torch.bfloat16))


def whole(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a component."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_a_form_that_lacks_a_layer_is_refused_before_training(values: dict[str, Any]) -> None:
    lora = {"rank": 2, "use_dora": True}
    with pytest.raises(ConfigError, match=r"export\.formats\[1\]: kohya.*no DoRA"):
        fit_values(change(values, model__dit__lora=lora, export={"formats": ["peft", "kohya"]}))


def test_a_run_over_a_preset_saves_only_what_it_trained(
    run: Path, values: dict[str, Any], tmp_path: Path
) -> None:
    preset = run / "lora_comfyui.safetensors"
    lora = {"rank": 2, "target_modules": ["attn.to_q"], "preset": str(preset)}
    sample = {"prompts": ["a red square"], "num_inference_steps": 2, "size_px": [32, 32]}
    result = fit_values(change(values, model__dit__lora=lora, sample=sample))
    assert result.lora_path is not None
    assert sorted(deltas(result.lora_path)) == [
        f"transformer_blocks.{block}.attn.to_q" for block in (0, 1)
    ]
    plan = json.loads((result.run_dir / "plan.json").read_text())
    part = plan["components"]["dit"]
    held = sum(p.numel() for p in load_file(preset).values())
    own = sum(p.numel() for p in load_file(result.lora_path).values())
    assert part["adapter_bytes"] == 4 * (held + own)

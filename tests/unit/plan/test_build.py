"""Plans from headers: groups, adapters, phases, and everything wrong in one report."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from framework.errors import ConfigError, SourceError
from framework.plan.build import build_inference_plan, build_run_plan, run_residents
from framework.plan.types import VramPlan
from framework.schema import FAMILIES, ModelConfig, RunConfig

ALL = "text_encoder vae dit"


def make_config(source: Path | str, **changes: Any) -> RunConfig:
    """A small run on `source`; changes are sections, e.g. model={"dit": {...}}."""
    model = {"family": "qwen_image", "source": str(source), "dit": {"trainable": "lora"}}
    model |= changes.pop("model", {})
    return RunConfig.model_validate(
        {"model": model, "data": {"path": "pictures"}, "run": {"name": "test"}, **changes}
    )


def make_plan(source: Path | str, **changes: Any) -> VramPlan:
    return build_run_plan(make_config(source, **changes), device="cpu")


def names(plan: VramPlan, component: str, group: str) -> set[str]:
    found = [g for g in plan.component(component).groups if g.name == group]
    return {tensor.name for g in found for tensor in g.tensors}


def test_bf16_component_rests_in_the_compute_dtype(tiny_checkpoint: Path) -> None:
    for compute, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        plan = make_plan(
            tiny_checkpoint, model={"dit": {"trainable": "lora"}, "compute_dtype": compute}
        )
        dit = plan.component("dit")
        assert [group.name for group in dit.groups] == ["high_precision"]
        assert dit.groups[0].states.onload.storage_dtype == compute
        assert dit.resting_bytes == size * dit.numel


def test_fp8_covers_linear_weights_but_what_the_family_keeps(tiny_checkpoint: Path) -> None:
    plan = make_plan(tiny_checkpoint, model={"dit": {"trainable": "lora", "precision": "fp8"}})
    encoded, rest = names(plan, "dit", "fp8"), names(plan, "dit", "high_precision")
    assert "transformer_blocks.0.attn.to_q.weight" in encoded
    assert "transformer_blocks.1.img_mod.1.weight" in encoded
    assert {n.split(".")[0] for n in encoded} == {"transformer_blocks"}
    assert {"img_in.weight", "proj_out.weight", "norm_out.linear.weight", "txt_norm.weight"} <= rest
    assert not any(n.endswith("bias") for n in encoded)
    group = next(g for g in plan.component("dit").groups if g.name == "fp8")
    rows = sum(tensor.shape[0] for tensor in group.tensors)
    assert group.resting_bytes == group.numel + 4 * rows
    assert group.states.computation.storage_dtype == "bf16"


@pytest.mark.parametrize(("scaling", "scales"), [("tensor", 1), ("none", 0)])
def test_other_scalings(tiny_checkpoint: Path, scaling: str, scales: int) -> None:
    fp8 = {"scaling": scaling}
    plan = make_plan(
        tiny_checkpoint, model={"dit": {"trainable": "lora", "precision": "fp8", "fp8": fp8}}
    )
    group = next(g for g in plan.component("dit").groups if g.name == "fp8")
    assert group.resting_bytes == group.numel + 4 * scales * len(group.tensors)


def test_user_list_replaces_the_familys(tiny_checkpoint: Path) -> None:
    fp8 = {"keep_high_precision": ["transformer_blocks.0.*", "attn.to_q"]}
    plan = make_plan(
        tiny_checkpoint, model={"dit": {"trainable": "lora", "precision": "fp8", "fp8": fp8}}
    )
    encoded = names(plan, "dit", "fp8")
    assert "img_in.weight" in encoded
    assert not any(n.startswith("transformer_blocks.0.") or "to_q" in n for n in encoded)
    everything = make_plan(
        tiny_checkpoint,
        model={
            "dit": {"trainable": "lora", "precision": "fp8", "fp8": {"keep_high_precision": []}}
        },
    )
    assert names(everything, "dit", "fp8") > encoded


def test_convolutions_and_embeddings_when_asked(tiny_checkpoint: Path) -> None:
    plan = make_plan(
        tiny_checkpoint,
        model={
            "dit": {"trainable": "lora"},
            "vae": {"precision": "fp8", "fp8": {"layers": ["conv"]}},
            "text_encoder": {"precision": "fp8", "fp8": {"layers": ["embedding"]}},
        },
    )
    assert names(plan, "text_encoder", "fp8") == {"embed_tokens.weight"}
    encoded = names(plan, "vae", "fp8")
    assert "decoder.mid_block.resnets.0.conv1.weight" in encoded
    assert "decoder.conv_out.weight" not in encoded
    assert not any("gamma" in name for name in encoded)


def test_only_the_language_model_of_the_text_encoder_is_planned(tiny_checkpoint: Path) -> None:
    text = make_plan(tiny_checkpoint).component("text_encoder")
    every = {tensor.name for group in text.groups for tensor in group.tensors}
    assert {name.split(".")[0] for name in every} == {"layers", "embed_tokens", "norm"}


def test_full_training_rests_in_float32(tiny_checkpoint: Path) -> None:
    plan = make_plan(tiny_checkpoint, model={"dit": {"trainable": "full"}}, optim={"ema": {}})
    dit = plan.component("dit")
    assert [group.name for group in dit.groups] == ["trained"]
    assert dit.resting_bytes == dit.gradient_bytes == dit.ema_bytes == 4 * dit.numel
    assert dit.optimizer_bytes == 8 * dit.numel
    assert plan.phase("train").device_bytes == 20 * dit.numel


def test_lora_is_counted_layer_by_layer(tiny_checkpoint: Path) -> None:
    lora = {"rank": 3, "target_modules": ["attn.to_q", "img_mlp.net.2"], "use_dora": True}
    plan = make_plan(tiny_checkpoint, model={"dit": {"trainable": "lora", "lora": lora}})
    dit = plan.component("dit")
    assert dit.lora is not None
    assert len(dit.lora.layers) == 4
    width = 48
    assert dit.lora.numel == 2 * ((3 * 2 * width + width) + (3 * (4 * width + width) + width))
    assert dit.trained_numel == dit.lora.numel
    assert dit.optimizer_bytes == 8 * dit.lora.numel
    assert dit.ema_bytes == 0


def test_phases_of_a_cached_lora_run(tiny_checkpoint: Path) -> None:
    plan = make_plan(tiny_checkpoint, sample={"prompts": ["a cat"]})
    assert {p.name: p.components for p in plan.phases} == {
        "load": ("vae", "dit"),
        "encode": ("text_encoder", "vae"),
        "train": ("dit",),
        "sample": ("vae", "dit"),
        "save": ("dit",),
    }
    text, vae, dit = (plan.component(n) for n in ("text_encoder", "vae", "dit"))
    held = dit.resting_bytes + dit.adapter_bytes + dit.optimizer_bytes
    assert plan.phase("encode").device_bytes == text.resting_bytes + vae.resting_bytes
    assert plan.phase("train").device_bytes == held + dit.gradient_bytes
    assert plan.phase("sample").device_bytes == held + vae.resting_bytes


@pytest.mark.parametrize(
    ("trained", "cache", "prompts", "expected"),
    [
        ({"dit"}, True, False, {"encode": "text_encoder vae", "train": "dit"}),
        ({"dit"}, False, False, {"train": ALL}),
        ({"dit"}, False, True, {"train": ALL, "sample": ALL}),
        ({"dit", "text_encoder"}, True, True, {"encode": "vae", "train": "text_encoder dit", "sample": ALL}),
        ({"text_encoder"}, True, False, {"encode": "vae", "train": "text_encoder dit"}),
        ({"vae"}, True, False, {"train": "vae"}),
        ({"vae"}, False, False, {"train": "vae"}),
        ({"vae"}, True, True, {"encode": "text_encoder", "train": "vae", "sample": "vae dit"}),
        ({"dit", "vae", "text_encoder"}, True, True, {"train": ALL, "sample": ALL}),
    ],
)  # fmt: skip
def test_which_component_is_in_memory_when(
    trained: set[str], cache: bool, prompts: bool, expected: dict[str, str]
) -> None:
    model = {
        name: {"trainable": "full" if name in trained else "none"}
        for name in ("dit", "text_encoder", "vae")
    }
    config = make_config(
        "unused/model",
        model=model,
        data={"path": "p", "cache": cache},
        sample={"prompts": ["a"] if prompts else []},
    )
    assert {k: " ".join(v) for k, v in run_residents(config).items()} == expected


def test_inference_freezes_everything(tiny_checkpoint: Path) -> None:
    model = make_config(tiny_checkpoint, model={"dit": {"trainable": "full"}}).model
    plan = build_inference_plan(model, device="cuda:0")
    assert plan.purpose == "infer"
    assert {p.name: p.components for p in plan.phases} == {
        "load": ("vae", "dit"),
        "encode": ("text_encoder",),
        "sample": ("vae", "dit"),
    }
    assert all(c.trainable == "none" and c.trained_numel == 0 for c in plan.components)
    assert plan.component("dit").resting_bytes == 2 * plan.component("dit").numel


def test_inference_takes_an_adapter_only_from_a_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    lora = {"rank": 2}
    model = make_config(tiny_checkpoint, model={"dit": {"trainable": "lora", "lora": lora}}).model
    assert build_inference_plan(model, device="cpu").component("dit").lora is None
    (tmp_path / "a.safetensors").touch()
    lora["init_from"] = str(tmp_path / "a.safetensors")
    model = make_config(tiny_checkpoint, model={"dit": {"trainable": "lora", "lora": lora}}).model
    dit = build_inference_plan(model, device="cpu").component("dit")
    assert dit.lora is not None
    assert dit.trained_numel == dit.gradient_bytes == 0
    assert dit.adapter_bytes > 0


def test_an_adapter_file_that_is_missing_is_refused_before_loading(tiny_checkpoint: Path) -> None:
    dit = {"trainable": "lora", "lora": {"init_from": "nowhere.safetensors"}}
    with pytest.raises(ConfigError, match=r'lora\.init_from: the file "nowhere\.safetensors"'):
        make_plan(tiny_checkpoint, model={"dit": dit})


def test_weights_that_are_fp8_in_the_file_are_kept(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint / "transformer", tmp_path / "transformer"))
    for file in folder.glob("*.safetensors"):
        save_file({k: v.to(torch.float8_e4m3fn) for k, v in load_file(file).items()}, file)
    dit = {"trainable": "lora", "source": str(folder), "precision": "fp8"}
    plan = make_plan(tiny_checkpoint, model={"dit": dit})
    group = next(g for g in plan.component("dit").groups if g.name == "fp8_as_published")
    assert group.scaling == "none"
    assert group.resting_bytes == group.numel
    assert {g.name for g in plan.component("dit").groups} == {"fp8_as_published", "high_precision"}
    assert plan.component("dit").source == str(folder)


def test_everything_wrong_is_in_one_report(tiny_checkpoint: Path) -> None:
    model = {
        "dit": {
            "trainable": "lora",
            "precision": "fp8",
            "lora": {"target_modules": ["attn.q", "attn.to_k"]},
            "fp8": {"keep_high_precision": ["norm_outt"]},
        },
        "vae": {"precision": "fp8"},
        "text_encoder": {"trainable": "lora", "lora": {"target_modules": ["self_attn.query"]}},
    }
    with pytest.raises(ConfigError, match="4 faults") as caught:
        make_plan(tiny_checkpoint, model=model)
    text = str(caught.value)
    for part in (
        'model.dit.lora.target_modules[0]: "attn.q" matches 0 of 34 linear layers in dit',
        "Nearest: attn.to_q",
        'model.dit.fp8.keep_high_precision[0]: "norm_outt" matches 0',
        "model.vae.precision: fp8 would store no layer of vae in FP8",
        "Set model.vae.fp8.layers=[conv], or model.vae.precision=bf16",
        "model.text_encoder.lora.target_modules[0]",
    ):
        assert part in text


def test_adapters_beside_3d_convolutions_are_refused(tiny_checkpoint: Path) -> None:
    vae = {"trainable": "lora", "lora": {"target_modules": ["conv1", "to_qkv"]}}
    with pytest.raises(
        ConfigError, match=r"model\.vae\.lora\.target_modules: 16 chosen layers are 3-D"
    ):
        make_plan(tiny_checkpoint, model={"vae": vae, "dit": {}})


def test_family_defaults_that_match_nothing_are_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"other.weight": torch.zeros(4, 4)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="matches 0 of 1 linear layers in vae"):
        make_plan(
            tiny_checkpoint, model={"dit": {}, "vae": {"trainable": "lora", "source": str(folder)}}
        )


def test_a_single_source_error_is_raised_as_itself(tiny_checkpoint: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        make_plan(tiny_checkpoint.parent / "nothing")


@pytest.mark.parametrize(
    ("name", "folder", "config"),
    [
        ("dit", "transformer", '{"_class_name": "FluxTransformer2DModel"}'),
        ("text_encoder", "text_encoder", '{"model_type": "clip_text_model"}'),
    ],
)
def test_another_familys_component_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, name: str, folder: str, config: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint / folder, other)
    (other / "config.json").write_text(config)
    model = {"dit": {"trainable": "lora"}}
    model[name] = model.get(name, {}) | {"source": str(other)}
    with pytest.raises(SourceError, match=r"this is no (Qwen|qwen2_5_vl)") as caught:
        make_plan(tiny_checkpoint, model=model)
    assert caught.value.where == str(other)
    assert "family qwen_image" in caught.value.hint


def test_several_source_errors_are_one_report(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = {"dit": {"trainable": "lora", "source": "./a"}, "vae": {"source": str(tmp_path)}}
    with pytest.raises(ConfigError, match="2 faults") as caught:
        make_plan(tiny_checkpoint, model=model)
    assert "model.dit.source:" in str(caught.value)
    assert "model.vae.source:" in str(caught.value)


def test_tensors_that_are_not_floats_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(4, 4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model\.dit\.source: .*a\.weight has dtype I8"):
        make_plan(tiny_checkpoint, model={"dit": {"trainable": "full", "source": str(tmp_path)}})


def test_a_plan_is_frozen_and_round_trips(tiny_checkpoint: Path) -> None:
    plan = make_plan(tiny_checkpoint)
    with pytest.raises(ValidationError, match="frozen"):
        plan.device = "cuda"  # type: ignore[misc]
    computed = {
        "numel",
        "resting_bytes",
        "trained_numel",
        "adapter_bytes",
        "gradient_bytes",
        "ema_bytes",
    }

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: bare(v) for k, v in value.items() if k not in computed}
        return [bare(v) for v in value] if isinstance(value, list | tuple) else value

    assert VramPlan.model_validate(bare(plan.model_dump())) == plan
    with pytest.raises(KeyError, match="unet"):
        plan.component("unet")
    assert not plan.has("unet")


def test_same_mapping_for_every_family_component() -> None:
    fields = set(ModelConfig.model_fields)
    for spec in FAMILIES.values():
        assert set(spec.components) <= fields


def test_planning_leaves_torch_unloaded(tiny_checkpoint: Path) -> None:
    code = f"""
import sys
from framework.plan.build import build_run_plan
from framework.plan.table import plan_json, render_plan
from framework.schema import RunConfig
config = RunConfig.model_validate({{
    "model": {{"family": "qwen_image", "source": {str(tiny_checkpoint)!r},
              "dit": {{"trainable": "lora", "precision": "fp8"}}}},
    "data": {{"path": "p"}}, "run": {{"name": "t"}}}})
plan = build_run_plan(config, device="cpu")
plan_json(plan), render_plan(plan)
heavy = {{"torch", "numpy", "diffusers", "transformers", "peft", "lightning"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])

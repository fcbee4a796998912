"""Other trainers' names and our own old ones: every one has an answer, and every answer exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from framework.schema import renamed
from framework.schema.names import known_paths
from framework.schema.renamed import (
    explain_flag,
    explain_key,
    read_table,
    table,
    value_called_elsewhere,
)
from framework.schema.run import RunConfig
from framework.schema.validate import judge_values
from framework.schema.wording import slot_at
from tests.unit.schema.minimal import assert_whole, changed, faults_of

TABLE_FILE = Path(renamed.__file__).with_name("renamed.yaml")
COMPONENTS = ("dit", "text_encoder", "vae")
SECTIONS = tuple(RunConfig.model_fields)


def test_every_row_answers_with_keys_that_exist() -> None:
    paths = known_paths(RunConfig)
    assert len(table().foreign) > 500
    for name, row in table().foreign.items():
        for key in (*row.keys, *row.closest):
            for component in COMPONENTS if "{component}" in key else ("",):
                assert key.replace("{component}", component) in paths, (name, key)
        assert bool(row.key) != bool(row.reason), f"{name} needs a key or a reason, and not both"
        text = f"{row.note} {row.reason}"
        for mentioned in re.findall(rf"\b((?:{'|'.join(SECTIONS)})\.[a-z0-9_.]*[a-z0-9_])", text):
            assert mentioned in paths, (name, mentioned)
        assert not row.reason.endswith("."), name
        assert not row.note or row.note.endswith("."), name
        assert not re.search(r"\b(yet|soon|planned|will be)\b", text), f"{name} promises something"


def test_what_a_row_writes_is_valid() -> None:
    """A fixed value must be one that the key takes."""
    for name, row in table().foreign.items():
        for key in row.for_value(None).keys if row.fixed else ():
            slot = slot_at(RunConfig, tuple(key.split(".")))
            assert slot is not None, name
            assert row.fixed in slot.choices or not slot.choices, name


def test_every_value_that_is_offered_is_allowed() -> None:
    paths = known_paths(RunConfig)
    for key, values in table().values.items():
        meant = [path for path in paths if path == key or path.endswith(f".{key}")]
        assert meant, key
        for path in meant:
            slot = slot_at(RunConfig, tuple(path.split(".")))
            assert slot is not None
            element = slot.element(0) or slot
            for here in values.values():
                if element.choices:
                    assert here in element.choices, (path, here)
                else:
                    _, faults, _ = judge_values(changed({path: here}), lambda _: "here")
                    assert faults == []


def test_every_flag_of_diffsynth_studio_has_an_answer_that_names_it() -> None:
    flags = yaml.safe_load(TABLE_FILE.read_text(encoding="utf-8"))["diffsynth"].split()
    assert len(flags) == 85
    for flag in flags:
        row = table().foreign[flag]
        assert row.trainer == "DiffSynth-Studio"
        fault = explain_flag(f"--{flag}", "1")
        assert fault.code == "foreign-flag"
        assert fault.where == f"command line: --{flag} 1"
        assert fault.hint
        assert fault.message.startswith("settings are written key=value, without dashes; ")


@pytest.mark.parametrize(
    ("flag", "value", "nearest", "hint"),
    [
        ("--fp8_models", "Qwen/Qwen-Image:transformer/*.safetensors", "model.dit.precision",
         "Write model.dit.precision=fp8."),
        ("--fp8_models", "a/text_encoder/x,a/vae/y", "model.text_encoder.precision",
         "Write model.text_encoder.precision=fp8 model.vae.precision=fp8."),
        ("--fp8_models", "a.safetensors", "model.dit.precision", "Write model.dit.precision=fp8."),
        ("--trainable_models", "dit", "model.dit.trainable", "Write model.dit.trainable=full."),
        ("--lora_base_model", "text_encoder", "model.text_encoder.trainable",
         "Write model.text_encoder.trainable=lora."),
        ("--lora_target_modules", "to_q,to_k,to_out.0", "model.dit.lora.target_modules",
         "Write model.dit.lora.target_modules=[to_q,to_k,to_out.0]."),
        ("--lora_rank", "32", "model.dit.lora.rank", "Write model.dit.lora.rank=32. The scale is alpha / rank"),
        ("--network_dim", "32", "model.dit.lora.rank", "Write model.dit.lora.rank=32."),
        ("--learning_rate", "1e-4", "optim.lr", "Write optim.lr=1e-4."),
        ("--learning-rate", "1e-4", "optim.lr", "Write optim.lr=1e-4."),
        ("--use_gradient_checkpointing", None, "model.dit.gradient_checkpointing",
         "Write model.dit.gradient_checkpointing=true."),
        ("--resolution", "512", "data.max_px", "Write data.max_px=262144."),
        ("--resolution", "1024,768", "data.max_px", "Write data.max_px=786432."),
        ("--max_pixels", "1048576", "data.max_px", "Write data.max_px=1048576."),
        ("--num_epochs", "5", "trainer.max_steps",
         "Set trainer.max_steps. A run's length is counted in optimizer steps"),
        ("--customized_optimizer", "bitsandbytes.optim.Adam8bit", "optim.name", "Write optim.name=adamw_8bit."),
        ("--optimizer", "came", "optim.name", "Set optim.name."),
        ("--mixed_precision", "bf16", "model.compute_dtype", "Write model.compute_dtype=bf16."),
        ("--mixed_precision", "no", "model.compute_dtype", "Write model.compute_dtype=fp32."),
        ("--model_id_with_origin_paths", "Qwen/Qwen-Image:transformer/d*.safetensors,Qwen/Qwen-Image:vae/v*",
         "model.source", "Write model.source=Qwen/Qwen-Image."),
        ("--dataset_base_path", "data/my pictures", "data.path", "Write 'data.path=\"data/my pictures\"'."),
        ("--offload_models", "a/vae/x", "model.vae.offload", "Write model.vae.offload=disk."),
        ("--preset_lora_path", "x", "model.dit.lora.preset", "To go on training a LoRA itself"),
        ("--lr", "1e-4", "optim.lr", "Write optim.lr=1e-4."),
        ("--model.dit.precision", "fp8", "model.dit.precision", "Write model.dit.precision=fp8."),
        ("--max-steps", None, "trainer.max_steps", "Set trainer.max_steps."),
        ("--learning_rte", "1", "optim.lr", "Write optim.lr=1."),
        ("--xyzzy", None, "", "All keys are listed by `octavo schema`"),
    ],
)  # fmt: skip
def test_a_flag_is_answered_with_what_to_write(
    flag: str, value: str | None, nearest: str, hint: str
) -> None:
    fault = explain_flag(flag, value)
    assert_whole(fault)
    assert fault.path == flag
    assert fault.value == (value or "")
    assert fault.nearest[:1] == ((nearest,) if nearest else ())
    assert hint in fault.hint
    assert "=..." not in fault.hint


@pytest.mark.parametrize(
    ("key", "value", "nearest", "message", "hint"),
    [
        ("fp8_models", "transformer/*", "model.dit.precision", "what DiffSynth-Studio calls fp8_models", "=fp8."),
        ("optim.learning_rate", 1e-3, "optim.lr", "is optim.lr here", "Write optim.lr=0.001."),
        ("model.dit.dtype", "float8", "model.dit.precision", "is model.dit.precision here", "model.dit.precision=fp8."),
        ("model.vae.dtype", "bf16", "model.vae.precision", "is model.vae.precision here", "model.vae.precision=bf16."),
        ("model.dtype", "bfloat16", "model.compute_dtype", "is model.compute_dtype here", "=bf16."),
        ("model.text_encoder.lora_rank", 8, "model.text_encoder.lora.rank", "model.text_encoder.lora.rank here",
         "model.text_encoder.lora.alpha"),
        ("trainer.steps", 9, "trainer.max_steps", "", "trainer.max_steps=9."),
        ("sample.steps", 9, "sample.num_inference_steps", "", "sample.num_inference_steps=9."),
        ("data.resolution", [512, 768], "data.max_px", "", "data.max_px=589824."),
        ("model.qtype", "qfloat8", "model.dit.precision", "", "model.dit.precision=fp8."),
        ("trainer.blocks_to_swap", 20, "model.dit.offload", "is model.dit.offload here", "=host. Write"),
        ("network", {"type": "lora", "linear": 16}, "", "unknown key", "linear is model.dit.lora.rank"),
        ("network", {"linear": 16}, "model.dit.lora.rank", "what other trainers call linear", "=16."),
    ],
)  # fmt: skip
def test_a_key_of_another_trainer_is_answered_in_a_configuration(
    key: str, value: Any, nearest: str, message: str, hint: str
) -> None:
    (fault,) = faults_of({key: value}).values()
    assert fault.code == ("renamed-key" if nearest else "unknown-key")
    assert fault.message.startswith("unknown key; ")
    assert message in fault.message
    if nearest:
        assert fault.nearest[0] == nearest
    assert hint in fault.hint


def test_a_key_of_ours_in_the_wrong_place_is_no_other_trainers() -> None:
    assert explain_key("trainer.batch_size") is None
    fault = faults_of({"trainer.batch_size": 4})["trainer.batch_size"]
    assert fault.nearest[0] == "data.batch_size"


def test_values_of_other_trainers_are_known_for_lists_and_components() -> None:
    assert value_called_elsewhere("model.vae.precision", "BFloat16") == "bf16"
    assert value_called_elsewhere("model.dit.fp8.layers[0]", "conv2d") == "conv"
    assert value_called_elsewhere("optim.lr", "bfloat16") is None


OWN = """
trainers: {d: DiffSynth-Studio}
diffsynth: ""
foreign: {}
values: {}
own:
  - {old: model.dit.dtype, new: model.dit.precision, version: 0.3, note: It takes fp8 or bf16.}
  - {old: trainer.amp, gone: what trains is always float32, version: "0.4"}
"""


@pytest.mark.parametrize(
    ("key", "value", "message", "hint", "nearest"),
    [
        ("model.dit.dtype", "fp8", "unknown key; since version 0.3 model.dit.dtype is called model.dit.precision",
         "Write model.dit.precision=fp8. It takes fp8 or bf16.", ("model.dit.precision",)),
        ("trainer.amp", True, "unknown key; since version 0.4 trainer.amp is gone: what trains is always float32",
         "Remove it.", ()),
    ],
)  # fmt: skip
def test_a_key_that_octavo_once_had_is_answered_with_the_version(
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    value: Any,
    message: str,
    hint: str,
    nearest: tuple[str, ...],
) -> None:
    own = read_table(OWN)
    monkeypatch.setattr(renamed, "table", lambda: own)
    fault = faults_of({key: value})[key]
    assert fault.code == "renamed-key"
    assert fault.message == message
    assert fault.hint == hint
    assert fault.nearest == nearest


def test_own_old_keys_lead_to_keys_that_exist() -> None:
    paths = known_paths(RunConfig)
    for old, row in table().own.items():
        assert old not in paths
        assert row.version
        assert set(row.keys) <= set(paths)


def test_a_name_that_stands_twice_is_refused() -> None:
    twice = OWN.replace("foreign: {}", "foreign: {a b: {none: x}, b c: {none: y}}")
    with pytest.raises(AssertionError, match="b stands twice"):
        read_table(twice)


def test_the_table_is_read_only_for_a_fault() -> None:
    program = (
        "from framework.schema import renamed, validate\n"
        "from tests.unit.schema.minimal import MINIMAL, changed\n"
        "validate.judge_values(MINIMAL, str)\n"
        "assert renamed.table.cache_info().currsize == 0\n"
        "validate.judge_values(changed({'learning_rate': 1}), str)\n"
        "assert renamed.table.cache_info().currsize == 1\n"
    )
    root = Path(renamed.__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)

"""Layer names against the checkpoint's headers: what matches nothing, what can't be read, and never a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from framework.judge import layers
from framework.judge.disk import check_files
from framework.schema.validate import judge_values
from tests.unit.judge.checking import check, only_fault
from tests.unit.schema.minimal import changed

ROOT = Path(__file__).parents[3]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> Path:
    """A working directory with a checkpoint of its own in `model`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_checkpoint, "model")
    Path("data/cats").mkdir(parents=True)
    Path("data/cats/1.png").touch()
    return tmp_path


def lora(**keys: Any) -> dict[str, Any]:
    return {"model.dit.lora": {"rank": 4, "alpha": 4, **keys}}


def test_target_modules_that_match_nothing_come_with_the_nearest(here: Path) -> None:
    fault = only_fault(check(lora(target_modules=["attn.to_q", "attn.to_qq"])))
    assert fault.path == "model.dit.lora.target_modules[1]"
    assert fault.where == "place of model.dit.lora.target_modules[1]"
    assert (fault.code, fault.value) == ("layer-name", "attn.to_qq")
    assert '"attn.to_qq" matches 0 of' in fault.message
    assert "attn.to_q" in fault.nearest
    assert "octavo plan" in fault.hint


def test_patterns_of_high_precision_that_match_nothing_are_refused(here: Path) -> None:
    changes = {
        "model.dit.precision": "fp8",
        "model.dit.fp8.keep_high_precision": ["img_inn", "txt_in"],
    }
    fault = only_fault(check(changes))
    assert fault.path == "model.dit.fp8.keep_high_precision[0]"
    assert "img_in" in fault.nearest
    # With bf16 nothing reads them.
    assert check(changes | {"model.dit.precision": "bf16"}).faults == ()


def test_kinds_of_layers_that_the_component_lacks_are_refused(here: Path) -> None:
    changes = {"model.dit.precision": "fp8", "model.dit.fp8.layers": ["conv"]}
    fault = only_fault(check(changes))
    assert fault.path == "model.dit.precision"
    assert "fp8 would store no layer of dit" in fault.message
    assert "model.dit.fp8.layers=[linear]" in fault.hint


def test_several_components_are_judged_in_one_report(here: Path) -> None:
    changes = lora(target_modules=["nothing"]) | {
        "model.vae.trainable": "lora",
        "model.vae.lora": {"target_modules": ["nix"]},
        "model.text_encoder.precision": "fp8",
        "model.text_encoder.fp8.keep_high_precision": ["nil"],
    }
    assert {fault.path for fault in check(changes).faults} == {
        "model.dit.lora.target_modules[0]",
        "model.vae.lora.target_modules[0]",
        "model.text_encoder.fp8.keep_high_precision[0]",
    }


def test_only_components_that_the_run_uses_are_judged(here: Path) -> None:
    shutil.rmtree("model/text_encoder")
    changes = {"model.dit.trainable": "none", "model.vae.trainable": "lora"}
    found = check(changes | {"model.vae.lora": {"rank": 2, "alpha": 2}})
    assert found.faults == ()
    assert found.checked_layers


def test_a_rank_above_the_layers_is_warned_of(here: Path) -> None:
    (warning,) = check(lora(rank=64, alpha=64)).warnings
    assert warning.path == "model.dit.lora.rank"
    assert "rank 64 is more than the smaller side" in warning.message
    assert check(lora(rank=16, alpha=16)).warnings == ()


def test_a_folder_that_does_not_exist_is_refused_with_its_neighbours(here: Path) -> None:
    found = check({"model.source": "./modle"})
    fault = only_fault(found)
    assert (fault.path, fault.code) == ("model.source", "file")
    assert fault.nearest == ("./model",)
    assert fault.hint == "Write model.source=./model."
    assert not found.checked_layers
    found = check({"model.source": "./modle"}, need=False)
    assert found.faults == ()
    assert [fault.path for fault in found.warnings] == ["model.source"]


def test_a_components_own_source_is_named(here: Path) -> None:
    assert only_fault(check({"model.vae.source": "./nothing"})).path == "model.vae.source"


def test_a_folder_taken_for_a_hub_id_is_warned_of(here: Path) -> None:
    Path("models").mkdir()
    Path("models/pocket").symlink_to(Path("model").resolve())
    found = check({"model.source": "models/pockt"})
    (warning,) = found.warnings
    assert "taken for a repository on the hub" in warning.message
    assert warning.nearest == ("models/pocket",)
    assert not found.checked_layers
    # Nothing near: a hub id like any other.
    found = check({"model.source": "Some/Model"})
    assert (found.faults, found.warnings, found.checked_layers) == ((), (), False)


def test_a_checkpoint_in_the_hubs_cache_is_read_there(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = "0" * 40
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "cache"))
    repository = here / "cache" / "models--Some--Model"
    shutil.copytree("model", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    changes = {"model.source": "Some/Model"} | lora(target_modules=["attn.to_qq"])
    found = check(changes)
    assert only_fault(found).path == "model.dit.lora.target_modules[0]"
    assert found.checked_layers
    # One that was fetched in part would have to be fetched first, so nothing is said.
    next((repository / "snapshots" / commit / "transformer").glob("*.safetensors")).unlink()
    found = check(changes)
    assert (found.faults, found.checked_layers) == ((), False)


@pytest.mark.parametrize("need", [True, False])
def test_a_damaged_checkpoint_is_a_fault_on_every_machine(here: Path, need: bool) -> None:
    shard = next(Path("model/transformer").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    fault = only_fault(check(need=need))
    assert (fault.path, fault.code) == ("model.source", "file")
    assert shard.name in fault.message


def test_a_checkpoint_of_another_model_is_a_fault(here: Path) -> None:
    Path("model/transformer/config.json").write_text(json.dumps({"_class_name": "FluxTransformer"}))
    fault = only_fault(check())
    assert "this is no QwenImageTransformer2DModel" in fault.message
    assert "qwen_image" in fault.hint


def test_a_checkpoint_that_changes_is_read_again(here: Path) -> None:
    assert check().faults == ()
    shard = next(Path("model/transformer").glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    assert len(check().faults) == 1
    shard.write_bytes(whole)
    assert check().faults == ()


def test_headers_are_read_once_for_many_configurations(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    genuine = layers.read_headers
    monkeypatch.setattr(
        layers, "read_headers", lambda files: read.append(files.folder) or genuine(files)
    )
    values = changed({"model.source": "model", "data.path": "data/cats"})
    config, _, _ = judge_values(values, lambda _: "here")
    assert config is not None
    check_files(config, lambda _: "here", use="train", need=True)
    assert len(read) == 3
    start = time.perf_counter()
    for step in range(100):
        other = config.model_copy(
            update={"trainer": config.trainer.model_copy(update={"max_steps": step + 1})}
        )
        check_files(other, lambda _: "here", use="train", need=True)
    assert len(read) == 3
    assert (time.perf_counter() - start) / 100 < 0.02  # 0.001 s here; a header alone takes longer


def test_the_network_is_never_asked_and_torch_is_not_loaded(here: Path) -> None:
    """In a process of its own, where a socket can't be opened and the hub isn't set to offline."""
    program = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('a socket was opened')\n"
        "socket.socket.connect = refuse\n"
        "from framework.judge.disk import check_files\n"
        "from framework.schema.validate import judge_values\n"
        "from tests.unit.schema.minimal import changed\n"
        "config, _, _ = judge_values(changed({'model.source': 'Qwen/Qwen-Image'}), str)\n"
        "found = check_files(config, str, use='train', need=True)\n"
        "assert [f.path for f in found.faults] == ['data.path'], found\n"
        "assert not found.checked_layers\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(here / "none")}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=here, env=environment)

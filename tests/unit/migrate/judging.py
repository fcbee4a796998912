"""What the tests of `octavo migrate` share: a command of DiffSynth-Studio, and how Octavo judges a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from framework.judge import judge_run
from framework.migrate import Migrated, Trainer, migrate

TARGETS = (
    "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,img_mlp.net.2,img_mod.1"
)
MODEL = (
    '--model_id_with_origin_paths "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors,'
    'Qwen/Qwen-Image:text_encoder/model*.safetensors,Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors"'
)
LORA = f'--lora_base_model "dit" --lora_target_modules "{TARGETS}" --lora_rank 32'
DATA = "--dataset_base_path data/set --dataset_metadata_path data/set/metadata.csv"
OUTPUT = '--output_path "./models/train/Qwen-Image_lora"'
START = "accelerate launch examples/qwen_image/model_training/train.py"
COMMAND = f"{START} {MODEL} {DATA} {LORA} {OUTPUT}"


def recipe(text: str, trainer: Trainer = "diffsynth", **options: Any) -> Migrated:
    """The only recipe of a text."""
    (found,) = migrate(trainer, text, where="", **options)
    return found


def settings(found: Migrated) -> dict[str, Any]:
    """Dotted path -> value of every key of a recipe."""
    return dict(_leaves(yaml.safe_load(found.text), ""))


def _leaves(node: Any, path: str) -> list[tuple[str, Any]]:
    if not isinstance(node, dict):
        return [(path, node)]
    return [
        leaf for key, value in node.items() for leaf in _leaves(value, f"{path}.{key}".lstrip("."))
    ]


def notes(found: Migrated, kind: str) -> list[str]:
    return [note.name for note in found.notes if note.kind == kind]


def assert_valid(found: Migrated, folder: Path) -> None:
    """Octavo composes the recipe and finds no fault in it."""
    (folder / f"{found.name}.yaml").write_text(found.text, encoding="utf-8")
    verdict = judge_run([f"recipe={found.name}"], use="train", config_dir=folder, files="local")
    assert verdict.faults == (), found.text

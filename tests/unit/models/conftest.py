from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import QwenImagePipeline
from safetensors import safe_open
from torch import nn

from framework.inventory import read_inventory
from framework.models import Family, get_family
from framework.plan.match import module_name


def load(
    family: Family, component: str, folder: Path, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Build a component and fill it, as the runtime does but in one plain format."""
    with init_empty_weights(include_buffers=False):
        module = family.build_module(component, folder)
    spec = family.spec.components[component]
    weights = {}
    for key, stored in read_inventory(folder).items():
        name = module_name(key, spec)
        if name is not None:
            with safe_open(folder / Path(stored.file).name, framework="pt") as file:
                weights[name] = file.get_tensor(key).to(dtype)
    module.load_state_dict(weights, strict=True, assign=True)
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def family(tiny_checkpoint: Path) -> Family:
    family = get_family("qwen_image")
    family.load_extras(
        {"tokenizer": tiny_checkpoint / "tokenizer", "scheduler": tiny_checkpoint / "scheduler"}
    )
    return family


@pytest.fixture(scope="session")
def modules(family: Family, tiny_checkpoint: Path) -> dict[str, nn.Module]:
    """All components in float32. Not to be changed: load your own for that."""
    return {
        name: load(family, name, tiny_checkpoint / spec.subfolder)
        for name, spec in family.spec.components.items()
    }


@pytest.fixture(scope="session")
def pipeline(tiny_checkpoint: Path) -> QwenImagePipeline:
    pipeline = QwenImagePipeline.from_pretrained(str(tiny_checkpoint), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

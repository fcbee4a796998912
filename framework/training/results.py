"""What a finished run leaves behind: the adapter, the trained components, the sheet."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework import __version__
from framework.hub import fetch_place
from framework.runtime.adapters import save_lora

LORA_FILE = "lora.safetensors"
MODEL_FOLDER = "model"


@dataclass(frozen=True)
class RunResult:
    """What `fit` returns.

    lora_path, model_path, sheet_path: None where the run has no such result.
    val_loss: the last held-out loss; None without validation.
    peak_memory_bytes: of the device on a GPU, of the process on the CPU.
    is_first_process: False in the helper processes of a run on several; they have nothing to report.
    """

    run_dir: Path
    steps: int
    lora_path: Path | None
    model_path: Path | None
    sheet_path: Path | None
    last_train_loss: float
    val_loss: float | None
    peak_memory_bytes: int
    is_first_process: bool = True


def save_results(module: Any, run_dir: Path, *, steps: int) -> tuple[Path | None, Path | None]:
    """Write the LoRA file and the fully trained components, with averaged weights where they are kept.

    Returns (LoRA file, folder of the components), None for what doesn't train.
    """
    plan, components = module.plan, module.components
    adapters = [c for c in plan.components if c.trainable == "lora"]
    adapted = {c.name: components[c.name] for c in adapters}
    full = [c for c in plan.components if c.trainable == "full"]
    averaged = module.ema.swapped() if module.ema is not None else nullcontext()
    with averaged:
        if adapted:
            # Where a component has a source of its own, that is what the adapter fits: the DiT's, if it has one.
            base = max(adapters, key=lambda component: component.name == "dit")
            metadata = {
                "base_model": base.source,
                "base_commit": base.commit or "",
                "steps": str(steps),
                "trained_with": f"octavo {__version__}",
            }
            save_lora(run_dir / LORA_FILE, adapted, metadata=metadata)
        for component in full:
            subfolder = module.family.spec.components[component.name].subfolder
            module.family.save_full_component(
                component.name,
                components[component.name],
                run_dir / MODEL_FOLDER / subfolder,
                source_folder=fetch_place(component.folder),
            )
    return (
        run_dir / LORA_FILE if adapted else None,
        run_dir / MODEL_FOLDER if full else None,
    )

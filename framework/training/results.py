"""What a finished run leaves behind: the adapter, the trained components, the sheet."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework import __version__
from framework.errors import ConfigError, Fault
from framework.hub import fetch_place
from framework.models.published_layout import save_component
from framework.plan.types import VramPlan
from framework.runtime.adapters import save_lora
from framework.runtime.lora_files import CONFIG_KEY
from framework.runtime.lora_writing import RESULT_NAMES
from framework.schema import RunConfig
from framework.schema.lora_keys import FAMILY_NAMES, why_not

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


def check_exports(config: RunConfig, plan: VramPlan) -> VramPlan:
    """The plan, unless a form of `export.formats` has no name for a layer that trains.   Raises ConfigError."""
    names = FAMILY_NAMES.get(plan.family)
    faults = []
    for index, form in enumerate(config.export.formats):
        for part in plan.components:
            if part.trainable != "lora" or part.lora is None or names is None:
                continue
            layers = {layer.name: part.lora.use_dora for layer in part.lora.layers}
            reason = why_not(names, part.name, layers, form)
            if reason is not None:
                hint = f"Leave {form} out, or these layers out of model.{part.name}.lora.target_modules."
                faults.append(
                    Fault(f"export.formats[{index}]", f"{form}: {reason}", hint=hint, code="rule")
                )
    if faults:
        raise ConfigError(faults)
    return plan


def save_results(module: Any, run_dir: Path, *, steps: int) -> tuple[Path | None, Path | None]:
    """Write the LoRA file and the fully trained components, with averaged weights where they are kept.

    The LoRA is written once for each of `export.formats`.
    Returns (the first LoRA file, folder of the components), None for what doesn't train.
    """
    plan, components = module.plan, module.components
    adapters = [c for c in plan.components if c.trainable == "lora"]
    adapted = {c.name: components[c.name] for c in adapters}
    full = [c for c in plan.components if c.trainable == "full"]
    written: list[Path] = []
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
                "modelspec.title": module.config.run.name,
                CONFIG_KEY: json.dumps(module.config.model_dump(mode="json"), sort_keys=True),
                "octavo.dataset_hash": _dataset_hash(module.trainer.datamodule),
            }
            for form in dict.fromkeys(module.config.export.formats):
                written += save_lora(
                    run_dir / RESULT_NAMES[form],
                    adapted,
                    form=form,
                    family=_known(plan.family),
                    metadata=metadata,
                    scale_in_header=False,
                )
        for component in full:
            spec = module.family.spec.components[component.name]
            folder = fetch_place(component.folder)
            save_component(
                spec,
                components[component.name],
                run_dir / MODEL_FOLDER / spec.subfolder,
                source_folder=folder,
                source_files=component.source_files(folder),
            )
    return (
        written[0] if written else None,
        run_dir / MODEL_FOLDER if full else None,
    )


def _known(family: str) -> str | None:
    """The family, if its layers have names in other programs."""
    return family if family in FAMILY_NAMES else None


def _dataset_hash(data: Any) -> str:
    """Hash of all pictures and captions, held out or not, whatever their order and their files' names."""
    sets = [data.train_set, *([data.validation_set] if data.validation_set is not None else [])]
    rows = sorted(
        f"{checked.content_key} {checked.sample.caption}" for one in sets for checked in one.samples
    )
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()

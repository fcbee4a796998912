"""Which weights a run trains, and whether a checkpoint holds just those."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from framework.errors import RunError

_NUM_NAMED = 5
_KEYS = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "generators", "family")


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that gradients update, in the module's order."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def check_trained_state(
    checkpoint: Mapping[str, Any],
    trained: Mapping[str, nn.Parameter],
    *,
    family: str,
    optimizer_name: str,
) -> None:
    """Refuse a checkpoint that isn't of the same family, weights (names and shapes) and optimizer.

    Raises RunError that names what differs; nothing has been changed then.
    """
    missing_keys = [key for key in _KEYS if key not in checkpoint]
    if missing_keys:
        raise RunError(
            "this is no checkpoint of a run", found=f"it lacks {', '.join(missing_keys)}"
        )
    if checkpoint["family"] != family:
        raise _mismatch(f"it is of family {checkpoint['family']}, this run of {family}")
    saved = checkpoint["state_dict"]
    absent = [name for name in trained if name not in saved]
    surplus = [name for name in saved if name not in trained]
    if absent or surplus:
        parts = []
        if absent:
            parts.append(f"{len(absent)} weights train here but aren't in it: {_listing(absent)}")
        if surplus:
            parts.append(f"{len(surplus)} of its weights don't train here: {_listing(surplus)}")
        raise _mismatch("; ".join(parts))
    for name, parameter in trained.items():
        if saved[name].shape != parameter.shape:
            raise _mismatch(
                f"{name} has shape {tuple(saved[name].shape)} in it and "
                f"{tuple(parameter.shape)} here"
            )
    if checkpoint.get("optimizer_name") != optimizer_name:
        raise _mismatch(
            f"its optimizer is {checkpoint.get('optimizer_name')}, this run's {optimizer_name}"
        )


def _mismatch(found: str) -> RunError:
    return RunError(
        "the checkpoint doesn't belong to this configuration",
        found=found,
        hint="train the same components, adapters and optimizer as the run it came from, or start "
        "anew with checkpoint.resume=never (a LoRA file can be given as lora.init_from)",
    )


def _listing(names: list[str]) -> str:
    rest = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")

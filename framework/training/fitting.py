"""Turns `model.fit` into settings before anything is planned or written, the same for a run that is gone on with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_only

from framework.plan.fit import fitting, override_lines
from framework.plan.fit_choices import changed_keys, free_keys, present_choice, with_keys
from framework.runtime.fitting import fit_run
from framework.schema import RunConfig
from framework.training.run_folder import CONFIG_FILE, FREE_KEYS, numbered_folders, read_state

log = logging.getLogger("octavo")


def resolve_fit(config: RunConfig, config_yaml: str, *, device: str) -> tuple[RunConfig, str]:
    """Return the configuration with the settings that `model.fit` chooses, and its text.

    An unfinished run of the same request keeps the settings that it began with, whatever would be chosen today. The
    result has every key set, so that it chooses nothing when it is read again.
    device: "cpu", "cuda:0", ...   Raises PlanError where nothing fits.
    """
    if config.model.fit is None:
        return config, config_yaml
    chosen = _chosen_before(config)
    if chosen is None:
        model, _ = fitting(fit_run(config, device=device))
    else:
        model = with_keys(config.model, chosen)
    _tell(config, changed_keys(config.model, present_choice(model)), model.vram_limit)
    resolved = config.model_copy(update={"model": model})
    values = resolved.model_dump(mode="json")
    return resolved, yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


@rank_zero_only
def _tell(config: RunConfig, keys: Mapping[str, Any], vram_limit: float | None) -> None:
    if vram_limit != config.model.vram_limit:
        keys = {**keys, "vram_limit": vram_limit}
    settings = " ".join(override_lines(keys)) or "nothing to change"
    log.info("model.fit=%s: %s", config.model.fit, settings)


def _chosen_before(config: RunConfig) -> dict[str, Any] | None:
    """What the newest unfinished run of the same request chose; None where there is none."""
    if config.checkpoint.resume != "auto":
        return None
    free = free_keys(config.model)
    asked = _request(config.model_dump(mode="json"), free)
    parent = Path(config.run.output_dir).expanduser().absolute() / config.run.name
    for folder in reversed(numbered_folders(parent)):
        try:
            values = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if not isinstance(values, dict) or _request(values, free) != asked:
            continue
        if read_state(folder).get("state") == "finished":
            return None
        return {path: _at(values, path) for path in free}
    return None


def _request(values: Mapping[str, Any], free: frozenset[str]) -> dict[str, Any]:
    """Everything but what may be chosen, and but what may differ when a run is gone on with."""
    skipped = tuple(f"model.{path}" for path in free) + tuple(".".join(key) for key in FREE_KEYS)
    return {
        path: value
        for path, value in _flat(values, "").items()
        if path not in skipped and not path.startswith(tuple(f"{key}." for key in skipped))
    }


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        found |= _flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return found


def _at(values: Mapping[str, Any], path: str) -> Any:
    node: Any = values["model"]
    for piece in path.split("."):
        node = node[piece]
    return node

"""YAML files and command-line overrides become plain values, each with the place that set it.

The only part of Octavo that imports Hydra or OmegaConf, beside the launchers of sweeps. Nothing is run, logged or
written here, and nothing that a configuration holds is imported or called.
"""

from framework.compose.composition import Composer, Composition, compose_run
from framework.compose.provenance import Provenance
from framework.compose.sources import (
    conf_dir,
    recipe_files,
    recipe_folders,
    recipe_names,
    shipped_recipes_dir,
)
from framework.compose.sweep import (
    SweepRequest,
    override_text,
    read_sweep,
    replace_overrides,
)
from framework.compose.sweep_values import MAX_POINTS, Dimension

__all__ = [
    "MAX_POINTS",
    "Composer",
    "Composition",
    "Dimension",
    "Provenance",
    "SweepRequest",
    "compose_run",
    "conf_dir",
    "override_text",
    "read_sweep",
    "recipe_files",
    "recipe_folders",
    "recipe_names",
    "replace_overrides",
    "shipped_recipes_dir",
]

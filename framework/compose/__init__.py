"""YAML files and command-line overrides become plain values, each with the place that set it.

The only part of Octavo that imports Hydra or OmegaConf. Hydra's compose API is used, so nothing is run, logged or
written here, and nothing that a configuration holds is imported or called.
"""

from framework.compose.composition import Composition, compose_run
from framework.compose.provenance import Provenance
from framework.compose.sources import conf_dir, recipe_names, shipped_recipes_dir

__all__ = [
    "Composition",
    "Provenance",
    "compose_run",
    "conf_dir",
    "recipe_names",
    "shipped_recipes_dir",
]

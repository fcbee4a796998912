"""`octavo plan`: what a run will hold in memory, worked out without reading a weight."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from framework.cli.configuration import judged_config
from framework.cli.report import output_console
from framework.errors import ConfigError, Fault


def run_plan(
    overrides: Sequence[str],
    *,
    as_json: bool,
    layers: str | None,
    config_dir: Path | None = None,
) -> None:
    """Print the plan as tables or JSON, or the layers of one component.

    layers: name of a component, e.g. "dit".   config_dir: a folder of recipes that is searched first.
    Only the plan goes to stdout.
    Raises ConfigError, SourceError or PlanError. Reads configuration files and headers; torch stays unloaded.
    """
    with judged_config(overrides, use="plan", config_dir=config_dir) as config:
        components = tuple(config.model.components)
        if layers is not None and layers not in components:
            message = f"there is no component {layers!r} in {config.model.family}"
            raise ConfigError(
                [Fault("--layers", message, f"command line: --layers {layers}", components)]
            )
        from framework.plan.build import build_run_plan
        from framework.plan.table import layers_table, plan_json, render_plan

        plan = build_run_plan(config, device=config.model.device)
    if layers is not None:
        output_console().print(layers_table(plan, layers))
    elif as_json:
        sys.stdout.write(plan_json(plan).rstrip("\n") + "\n")
    else:
        output_console().print(render_plan(plan))

"""`octavo plan`: what a run will hold in memory, worked out without reading a weight."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from framework.cli.configuration import judged_config
from framework.cli.report import error_console, output_console
from framework.errors import ConfigError, Fault, PlanError
from framework.plan.types import VramPlan
from framework.schema.run import RunConfig
from framework.schema.sizes import read_size_bytes


def run_plan(
    overrides: Sequence[str],
    *,
    as_json: bool,
    layers: str | None,
    activations: bool = True,
    chart: Path | None = None,
    config_dir: Path | None = None,
) -> None:
    """Print the plan as tables or JSON, or the layers of one component.

    layers: name of a component, e.g. "dit".   config_dir: a folder of recipes that is searched first.
    activations: trace them, which takes torch and some seconds; without, torch stays unloaded.
    chart: a .png or .svg file to draw the phases into.
    Only the plan goes to stdout. Reads configuration files and headers.
    Raises ConfigError, SourceError or PlanError.
    """
    with judged_config(overrides, use="plan", config_dir=config_dir) as config:
        components = tuple(config.model.components)
        if layers is not None and layers not in components:
            message = f"there is no component {layers!r} in {config.model.family}"
            raise ConfigError(
                [Fault("--layers", message, f"command line: --layers {layers}", components)]
            )
        from framework.plan.chart import check_chart_name, write_chart
        from framework.plan.table import layers_table, plan_json, render_plan

        if chart is not None:
            check_chart_name(chart)
        if config.model.fit is not None:
            _check_activations(activations)
            plan = _print_fit(config, as_json=as_json, quiet=layers is not None)
            if chart is not None:
                write_chart(plan, chart)
            if layers is not None:
                output_console().print(layers_table(plan, layers))
            return
        plan = _plan(config, activations=activations and layers is None)
    if chart is not None:
        write_chart(plan, chart)
    if layers is not None:
        output_console().print(layers_table(plan, layers))
    elif as_json:
        sys.stdout.write(plan_json(plan).rstrip("\n") + "\n")
    else:
        output_console().print(render_plan(plan))


def _plan(config: RunConfig, *, activations: bool) -> VramPlan:
    """The plan with activations, or without where they aren't asked for or torch isn't installed."""
    from framework.plan.build import build_run_plan

    if config.model.dit.precision == "fp8" and config.model.dit.fp8.error_budget is not None:
        error_console().print(
            "Layers that model.dit.fp8.error_budget keeps in high precision come on top; "
            "`octavo plan --error` reads the weights and says which.",
            style="yellow",
        )
    if activations:
        try:
            from framework.runtime.forecast import forecast_run
        except ModuleNotFoundError as error:
            missing = f"{error.name} isn't installed: activations are not counted"
            error_console().print(missing, style="yellow")
        else:
            return forecast_run(config, device=_device(config.model.device))
    return build_run_plan(config, device=config.model.device)


def _device(name: str) -> str:
    """What `auto` means here; others needn't be there to be planned for."""
    from framework.runtime.devices import resolve_device

    return str(resolve_device(name)) if name == "auto" else name


def fit_overrides(fit: str | None, host: str | None) -> list[str]:
    """Write `--fit` and `--host` as overrides, so that they are judged like any other. Raises ConfigError."""
    if host is not None and fit is None:
        hint = "Give the size of the device, too: --fit 24GiB."
        message = "--host says how much host memory --fit may use, but --fit isn't given"
        raise ConfigError([Fault("--host", message, f"command line: --host {host}", hint=hint)])
    options = {"fit": fit, "fit_host": host}
    for key, size in options.items():
        if size is not None:
            read_size_bytes(size, path="--fit" if key == "fit" else "--host")
    return [f"model.{key}={size}" for key, size in options.items() if size is not None]


def _check_activations(activations: bool) -> None:
    """Refuse to choose settings by weights alone: what fits then may not fit in truth."""
    if not activations:
        hint = "Leave out --no-activations, or leave out --fit and model.fit (model.fit=null)."
        message = "settings can't be chosen without activations"
        where = "command line: --no-activations"
        raise ConfigError([Fault("--no-activations", message, where, hint=hint)])


def _print_fit(config: RunConfig, *, as_json: bool, quiet: bool) -> VramPlan:
    """Print what `model.fit` chooses, unless `quiet`, and return the plan with it.

    Raises PlanError, after the table, where nothing fits.
    """
    try:
        from framework.cli.fit import fit_json, render_fit, run_fit
    except ModuleNotFoundError as error:
        raise PlanError(
            f"choosing settings traces activations, which needs the package {error.name}",
            where="model.fit",
            hint="Install Octavo with all that it needs: pip install octavo.",
        ) from error
    from framework.plan.fit import fitting

    found = run_fit(config)
    if as_json and not quiet:
        sys.stdout.write(fit_json(found) + "\n")
    elif not quiet:
        output_console().print(render_fit(found))
    return fitting(found)[1]

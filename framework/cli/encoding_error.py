"""`octavo plan --error`: what FP8 storage costs in accuracy, measured on the weights themselves."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from framework.cli.configuration import judged_config
from framework.cli.report import error_console, output_console
from framework.errors import ConfigError, Fault
from framework.schema.run import RunConfig

if TYPE_CHECKING:
    from framework.runtime.encoding_report import EncodingReport

_NUM_WORST = 10


def run_encoding_error(
    overrides: Sequence[str], *, as_json: bool, config_dir: Path | None = None
) -> None:
    """Print, for each component with `precision: fp8`, the worst layers, and the error of the DiT's output.

    Only the report goes to stdout.   Raises ConfigError before torch is imported, where nothing is stored in FP8 too;
    SourceError or PlanError later.
    """
    with judged_config(overrides, use="plan", config_dir=config_dir) as config:
        if all(part.precision != "fp8" for part in config.model.components.values()):
            fault = Fault(
                "--error",
                "no component is stored in FP8, so there is no error to measure",
                "command line: --error",
                hint="Add model.dit.precision=fp8.",
            )
            raise ConfigError([fault])
        error_console().print(Text("Reading weights to measure what FP8 changes ...", style="dim"))
        reports = _measure(config)
    if as_json:
        from framework.runtime.encoding_report import report_json

        sys.stdout.write(report_json(reports) + "\n")
        return
    for report in reports:
        output_console().print(_table(report))
        for line in _lines(report):
            output_console().print(Text(line))


def _measure(config: RunConfig) -> list[EncodingReport]:
    from framework.models import get_family
    from framework.runtime.devices import resolve_compute_dtype, resolve_device
    from framework.runtime.error_budget import measure_encoding
    from framework.training.encoding_log import cache_folder

    device = resolve_device(config.model.device)
    return measure_encoding(
        config.model,
        get_family(config.model.family),
        device=device,
        compute_dtype=resolve_compute_dtype(config.model.compute_dtype, device),
        folder=cache_folder(config),
    )


def _table(report: EncodingReport) -> Table:
    with_shares = any(layer.output_share is not None for layer in report.layers)
    table = Table(
        title=f"{report.component} in FP8: the layers that cost most",
        title_justify="left",
        title_style="italic",
        box=box.SIMPLE,
        pad_edge=False,
    )
    table.add_column("layer", overflow="fold")
    for column in ("shape", "weight error", *(["share of output error"] if with_shares else [])):
        table.add_column(column, justify="right")
    if report.kept:
        table.add_column("stored as")
    for layer in report.worst(_NUM_WORST):
        row = [layer.layer, "x".join(str(n) for n in layer.shape), f"{layer.weight_error:.4f}"]
        if with_shares:
            row.append(f"{100 * (layer.output_share or 0):.1f} %")
        if report.kept:
            row.append("high precision" if layer.layer in report.kept else "fp8")
        table.add_row(*row)
    return table


def _lines(report: EncodingReport) -> Iterable[str]:
    yield report.summary
    if report.kept:
        numel = sum(layer.numel for layer in report.layers if layer.layer in report.kept)
        whole = sum(layer.numel for layer in report.layers)
        yield f"Kept in high precision by the budget: {100 * numel / whole:.0f} % of what would rest in FP8."

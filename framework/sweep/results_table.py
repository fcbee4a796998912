"""A comparison as a table for the terminal, and how its numbers are written for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from framework.plan.table import format_bytes
from framework.sweep.folder import short_keys
from framework.sweep.results_read import RunRecord
from framework.sweep.results_rows import (
    PointResult,
    changed_keys,
    differing_basis,
)

_STYLES = {"finished": "", "pruned": "dim", "started": "cyan", "failed": "red", "waiting": "dim"}
_MAX_VALUE_COLUMNS = 28
_MAX_REASONS = 8
_NO_LIMIT = 10_000


@dataclass(frozen=True)
class Column:
    """A column that every comparison may have.

    text: of a row.   number: what it is sorted by on the page, None for an unknown value.
    optional: columns with higher numbers are the first to be left out where there is no room; 0 always stays.
    """

    title: str
    text: Callable[[PointResult], str]
    number: Callable[[PointResult], float | None]
    optional: int = 0


COLUMNS: tuple[Column, ...] = (
    Column("val loss", lambda p: loss_text(p.run.validation_loss), lambda p: p.run.validation_loss),
    Column(
        "best (step)",
        lambda p: best_text(p.run),
        lambda p: p.run.best_validation[1] if p.run.best_validation else None,
        optional=2,
    ),
    Column("train loss", lambda p: loss_text(p.run.train_loss), lambda p: p.run.train_loss, 3),
    Column("steps", lambda p: steps_text(p.run), lambda p: p.run.steps, 1),
    Column("time", lambda p: time_text(p.run), lambda p: p.run.seconds),
    Column("s/step", lambda p: step_time_text(p.run), lambda p: p.run.seconds_per_step, optional=4),
    Column("memory", lambda p: memory_text(p.run), lambda p: p.run.peak_memory_bytes),
)


def results_table(rows: Sequence[PointResult], *, width: int = 100) -> Table:
    """Lay the points out best first, with what must be known to read it in the caption.

    width: columns of the terminal; what fits least is left out (it is in results.csv), never cut.
    """
    optional = sorted({column.optional for column in COLUMNS if column.optional}, reverse=True)
    measuring = Console(width=_NO_LIMIT)
    table = _table(rows, COLUMNS)
    for limit in optional:
        if measuring.measure(table).maximum <= width:
            break
        table = _table(rows, [column for column in COLUMNS if column.optional < limit])
    table.caption = Text("\n".join(footer(rows)), style="dim")
    return table


def _table(rows: Sequence[PointResult], columns: Sequence[Column]) -> Table:
    keys = changed_keys(rows)
    short = short_keys(keys)
    several = len({row.group for row in rows if row.group}) > 1
    named = not keys or any(row.overrides is None for row in rows)
    table = Table(box=box.SIMPLE_HEAD, caption_justify="left", padding=(0, 1, 0, 0))
    table.add_column("point", no_wrap=True)
    for key in keys:
        table.add_column(short[key], overflow="fold", min_width=min(len(short[key]), 20))
    if several:
        table.add_column("group", no_wrap=True)
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for row in rows:
        cells = [f"{'*' if row.is_best else ' '} {row.name if named else f'{row.index:02d}'}"]
        cells += [_cut(row.changes.get(key, "")) for key in keys]
        cells += [row.group] if several else []
        cells += [column.text(row) for column in columns]
        style = "bold green" if row.is_best else _STYLES.get(row.state, "")
        table.add_row(*(Text(cell) for cell in [*cells, row.state]), style=style)
    return table


def footer(rows: Sequence[PointResult]) -> list[str]:
    """What must be known to read the table: what is best, what can't be compared, what the time covers, what failed."""
    lines = []
    if any(row.is_best for row in rows):
        lines.append("* best: lowest validation loss at the end of the run; lower is better")
    elif rows and not any(row.run.validation for row in rows):
        lines.append("no validation loss: set validation.fraction, e.g. 0.1, to compare by one")
    different = differing_basis(rows)
    if different:
        lines.append(
            f"validation losses of different groups can't be compared: {', '.join(different)} differ"
        )
    lines += _time_lines(rows)
    failed = [row for row in rows if row.state in ("failed", "pruned") and row.reason]
    lines += [f"{row.index:02d} {row.state}: {row.reason}" for row in failed[:_MAX_REASONS]]
    if len(failed) > _MAX_REASONS:
        lines.append(f"{len(failed) - _MAX_REASONS} more have a reason in results.csv")
    return lines


def _time_lines(rows: Sequence[PointResult]) -> list[str]:
    covers = {row.run.time_covers for row in rows}
    lines = []
    if "steps" in covers:
        lines.append("time with ~: optimizer steps alone, without loading, validation and samples")
    if "last session" in covers:
        lines.append("time with >: of the last session; the run was stopped and gone on with")
    kinds = {row.run.memory_of for row in rows if row.run.memory_of}
    if kinds == {"process"}:
        lines.append("memory: most that the process held, since the runs were on the CPU")
    elif kinds == {"device"}:
        lines.append("memory: most that torch held on the device")
    elif len(kinds) > 1:
        lines.append("memory: on the device, or of the process where a run was on the CPU")
    return lines


def loss_text(loss: float | None) -> str:
    """A loss with four digits after the point, more where it is small; "-" where there is none."""
    if loss is None:
        return "-"
    if not math.isfinite(loss) or loss == 0:
        return f"{loss:g}"
    return f"{loss:.4f}" if abs(loss) >= 0.01 else f"{loss:.3g}"


def best_text(run: RunRecord) -> str:
    """The lowest validation loss and its step: "0.4788 (350)"."""
    best = run.best_validation
    return "-" if best is None else f"{loss_text(best[1])} ({best[0]})"


def steps_text(run: RunRecord) -> str:
    """Steps made, and of how many where they aren't all: "400", "150/400"."""
    if run.steps is None:
        return "-"
    whole = run.max_steps is None or run.steps >= run.max_steps
    return str(run.steps) if whole else f"{run.steps}/{run.max_steps}"


def time_text(run: RunRecord) -> str:
    """How long the run took; "~" where only its steps are known, ">" where only its last session is."""
    if run.seconds is None:
        return "-"
    mark = {"steps": "~", "last session": ">"}.get(run.time_covers, "")
    return mark + duration_text(run.seconds)


def duration_text(seconds: float) -> str:
    """Two units at most: "8.2 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def step_time_text(run: RunRecord) -> str:
    """Seconds of an optimizer step with three digits."""
    return "-" if run.seconds_per_step is None else f"{run.seconds_per_step:.3g}"


def memory_text(run: RunRecord) -> str:
    """The most memory that was held: "0.63 GiB"."""
    return "-" if run.peak_memory_bytes is None else format_bytes(run.peak_memory_bytes)


def _cut(value: str) -> str:
    """Shorten a long value in its middle, since paths differ at their ends."""
    if len(value) <= _MAX_VALUE_COLUMNS:
        return value
    half = _MAX_VALUE_COLUMNS // 2
    return f"{value[: half - 1]}…{value[-half:]}"

"""A comparison as one page that needs no network: table, loss curves, pictures side by side, commands."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from framework.sweep.folder import short_keys
from framework.sweep.results_chart import Series, loss_chart, scatter_chart
from framework.sweep.results_commands import generate_command, train_command
from framework.sweep.results_files import relative
from framework.sweep.results_rows import RANK, PointResult, changed_keys
from framework.sweep.results_table import COLUMNS, footer, loss_text

_NUM_COLOURS = 8
_MAX_PICTURED = 12
"""Points whose pictures are shown; a search may have hundreds, and each picture is a file that the browser loads."""
_MAX_SCATTERS = 6


def results_page(
    rows: Sequence[PointResult],
    *,
    folder: Path,
    sweep: Mapping[str, Any],
    search: Sequence[str] = (),
) -> str:
    """The whole page as HTML text.

    folder: where the page will lie; links to pictures are relative to it.   sweep: content of sweep.json; empty where
    single runs are compared.   search: lines on what a search has come to.
    """
    template = files("framework.sweep").joinpath("results_page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=escape(_title(rows, folder, sweep)),
        lead=_lead(rows, sweep) + "".join(f"<p>{escape(line)}</p>" for line in search),
        table=_table(rows),
        footer="".join(f'<p class="soft">{escape(line)}</p>' for line in _notes(rows)),
        charts=_charts(rows),
        scatter=_scatters(rows),
        pictures=_pictures(rows, folder),
        sheets=_sheets(rows, folder),
        commands_note=_commands_note(sweep),
        commands=_commands(rows, sweep),
    )


def _short_titles(rows: Sequence[PointResult]) -> dict[int, str]:
    """A title per point with shortened keys, for legends and heads of columns."""
    short = short_keys(changed_keys(rows))
    titles = {}
    for row in rows:
        changes = " ".join(f"{short[key]}={value}" for key, value in row.changes.items())
        titles[row.index] = row.name if row.overrides is None or not changes else changes
    return titles


def _title(rows: Sequence[PointResult], folder: Path, sweep: Mapping[str, Any]) -> str:
    if not sweep:
        return f"{len(rows)} runs compared"
    return f"Sweep {folder.parent.name}/{folder.name}"


def _lead(rows: Sequence[PointResult], sweep: Mapping[str, Any]) -> str:
    """How many points are in which state, and what is best."""
    counts = Counter(row.state for row in rows)
    told = ", ".join(f"{counts[state]} {state}" for state in RANK if counts[state])
    lines = [f'<p class="soft">{len(rows)} points: {told or "none yet"}</p>']
    command = sweep.get("command")
    if isinstance(command, list):
        lines.append(f'<p class="soft"><code>{escape(shlex.join(map(str, command)))}</code></p>')
    for row in rows:
        if row.is_best:
            group = f" of group {row.group}" if len({r.group for r in rows if r.group}) > 1 else ""
            loss = loss_text(row.run.validation_loss)
            text = escape(row.title)
            lines.append(
                f"<p>Best{escape(group)}: <b>{text}</b>, validation loss {escape(loss)}.</p>"
            )
    return "".join(lines)


def _notes(rows: Sequence[PointResult]) -> list[str]:
    return [line.replace("* best:", "Green, best:", 1) for line in footer(rows)]


def _table(rows: Sequence[PointResult]) -> str:
    keys = changed_keys(rows)
    short = short_keys(keys)
    several = len({row.group for row in rows if row.group}) > 1
    heads = [_head("point")]
    heads += [_head(short[key], title=key) for key in keys]
    heads += [_head("group")] if several else []
    heads += [_head(column.title, number=True) for column in COLUMNS]
    heads += [_head("state"), _head("folder")]
    body = []
    for place, row in enumerate(rows):
        css = " ".join(["best"] if row.is_best else [row.state])
        swatch = f'<span class="swatch {_css(place)}"></span>'
        cells = [_cell(f"{swatch}{row.index:02d}", str(row.index))]
        for key in keys:
            value = row.changes.get(key, "")
            cells.append(_cell(escape(value), value, css="value", title=value))
        cells += [_cell(row.group, row.group)] if several else []
        for column in COLUMNS:
            cells.append(_number_cell(column.text(row), column.number(row)))
        cells.append(_cell(escape(row.state), row.state, title=row.reason))
        where = "" if row.run.folder is None else f"{row.name}/{row.run.folder.name}"
        where = row.name if row.overrides is None else where
        cells.append(_cell(f"<code>{escape(where)}</code>", where))
        body.append(f'<tr class="{css}" data-series="{row.index}">{"".join(cells)}</tr>')
    return f'<table id="points"><thead><tr>{"".join(heads)}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _head(text: str, *, number: bool = False, title: str = "") -> str:
    css = ' class="number"' if number else ""
    return f'<th{css} title="{escape(title)}"><button type="button">{escape(text)}</button></th>'


def _cell(html: str, sort: str, *, css: str = "", title: str = "") -> str:
    return f'<td class="{css}" data-sort="{escape(sort)}" title="{escape(title)}">{html}</td>'


def _number_cell(text: str, number: float | None) -> str:
    known = number is not None and math.isfinite(number)
    return _cell(escape(text), repr(number) if known else "", css="number")


def _css(place: int) -> str:
    """Class of a curve's colour: eight colours, then the same dashed, then grey."""
    if place < _NUM_COLOURS:
        return f"s{place}"
    return f"s{place - _NUM_COLOURS} dash" if place < 2 * _NUM_COLOURS else "rest"


def _charts(rows: Sequence[PointResult]) -> str:
    validated = any(row.run.validation for row in rows)
    titles = _short_titles(rows)
    series, names = [], []
    for place, row in enumerate(rows):
        if not (row.run.validation or row.run.train):
            continue
        css = f"{_css(place)} p{row.index}"
        if validated:
            series.append(Series(css, titles[row.index], row.run.validation, row.run.train))
        else:
            series.append(Series(css, titles[row.index], row.run.train))
        names.append(
            f'<li data-series="{row.index}"><span class="swatch {_css(place)}"></span>{escape(titles[row.index])}</li>'
        )
    label = "validation loss" if validated else "training loss"
    whole = loss_chart(series, label="loss" if validated else label)
    if not whole:
        return ""
    figures = [f"<figure><figcaption>All steps</figcaption>{whole}</figure>"]
    last = max(step for s in series for step, _ in s.validation or s.train)
    late = [Series(s.css, s.title, s.validation) for s in series]
    half = loss_chart(late, from_step=math.ceil(last / 2), label=label)
    if half:
        title = f"Second half <span class='soft'>({label} alone, enlarged)</span>"
        figures.append(f"<figure><figcaption>{title}</figcaption>{half}</figure>")
    switch = (
        '<input type="checkbox" id="no-train"> <label for="no-train">hide the training loss (thin)</label>'
        if validated
        else ""
    )
    return (
        f'<h2>Losses</h2>{switch}<div class="charts">{"".join(figures)}</div>'
        f'<ul class="legend">{"".join(names)}</ul>'
    )


def _scatters(rows: Sequence[PointResult]) -> str:
    """The loss over each swept key that has three or more numbers as values."""
    keys = changed_keys(rows)
    short, titles = short_keys(keys), _short_titles(rows)
    figures = []
    for key in keys:
        points = []
        for place, row in enumerate(rows):
            loss, value = row.run.validation_loss, _as_number(row.changes.get(key))
            done = row.state == "finished" and loss is not None and math.isfinite(loss)
            if done and loss is not None and value is not None:
                points.append((f"{_css(place)} p{row.index}", titles[row.index], value, loss))
        if len({value for _, _, value, _ in points}) >= 3:
            figures.append(scatter_chart(points, across=short[key], label="validation loss"))
    if not figures:
        return ""
    drawn = "".join(f"<figure>{figure}</figure>" for figure in figures[:_MAX_SCATTERS])
    return f'<h2>Validation loss by setting</h2><div class="charts">{drawn}</div>'


def _pictures(rows: Sequence[PointResult], folder: Path) -> str:
    """The last pictures of each point that has trained, one row per prompt, where all have the same prompts."""
    shown = [row for row in rows if row.run.pictures_step][:_MAX_PICTURED]
    if len(shown) < 2 or len({row.run.prompts for row in shown}) > 1:
        return ""
    titles = _short_titles(rows)
    heads = "".join(
        f"<th>{escape(titles[row.index])}<br><span class='soft'>step {row.run.pictures_step}</span></th>"
        for row in shown
    )
    body = []
    for number, prompt in enumerate(shown[0].run.prompts):
        cells = "".join(
            f"<td>{_image(row.run.pictures[number], folder, f'{titles[row.index]}: {prompt}')}</td>"
            for row in shown
        )
        body.append(f"<tr><th>{escape(prompt) or '(empty prompt)'}</th>{cells}</tr>")
    return (
        f"<h2>The same prompts and noise</h2>{_only_some(rows)}"
        f'<div class="wide"><table class="pictures"><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _sheets(rows: Sequence[PointResult], folder: Path) -> str:
    """The sheets of points that have sampled since their start, each beside the next."""
    with_sheet = [(row, row.run.sheet) for row in rows if row.run.pictures_step and row.run.sheet]
    shown = with_sheet[:_MAX_PICTURED]
    if not shown:
        return ""
    titles = _short_titles(rows)
    figures = "".join(
        f"<figure><figcaption>{escape(titles[row.index])}</figcaption>"
        f'<a href="{_link(sheet, folder)}">{_image(sheet, folder, titles[row.index])}</a></figure>'
        for row, sheet in shown
    )
    return (
        f"<h2>Sample sheets</h2>{_only_some(rows)}"
        '<input type="checkbox" id="stack"> <label for="stack">one below the other</label>'
        f'<div class="sheets">{figures}</div>'
    )


def _only_some(rows: Sequence[PointResult]) -> str:
    count = sum(1 for row in rows if row.run.pictures_step)
    if count <= _MAX_PICTURED:
        return ""
    return f'<p class="soft">The best {_MAX_PICTURED} of {count}.</p>'


def _image(path: Path, folder: Path, text: str) -> str:
    return f'<img src="{_link(path, folder)}" alt="{escape(text)}" loading="lazy">'


def _link(path: Path, folder: Path) -> str:
    return escape(quote(relative(path, folder)))


def _commands_note(sweep: Mapping[str, Any]) -> str:
    cwd = sweep.get("cwd")
    return f"Run in <code>{escape(str(cwd))}</code>." if cwd else ""


def _commands(rows: Sequence[PointResult], sweep: Mapping[str, Any]) -> str:
    parts = []
    for row in rows:
        lines = []
        if row.reason:
            lines.append(f'<p class="bad">{escape(row.state)}: {escape(row.reason)}</p>')
        train = train_command(row, sweep)
        lines.append(f"<p>Train this point alone:</p><pre><code>{escape(train)}</code></pre>")
        generate = generate_command(row, sweep)
        if generate:
            lines.append(f"<p>Make pictures:</p><pre><code>{escape(generate)}</code></pre>")
        title = f"{row.index:02d} {escape(row.title)}"
        parts.append(f"<details><summary>{title}</summary>{''.join(lines)}</details>")
    return "".join(parts)


def _as_number(value: str | None) -> float | None:
    try:
        number = float(value) if value is not None else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None

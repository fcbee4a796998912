"""Draws a plan: for each phase one bar of device memory and one of host memory, stacked by what the bytes are for.

Shapes are listed once and written as SVG text or painted as PNG, so that both show the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

from framework.atomic import atomic_write, write_text
from framework.errors import ConfigError, Fault
from framework.plan.table import format_bytes
from framework.plan.types import MemoryParts, VramPlan

COLOURS = {
    "weights": "#4c78a8",
    "adapters": "#72b7b2",
    "gradients": "#f58518",
    "optimizer": "#e45756",
    "average": "#b279a2",
    "fetched": "#54a24b",
    "staging": "#9d9d9d",
    "activations": "#eeca3b",
}
_INK, _FAINT, _GRID, _LIMIT = "#222222", "#6b6b6b", "#dddddd", "#c00000"
_WIDTH_PX, _LEFT_PX, _RIGHT_PX, _TOP_PX = 960, 150, 90, 84
_BAR_PX, _BAR_GAP_PX, _PHASE_GAP_PX, _AXIS_PX = 20, 4, 16, 52
_LEGEND_STEP_PX, _FONT_PX = 100, 13
_PNG_SCALE = 2
"""Pixels of a PNG for each of the drawing, so that it is sharp on today's screens."""
_MAX_TICKS = 8
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))

Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    width: float
    height: float
    colour: str


@dataclass(frozen=True)
class _Line:
    """Vertical, from y to y_end."""

    x: float
    y: float
    y_end: float
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class _Label:
    """y: middle of the line of text."""

    x: float
    y: float
    text: str
    anchor: Anchor = "start"
    colour: str = _INK
    bold: bool = False


@dataclass(frozen=True)
class _Bar:
    phase: str
    memory: str
    parts: MemoryParts


@dataclass(frozen=True)
class _Drawing:
    height: float
    shapes: Sequence[_Box | _Line | _Label]


def check_chart_name(path: Path) -> None:
    """Refuse a file that is neither .png nor .svg; raises ConfigError."""
    if path.suffix.lower() not in (".png", ".svg"):
        message = f"{path.name} is neither a .png nor a .svg file"
        raise ConfigError(
            [Fault("--chart", message, f"command line: --chart {path}", hint="Name it plan.png.")]
        )


def write_chart(plan: VramPlan, path: Path) -> None:
    """Draw the plan's phases into a .png or .svg file, whole or not at all.

    A dashed line marks `model.vram_limit`. Activations are missing where the plan wasn't traced, and the title says so.
    """
    check_chart_name(path)
    drawing = _draw(plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".svg":
        write_text(path, _svg(drawing))
        return
    with atomic_write(path) as file:
        file.write(_png(drawing))


def _draw(plan: VramPlan) -> _Drawing:
    bars = _bars(plan)
    limit = plan.vram_limit_bytes or 0
    highest = max([limit, 1, *(bar.parts.total_bytes for bar in bars)])
    unit, unit_bytes = next((u for u in _UNITS if highest >= u[1]), ("B", 1))
    step = _tick_step(highest / unit_bytes)
    end = math.ceil(highest / unit_bytes / step) * step * unit_bytes
    span = _WIDTH_PX - _LEFT_PX - _RIGHT_PX

    def place(count: float) -> float:
        return _LEFT_PX + span * count / end

    rows: list[_Box | _Line | _Label] = []
    y: float = _TOP_PX
    for index, bar in enumerate(bars):
        if index and bar.phase != bars[index - 1].phase:
            y += _PHASE_GAP_PX
        rows += _bar_shapes(bar, y, place, first=not index or bar.phase != bars[index - 1].phase)
        y += _BAR_PX + _BAR_GAP_PX
    bottom = y + 4
    grid: list[_Box | _Line | _Label] = []
    for number in range(round(end / unit_bytes / step) + 1):
        x = place(number * step * unit_bytes)
        grid.append(_Line(x, _TOP_PX - 6, bottom, _GRID))
        grid.append(_Label(x, bottom + 14, f"{number * step:g}", "middle", _FAINT))
    grid.append(_Label(_LEFT_PX + span / 2, bottom + 34, unit, "middle", _FAINT))
    marks: list[_Box | _Line | _Label] = []
    if limit:
        marks.append(_Line(place(limit), _TOP_PX - 6, bottom, _LIMIT, dashed=True))
        text = f"vram_limit {format_bytes(limit)}"
        marks.append(_Label(place(limit), _TOP_PX - 16, text, "middle", _LIMIT))
    return _Drawing(bottom + _AXIS_PX, [*_head(plan, bars), *grid, *rows, *marks])


def _bars(plan: VramPlan) -> list[_Bar]:
    """Device and host of each phase; no host bars where no phase takes any."""
    with_host = any(phase.host_bytes for phase in plan.phases)
    bars = []
    for phase in plan.phases:
        bars.append(_Bar(phase.name, plan.device, phase.device))
        if with_host:
            bars.append(_Bar(phase.name, "host", phase.host))
    return bars


def _bar_shapes(bar: _Bar, y: float, place: object, *, first: bool) -> list[_Box | _Line | _Label]:
    assert callable(place)
    middle = y + _BAR_PX / 2
    shapes: list[_Box | _Line | _Label] = []
    if first:
        shapes.append(_Label(12, middle, bar.phase, bold=True))
    shapes.append(_Label(_LEFT_PX - 10, middle, bar.memory, "end", _FAINT))
    done = 0
    for name, count in bar.parts.by_name().items():
        if count:
            left, right = place(done), place(done + count)
            shapes.append(_Box(left, y, right - left, _BAR_PX, COLOURS[name]))
            done += count
    text = format_bytes(done) if done else "-"
    shapes.append(_Label(place(done) + 6, middle, text))
    return shapes


def _head(plan: VramPlan, bars: Sequence[_Bar]) -> list[_Box | _Line | _Label]:
    """Title and legend; only parts that some bar has."""
    purpose = "training" if plan.purpose == "train" else "inference"
    missing = "" if plan.traced_with else ", without activations"
    title = f"Memory of {purpose} by phase: {plan.family}, {plan.compute_dtype} on {plan.device}{missing}"
    shapes: list[_Box | _Line | _Label] = [_Label(12, 18, title, bold=True)]
    used = [name for name in COLOURS if any(bar.parts.by_name()[name] for bar in bars)]
    for index, name in enumerate(used):
        x = 12 + index * _LEGEND_STEP_PX
        shapes.append(_Box(x, 36, 12, 12, COLOURS[name]))
        shapes.append(_Label(x + 18, 42, name))
    return shapes


def _tick_step(highest: float) -> float:
    """1, 2 or 5 times a power of ten, so that at most eight ticks lie on the axis."""
    power = 10.0 ** math.floor(math.log10(highest / _MAX_TICKS))
    return next(power * f for f in (1, 2, 5, 10) if highest / (power * f) <= _MAX_TICKS)


def _svg(drawing: _Drawing) -> str:
    height = round(drawing.height)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH_PX} {height}" '
        f'width="{_WIDTH_PX}" height="{height}" font-family="sans-serif" font-size="{_FONT_PX}">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for shape in drawing.shapes:
        if isinstance(shape, _Box):
            lines.append(
                f'<rect x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}" '
                f'height="{shape.height:.1f}" fill="{shape.colour}"/>'
            )
        elif isinstance(shape, _Line):
            dashes = ' stroke-dasharray="6 4" stroke-width="2"' if shape.dashed else ""
            lines.append(
                f'<line x1="{shape.x:.1f}" y1="{shape.y:.1f}" x2="{shape.x:.1f}" '
                f'y2="{shape.y_end:.1f}" stroke="{shape.colour}"{dashes}/>'
            )
        else:
            weight = ' font-weight="bold"' if shape.bold else ""
            lines.append(
                f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" dominant-baseline="central" '
                f'text-anchor="{shape.anchor}" fill="{shape.colour}"{weight}>{escape(shape.text)}</text>'
            )
    return "\n".join([*lines, "</svg>"]) + "\n"


def _png(drawing: _Drawing) -> bytes:
    from io import BytesIO

    from PIL import Image, ImageDraw, ImageFont

    scale = _PNG_SCALE
    image = Image.new("RGB", (_WIDTH_PX * scale, round(drawing.height) * scale), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(_FONT_PX * scale)
    anchors = {"start": "lm", "middle": "mm", "end": "rm"}
    for shape in drawing.shapes:
        if isinstance(shape, _Box):
            # Bars that are too thin to be seen are left out, not drawn wider than they are.
            left, right = round(shape.x * scale), round((shape.x + shape.width) * scale) - 1
            if right >= left:
                top = round(shape.y * scale)
                bottom = round((shape.y + shape.height) * scale) - 1
                draw.rectangle((left, top, right, bottom), fill=shape.colour)
        elif isinstance(shape, _Line):
            _draw_line(draw, shape, scale)
        else:
            draw.text(
                (shape.x * scale, shape.y * scale),
                shape.text,
                font=font,
                fill=shape.colour,
                anchor=anchors[shape.anchor],
                stroke_width=0.6 * scale / 2 if shape.bold else 0,
            )
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _draw_line(draw: object, line: _Line, scale: int) -> None:
    from PIL import ImageDraw

    assert isinstance(draw, ImageDraw.ImageDraw)
    x, end = line.x * scale, line.y_end * scale
    if not line.dashed:
        draw.line((x, line.y * scale, x, end), fill=line.colour, width=1)
        return
    y = line.y * scale
    while y < end:
        draw.line((x, y, x, min(y + 6 * scale, end)), fill=line.colour, width=2 * scale)
        y += 10 * scale

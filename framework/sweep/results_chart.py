"""Charts as SVG text: loss curves and a scatter, with axes that a person reads. Colours are left to the page's CSS.

Every series has the class `s0`, `s1` ...; lines are `.line`, the training loss `.faint`, text `.tick` and `.label`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from framework.sweep.results_read import Curve

WIDTH_PX, HEIGHT_PX = 560, 340
_LEFT_PX, _RIGHT_PX, _TOP_PX, _BOTTOM_PX = 60, 14, 12, 44
_MAX_MARKERS = 40
_MAX_TICKS = 8
_LOG_FROM_RATIO = 4.0
"""A loss axis is logarithmic where its largest value is this many times its smallest, so that the end can be seen."""


@dataclass(frozen=True)
class Series:
    """One point's curves.

    css: its class, e.g. "s0".   title: shown where the pointer rests on it.
    """

    css: str
    title: str
    validation: Curve
    train: Curve = ()


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels. low, high: ends of the data.   start_px, end_px: where they lie."""

    low: float
    high: float
    start_px: float
    end_px: float
    log: bool = False

    def place(self, value: float) -> float:
        """Pixel of a value."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        share = (at - low) / (high - low) if high > low else 0.5
        return round(self.start_px + share * (self.end_px - self.start_px), 1)

    def ticks(self) -> list[float]:
        """Four to eight round values inside the axis."""
        if self.log:
            ticks = _log_ticks(self.low, self.high)
            if len(ticks) >= 3:
                return ticks
        return _even_ticks(self.low, self.high)


def loss_chart(series: Sequence[Series], *, from_step: int = 0, label: str = "loss") -> str:
    """Validation loss (thick, with dots) and training loss (faint) over steps.

    from_step: earlier values are left out, so that the rest is enlarged.   Values that aren't finite leave a gap.
    Returns "" where there is nothing to draw.
    """
    shown = [
        Series(s.css, s.title, _from(s.validation, from_step), _from(s.train, from_step))
        for s in series
    ]
    places = [point for s in shown for point in (*s.validation, *s.train)]
    finite = [point for point in places if math.isfinite(point[1])]
    if not finite or len({step for step, _ in finite}) < 2:
        return ""
    losses = [loss for _, loss in finite]
    horizontal = Axis(
        min(step for step, _ in finite),
        max(step for step, _ in finite),
        _LEFT_PX,
        WIDTH_PX - _RIGHT_PX,
    )
    vertical = _loss_axis(losses)
    parts = [_frame(horizontal, vertical, "optimizer step", label, whole=True)]
    for s in reversed(shown):
        parts.append(f'<g class="series {s.css}"><title>{escape(s.title)}</title>')
        parts.append(_line(s.train, horizontal, vertical, "line faint"))
        parts.append(_line(s.validation, horizontal, vertical, "line"))
        if len(s.validation) <= _MAX_MARKERS:
            parts += [_dot(s.title, p, horizontal, vertical) for p in s.validation]
        parts.append("</g>")
    return _svg(parts, f"{label} over steps")


def scatter_chart(
    points: Sequence[tuple[str, str, float, float]], *, across: str, label: str
) -> str:
    """Dots at (value, loss): which values of one key did well. points: (css, title, value, loss), all finite.

    The value's axis is logarithmic where all are above 0 and the largest is ten times the smallest.
    """
    if len({value for _, _, value, _ in points}) < 2:
        return ""
    values = [value for _, _, value, _ in points]
    log = min(values) > 0 and max(values) >= 10 * min(values)
    low, high = _widened(min(values), max(values), log)
    horizontal = Axis(low, high, _LEFT_PX, WIDTH_PX - _RIGHT_PX, log)
    vertical = _loss_axis([loss for *_, loss in points])
    parts = [_frame(horizontal, vertical, across, label)]
    for css, title, value, loss in reversed(points):
        x, y = horizontal.place(value), vertical.place(loss)
        text = escape(f"{title}: {_text(loss)}")
        parts.append(
            f'<g class="series {css}"><circle class="dot" cx="{x}" cy="{y}" r="5"><title>{text}</title></circle></g>'
        )
    return _svg(parts, f"{label} over {across}")


def _loss_axis(losses: Sequence[float]) -> Axis:
    low, high = min(losses), max(losses)
    log = low > 0 and high / low >= _LOG_FROM_RATIO
    low, high = _widened(low, high, log)
    return Axis(low, high, HEIGHT_PX - _BOTTOM_PX, _TOP_PX, log)


def _widened(low: float, high: float, log: bool) -> tuple[float, float]:
    """A twentieth of room at both ends; a tenth of the value where all are equal."""
    if log:
        room = (high / low) ** 0.05
        return low / room, high * room
    room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _frame(horizontal: Axis, vertical: Axis, across: str, up: str, *, whole: bool = False) -> str:
    """Grid, numbers and names of both axes. whole: the horizontal axis counts, so it has no fractions."""
    bottom, right = HEIGHT_PX - _BOTTOM_PX, WIDTH_PX - _RIGHT_PX
    parts = []
    for value in vertical.ticks():
        y = vertical.place(value)
        parts.append(f'<line class="grid" x1="{_LEFT_PX}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT_PX - 8}" y="{y + 4:.1f}" text-anchor="end">{_text(value, digits=8)}</text>'
        )
    for value in horizontal.ticks():
        if whole and value != int(value):
            continue
        x = horizontal.place(value)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP_PX}" y2="{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{x}" y="{bottom + 17}" text-anchor="middle">{_text(value, digits=8)}</text>'
        )
    parts.append(f'<line class="axis" x1="{_LEFT_PX}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (_LEFT_PX + right) / 2
    scale = " (log scale)" if vertical.log else ""
    parts.append(
        f'<text class="label" x="{middle}" y="{HEIGHT_PX - 8}" text-anchor="middle">{escape(across)}</text>'
    )
    height = (_TOP_PX + bottom) / 2
    parts.append(
        f'<text class="label" transform="translate(13 {height}) rotate(-90)" text-anchor="middle">'
        f"{escape(up + scale)}</text>"
    )
    return "".join(parts)


def _line(curve: Curve, horizontal: Axis, vertical: Axis, css: str) -> str:
    """A path through the finite values, broken at the others."""
    path, pen = [], "M"
    for step, loss in curve:
        if not math.isfinite(loss) or (vertical.log and loss <= 0):
            pen = "M"
            continue
        path.append(f"{pen}{horizontal.place(step)} {vertical.place(loss)}")
        pen = "L"
    return f'<path class="{css}" d="{" ".join(path)}"/>' if path else ""


def _dot(title: str, point: tuple[int, float], horizontal: Axis, vertical: Axis) -> str:
    step, loss = point
    if not math.isfinite(loss) or (vertical.log and loss <= 0):
        return ""
    x, y = horizontal.place(step), vertical.place(loss)
    text = escape(f"{title}, step {step}: {_text(loss)}")
    return f'<circle class="dot" cx="{x}" cy="{y}" r="3"><title>{text}</title></circle>'


def _svg(parts: Sequence[str], title: str) -> str:
    head = f'<svg class="chart" viewBox="0 0 {WIDTH_PX} {HEIGHT_PX}" role="img" xmlns="http://www.w3.org/2000/svg">'
    return f"{head}<title>{escape(title)}</title>{''.join(parts)}</svg>"


def _from(curve: Curve, step: int) -> Curve:
    return tuple(point for point in curve if point[0] >= step)


def _even_ticks(low: float, high: float) -> list[float]:
    span = high - low
    if span <= 0:
        return [low]
    size = 10 ** math.floor(math.log10(span / 4))
    step = next(m * size for m in (1, 2, 5, 10) if span / (m * size) <= 6)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside: list[float] = []
    for factors in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [round(f * 10.0**d, 12) for d in decades for f in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) <= _MAX_TICKS:
            return inside
    return inside[:: math.ceil(len(inside) / _MAX_TICKS)]


def _text(value: float, *, digits: int = 4) -> str:
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.{digits}g}"

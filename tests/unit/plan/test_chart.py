"""The plan as a picture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from framework.errors import ConfigError
from framework.plan.chart import COLOURS, check_chart_name, write_chart
from framework.plan.types import MemoryParts, PhasePlan, TracedWith, VramPlan

GIB = 2**30


def make_plan(*, limit: int | None = None, traced: bool = True) -> VramPlan:
    activations = 3 * GIB if traced else None
    device = MemoryParts(weights=8 * GIB, adapters=GIB, fetched=4 * GIB, activations=activations)
    phases = (
        PhasePlan(
            name="encode",
            components=("vae",),
            device=MemoryParts(weights=2 * GIB),
            host=MemoryParts(),
        ),
        PhasePlan(
            name="train",
            components=("dit",),
            device=device,
            host=MemoryParts(weights=12 * GIB, staging=GIB),
        ),
    )
    used = TracedWith(batch_size=1, size_px=(64, 64), sample_size_px=None, text_tokens=8)
    return VramPlan(
        purpose="train",
        family="qwen_image",
        compute_dtype="bf16",
        device="cuda:0",
        vram_limit_bytes=limit,
        components=(),
        phases=phases,
        traced_with=used if traced else None,
    )


def widths(svg: str, colour: str) -> list[float]:
    pattern = rf'width="([\d.]+)" height="20.0" fill="{colour}"'
    return [float(width) for width in re.findall(pattern, svg)]


def test_bars_are_as_long_as_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    write_chart(make_plan(), path)
    svg = path.read_text()
    of_encode, of_train, of_host = widths(svg, COLOURS["weights"])
    (fetched,) = widths(svg, COLOURS["fetched"])
    assert of_train == pytest.approx(4 * of_encode, abs=0.3)
    assert of_host == pytest.approx(6 * of_encode, abs=0.3)
    assert fetched == pytest.approx(2 * of_encode, abs=0.3)
    assert "16.0 GiB" in svg
    assert ">GiB<" in svg
    assert "activations" in svg
    assert "gradients" not in svg
    assert "vram_limit" not in svg


def test_the_limit_is_marked_and_missing_activations_are_told(tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    write_chart(make_plan(limit=24 * GIB, traced=False), path)
    svg = path.read_text()
    assert "vram_limit 24.0 GiB" in svg
    assert "stroke-dasharray" in svg
    assert "without activations" in svg


def test_a_png_shows_the_same(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.png"
    write_chart(make_plan(limit=24 * GIB), path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width == 1920
        counts = picture.convert("RGB").getcolors(2**24)
    assert counts is not None
    found = {"#{:02x}{:02x}{:02x}".format(*colour): number for number, colour in counts}
    # 2 + 8 GiB on the device and 12 on the host are weights, 4 are fetched; a square of the legend is beside each.
    square = 24 * 24
    ratio = (found[COLOURS["weights"]] - square) / (found[COLOURS["fetched"]] - square)
    assert ratio == pytest.approx(22 / 4, rel=0.02)


def test_other_kinds_of_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a \.png nor a \.svg"):
        check_chart_name(tmp_path / "plan.pdf")

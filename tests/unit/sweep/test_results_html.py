"""The page of a sweep: whole without a network, safe with any text, and with curves that can be read."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from framework.sweep.results import collect, collect_runs, write_results
from framework.sweep.results_chart import Series, loss_chart, scatter_chart
from tests.unit.sweep.folders import write_point, write_run, write_sweep

VOID = {"meta", "img", "input", "br"}
NASTY = "<script>alert('1')</script>&\"$x"


class Page(HTMLParser):
    """Collects tags, links and text; fails where tags don't nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page_of(sweep: Path) -> Page:
    return Page(write_results(sweep)[2].read_text())


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    changes = [{"optim.lr": lr, "data.path": NASTY} for lr in ("1e-3", "1e-4", "1e-5", "7")]
    folder = write_sweep(tmp_path / "s#1 %" / "001", changes)
    for index, loss in enumerate((0.5, 0.4, 0.45)):
        losses = {0: 1.5, 200: loss + 0.1, 400: loss}
        write_point(folder, f"p{index}", pictures=True, losses=losses)
    write_point(folder, "p3", state="failed", error=NASTY, losses={})
    return folder


def test_the_page_needs_nothing_from_elsewhere(sweep: Path) -> None:
    text = write_results(sweep)[2].read_text()
    outside = re.sub(r'xmlns="[^"]*"', "", text)
    assert re.findall(r"https?:|//cdn|@import|url\(", outside) == []
    assert not re.search(r"<(link|iframe|object)\b", text)


def test_every_text_is_escaped(sweep: Path) -> None:
    page = page_of(sweep)
    assert page.tags.count("script") == 1
    assert any(NASTY in text for text in page.text)


def test_links_lead_to_the_pictures(sweep: Path) -> None:
    page = page_of(sweep)
    assert len(page.links) == 3 * 2 + 3 * 2  # two pictures each; each sheet and its link
    for link in page.links:
        assert (sweep / unquote(link)).is_file(), link


def test_a_page_elsewhere_still_finds_them(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    page = Page(write_results(sweep, out=out)[2].read_text())
    assert page.links
    assert all((out / unquote(link)).is_file() for link in page.links)


def test_each_point_has_its_commands(sweep: Path) -> None:
    text = "".join(page_of(sweep).text)
    assert "octavo train recipe=pocket optim.lr=1e-4" in text
    assert "octavo generate recipe=pocket --lora" in text
    assert "--prompt 'a cat'" in text


def test_the_best_is_told_first(sweep: Path) -> None:
    text = "".join(page_of(sweep).text)
    assert "4 points: 3 finished, 1 failed" in text
    assert re.search(r"Best: optim.lr=1e-4 .*validation loss 0\.4000", text)


def test_curves_and_settings_are_drawn(sweep: Path) -> None:
    text = write_results(sweep)[2].read_text()
    charts = [ET.fromstring(chart) for chart in re.findall(r"<svg.*?</svg>", text, re.S)]
    assert len(charts) == 3  # all steps, second half, loss by learning rate


def test_runs_make_a_page_with_the_copy_that_makes_them_recipes(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "001") for name in ("a", "b c")]
    paths = write_results(runs[0], collect_runs(runs), out=tmp_path / "out", of_sweep=False)
    text = "".join(Page(paths[2].read_text()).text)
    assert "2 runs compared" in text
    assert "/b c/001/config.yaml' recipes/'b c-001'.yaml && octavo train recipe='b c-001'" in text


def test_an_empty_sweep_has_a_page(tmp_path: Path) -> None:
    page_of(write_sweep(tmp_path, []))


def test_a_hundred_points_show_the_pictures_of_the_best_alone(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path, [{"optim.lr": str(index)} for index in range(30)])
    for index in range(30):
        write_point(folder, f"p{index}", pictures=True, losses={0: 1.5, 400: 1 - index / 100})
    page = page_of(folder)
    assert page.tags.count("img") == 12 * 3
    assert "The best 12 of 30." in "".join(page.text)
    assert collect(folder)[0].index == 29


def path_points(chart: str, css: str) -> list[tuple[float, float]]:
    path = next(
        element.attrib["d"]
        for element in ET.fromstring(chart).iter("{http://www.w3.org/2000/svg}path")
        if element.attrib["class"] == css
    )
    pairs = [pair.lstrip("ML") for pair in re.findall(r"[ML][\d.]+ [\d.]+", path)]
    return [(float(x), float(y)) for x, y in (pair.split() for pair in pairs)]


def test_a_lower_loss_is_drawn_lower_and_a_later_step_further_right() -> None:
    chart = loss_chart([Series("s0", "a", ((0, 1.5), (100, 0.5), (200, 0.4)))])
    points = path_points(chart, "line")
    assert [x for x, _ in points] == sorted({x for x, _ in points})
    assert [y for _, y in points] == sorted(y for _, y in points)


def test_a_value_that_is_no_number_leaves_a_gap() -> None:
    curve = ((0, 1.0), (1, float("nan")), (2, 0.5), (3, 0.4))
    chart = loss_chart([Series("s0", "a", curve)])
    path = re.search(r'class="line" d="([^"]*)"', chart)
    assert path is not None
    assert path[1].count("M") == 2
    assert "nan" not in chart


@pytest.mark.parametrize(
    "curve",
    [(), ((5, 0.5),), ((0, float("nan")), (1, float("inf")))],
    ids=["empty", "one", "no number"],
)
def test_what_can_not_be_drawn_is_left_out(curve: tuple[tuple[int, float], ...]) -> None:
    assert loss_chart([Series("s0", "a", curve)]) == ""


@pytest.mark.parametrize(
    "losses", [(0.5, 0.5), (1e-9, 1e3), (-2.0, 3.0), (0.0, 1.0), (0.48, 0.4801), (1e12, 2e12)]
)
def test_axes_have_a_few_distinct_numbers(losses: tuple[float, float]) -> None:
    chart = loss_chart([Series("s0", "a", tuple(enumerate(losses)))])
    left = re.findall(r'text-anchor="end">([^<]*)<', chart)
    assert 2 <= len(left) <= 12
    assert len(set(left)) == len(left)


def test_a_setting_of_one_value_has_no_chart() -> None:
    assert scatter_chart([("s0", "a", 1.0, 0.5)], across="lr", label="loss") == ""

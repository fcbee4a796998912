from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from framework.errors import RunError
from framework.schema import RunConfig
from framework.sweep.folder import (
    SweepFolder,
    point_name,
    read_json,
    short_keys,
    sweep_key,
    sweep_name,
)
from framework.sweep.jobs import Point

POINTS = [
    Point(0, "00-lr-1", ("recipe=a", "optim.lr=1"), {"optim.lr": "1"}),
    Point(1, "01-lr-2", ("recipe=a", "optim.lr=2"), {"optim.lr": "2"}),
]
CLAIM = """
import sys, time
from pathlib import Path
from framework.sweep.folder import SweepFolder
folder = SweepFolder.claim(Path(sys.argv[1]), key="k")
print(folder.path.name, flush=True)
time.sleep(60)
"""


def begun(parent: Path, *, key: str = "k", anew: bool = False) -> SweepFolder:
    folder = SweepFolder.claim(parent, key=key, anew=anew)
    folder.describe(key=key, command=["octavo"], launcher="basic")
    folder.add_points(POINTS)
    return folder


def run_config(**changes: object) -> RunConfig:
    values = {
        "model": {"family": "qwen_image", "source": "x", "dit": {"trainable": "lora"}},
        "data": {"path": "pictures"},
        "run": {"name": "tiny"},
    }
    return RunConfig.model_validate(values | changes)


def test_the_same_sweep_goes_on_in_its_folder(tmp_path: Path) -> None:
    first = begun(tmp_path)
    first.release()
    again = begun(tmp_path)
    assert again.path == first.path == tmp_path / "001"
    assert again.points() == POINTS


def test_a_finished_sweep_starts_a_new_folder(tmp_path: Path) -> None:
    first = begun(tmp_path)
    first.finish()
    first.release()
    assert begun(tmp_path).path.name == "002"


def test_an_unfinished_sweep_older_than_a_finished_one_is_left_alone(tmp_path: Path) -> None:
    begun(tmp_path).release()
    newer = begun(tmp_path, anew=True)
    newer.finish()
    newer.release()
    assert begun(tmp_path).path.name == "003"


def test_another_sweep_gets_another_folder(tmp_path: Path) -> None:
    begun(tmp_path).release()
    assert begun(tmp_path, key="other").path.name == "002"


def test_anew_never_goes_on(tmp_path: Path) -> None:
    begun(tmp_path).release()
    assert begun(tmp_path, anew=True).path.name == "002"


def test_two_processes_dont_share_a_folder_and_a_killed_one_gives_it_back(tmp_path: Path) -> None:
    begun(tmp_path).release()
    other = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "001\n"
    held = begun(tmp_path)
    assert held.path.name == "002"
    other.kill()
    other.communicate()
    assert SweepFolder.claim(tmp_path, key="k").path.name == "001"


def test_a_folder_that_cant_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sweeps").write_text("in the way")
    with pytest.raises(RunError, match="the sweep's folder can't be made"):
        SweepFolder.claim(tmp_path / "sweeps" / "a", key="k")


def test_points_are_kept_and_known_ones_stay(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    third = Point(2, "02-lr-3", ("recipe=a", "optim.lr=3"), {"optim.lr": "3"})
    folder.add_points([Point(1, "another", (), {}), third])
    assert folder.points() == [*POINTS, third]
    content = read_json(folder.path / "sweep.json")
    assert content["version"] == 1
    assert content["cwd"] == str(Path.cwd())


def test_a_point_goes_through_its_states(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    point = POINTS[0]
    assert folder.read_point(point).state == "waiting"
    folder.point_folder(point).mkdir(parents=True)
    folder.begin_point(point)
    (folder.point_folder(point) / "summary.json").write_text('{"state": "failed"}')
    assert folder.read_point(point).state == "started"
    folder.end_point(point, "failed", error="memory is full")
    record = folder.read_point(point)
    assert (record.state, record.error, record.attempts) == ("failed", "memory is full", 1)
    folder.begin_point(point)
    record = folder.read_point(point)
    assert (record.state, record.error, record.attempts) == ("started", "", 2)
    assert record.summary == {}


def test_a_run_that_ended_just_before_a_kill_counts_as_finished(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    point = POINTS[0]
    run = folder.point_folder(point) / "001"
    run.mkdir(parents=True)
    folder.begin_point(point)
    (run / "run.json").write_text('{"state": "running"}')
    assert folder.read_point(point).state == "started"
    (run / "run.json").write_text('{"state": "finished"}')
    assert folder.read_point(point).state == "finished"
    assert folder.read_point(point, as_told=True).state == "started"


@pytest.mark.parametrize(
    "change",
    [
        {"run": {"name": "other", "output_dir": "elsewhere"}},
        {"checkpoint": {"resume": "never"}},
        {"logger": {"csv": False}},
        {"trainer": {"log_every_n_steps": 3}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_computes_nothing_isnt_part_of_the_key(change: dict[str, object]) -> None:
    assert sweep_key([run_config(**change)]) == sweep_key([run_config()])


def test_what_is_computed_is_part_of_the_key() -> None:
    one, two = run_config(), run_config(trainer={"seed": 1})
    keys = {sweep_key([one]), sweep_key([two]), sweep_key([one, two]), sweep_key([two, one])}
    assert len(keys | {sweep_key([one], "interval(1,2)")}) == 5


def test_names_of_sweeps_over_recipes_hold_all_recipes() -> None:
    configs = [run_config(), run_config(run={"name": "b"}), run_config()]
    assert sweep_name(configs) == "tiny+b"
    assert sweep_name(configs[:1]) == "tiny"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"model.dit.precision": "fp8", "optim.lr": "1e-4"}, "03-precision-fp8-lr-1e-4"),
        (
            {"model.dit.precision": "fp8", "model.vae.precision": "bf16"},
            "03-dit.precision-fp8-vae.precision-bf16",
        ),
        ({"data.path": "/some where/else's"}, "03-path-some-where-else-s"),
        ({"sample.size_px": "[64,64]"}, "03-size-px-64-64"),
        ({"recipe": "a/b"}, "03-recipe-a-b"),
        ({}, "03"),
        ({"model.dit.lora.target_modules": "x" * 200}, "03-target-modules-" + "x" * 62),
    ],
)
def test_names_of_points_say_what_differs(changes: dict[str, str], name: str) -> None:
    assert point_name(3, changes, count=12) == name
    assert run_config(run={"name": name}).run.name == name


def test_numbers_of_points_sort() -> None:
    assert point_name(3, {}, count=1001) == "0003"


def test_short_keys_tell_keys_apart() -> None:
    assert short_keys(["a.lr", "b.lr", "lr", "x.y"]) == {
        "a.lr": "a.lr",
        "b.lr": "b.lr",
        "lr": "lr",
        "x.y": "y",
    }

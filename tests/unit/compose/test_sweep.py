"""A sweep's command line: which keys have several values, how points are started, and every fault of that."""

from __future__ import annotations

from pathlib import Path

import pytest

from framework.compose import (
    MAX_POINTS,
    Dimension,
    compose_run,
    override_text,
    read_sweep,
    replace_overrides,
    sources,
)
from framework.errors import FAULT_CODES, format_fault

GOOD = "recipe=pocket_lora"


@pytest.fixture
def settings_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with two launchers and two sweepers of its own."""
    package = tmp_path / "framework"
    files = {
        "launcher/basic": "name: basic\n",
        "launcher/joblib": "# several at once\nname: joblib\nn_jobs: 2\n",
        "sweeper/basic": "name: basic\n",
        "sweeper/search": "n_trials: 20\nseed: ${.n_trials}\n",
    }
    for name, text in files.items():
        file = package / "_conf" / "hydra" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (package / "_conf" / "config.yaml").write_text("defaults: [_self_, recipe: '???']\n")
    (package / "_recipes").mkdir()
    (package / "_recipes" / "pocket_lora.yaml").write_text("run: {name: x}\n")
    monkeypatch.setattr(sources, "_PACKAGE", package)
    monkeypatch.chdir(tmp_path)
    return package


def choices_of(line: str) -> tuple[str, ...] | None:
    request = read_sweep([GOOD, line])
    assert request.faults == ()
    (dimension,) = request.dimensions
    assert dimension.line == line
    return dimension.choices


def test_the_product_has_the_last_key_changing_fastest() -> None:
    overrides = [GOOD, "model.dit.precision=fp8,bf16", "optim.lr=1e-4,5e-5", "trainer.seed=1"]
    request = read_sweep(overrides)
    assert request.faults == ()
    assert request.base == (GOOD, "trainer.seed=1")
    assert [dimension.key for dimension in request.dimensions] == [
        "model.dit.precision",
        "optim.lr",
    ]
    assert request.num_points == 4
    assert [point[2:] for point in request.points()] == [
        ("model.dit.precision=fp8", "optim.lr=1e-4"),
        ("model.dit.precision=fp8", "optim.lr=5e-5"),
        ("model.dit.precision=bf16", "optim.lr=1e-4"),
        ("model.dit.precision=bf16", "optim.lr=5e-5"),
    ]
    for point in request.points():
        assert compose_run(point).faults == ()


def test_without_several_values_there_is_one_point() -> None:
    assert read_sweep([GOOD, "optim.lr=1"]).points() == [(GOOD, "optim.lr=1")]


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("optim.lr=1e-4,2e-4", ["1e-4", "2e-4"]),
        ("optim.lr=choice(1e-4,2e-4)", ["1e-4", "2e-4"]),
        ("optim.betas=[0.9,0.99],[0.8,0.9]", ["[0.9,0.99]", "[0.8,0.9]"]),
        ("run.x='a,b',c", ["'a,b'", "c"]),
        ("run.x=a\\,b,c", ["a\\,b", "c"]),
        ("run.x={a: 1},{a: 2}", ["{a: 1}", "{a: 2}"]),
        ("run.x=${optim.lr},3", ["${optim.lr}", "3"]),
        ("run.x=null,true", ["null", "true"]),
        ("run.x=range(3)", ["0", "1", "2"]),
        ("run.x=range(1,8,3)", ["1", "4", "7"]),
        ("run.x=range(0,0.3,0.1)", ["0.0", "0.1", "0.2"]),
        ("run.x=sort(3,1,2)", ["1", "2", "3"]),
        ("run.x=sort(range(1,4),reverse=true)", ["3", "2", "1"]),
        ("run.x=int(2.0,4.0)", ["2", "4"]),
        ("optim=adamw,prodigy", ["adamw", "prodigy"]),
        ("optim=glob(adam*)", ["adamw", "adamw_8bit"]),
        ("optim=glob([adam*,prodigy],exclude=*8bit)", ["adamw", "prodigy"]),
        ("+optim.lr=1,2", ["1", "2"]),
    ],
)
def test_lists_of_values_are_read_as_hydra_means_them(line: str, values: list[str]) -> None:
    key = line.partition("=")[0]
    assert choices_of(line) == tuple(f"{key}={value}" for value in values)


def test_recipes_can_be_listed_by_a_pattern(settings_folder: Path) -> None:
    (settings_folder / "_recipes" / "pocket_base.yaml").write_text("")
    request = read_sweep(["recipe=glob(pocket*)"])
    assert request.points() == [("recipe=pocket_base",), ("recipe=pocket_lora",)]


def test_recipes_of_a_given_folder_can_be_swept(tmp_path: Path) -> None:
    (tmp_path / "ours.yaml").write_text("")
    assert read_sweep(["recipe=ours,pocket_lora"], config_dir=tmp_path).faults == ()
    assert len(read_sweep(["recipe=ours,pocket_lora"]).faults) == 1


def test_a_shuffled_list_has_the_same_order_each_time() -> None:
    first = choices_of("run.x=shuffle(range(20))")
    assert first is not None
    assert first == choices_of("run.x=shuffle(range(20))")
    assert sorted(first) == sorted(f"run.x={i}" for i in range(20))
    assert first != tuple(f"run.x={i}" for i in range(20))


@pytest.mark.parametrize("line", ["optim.betas=[1,2]", "run.x='a,b'", "run.x={a: 1, b: 2}"])
def test_lists_and_quoted_texts_are_one_value(line: str) -> None:
    request = read_sweep([GOOD, line])
    assert request.dimensions == ()
    assert request.base == (GOOD, line)


@pytest.mark.parametrize(
    ("value", "interval", "log", "whole"),
    [
        ("interval(1e-5,1e-3)", (1e-5, 1e-3), False, False),
        ("tag(log,interval(1e-5,1e-3))", (1e-5, 1e-3), True, False),
        ("int(interval(1,8))", (1.0, 8.0), False, True),
        ("tag(log,int(interval(1,8)))", (1.0, 8.0), True, True),
    ],
)
def test_intervals_are_read(
    value: str, interval: tuple[float, float], log: bool, whole: bool
) -> None:
    request = read_sweep([GOOD, f"optim.lr={value}"])
    assert request.faults == ()
    assert request.dimensions == (
        Dimension("optim.lr", f"optim.lr={value}", interval=interval, log=log, whole=whole),
    )
    with pytest.raises(AssertionError, match="an interval has no list of points"):
        request.points()


FAULTS = [
    ("optim.lr=1,1.0", "optim.lr", None, []),
    ("optim.lr=1,1", "optim.lr", "sweep", ["1 is listed twice"]),
    ("optim.lr=choice()", "optim.lr", "override-syntax", ["empty choice"]),
    ("optim.lr=1,2,", "optim.lr", "override-syntax", ["beside a comma", "Write optim.lr=1,2"]),
    ("optim.lr=choice(1,2),3", "optim.lr", "sweep", ["holds another list"]),
    ("optim.lr=range(1,1)", "optim.lr", "sweep", ["from 1 to 1 is empty"]),
    ("optim.lr=range(1,5,0)", "optim.lr", "sweep", ["step 0"]),
    ("optim.lr=range(1,5.0,0)", "optim.lr", "sweep", ["step 0"]),
    ("optim.lr=range(1000000000)", "optim.lr", "sweep", ["more than 10,000 values"]),
    ("optim.lr=range(a,b)", "optim.lr", "override-syntax", ["can't be worked out"]),
    ("optim.lr=rangee(1,3)", "optim.lr", "override-syntax", ["Nearest: range", "=range(1,3)"]),
    ("optim.lr=range(1,3", "optim.lr", "override-syntax", ["'(' isn't closed"]),
    ("optim.lr=interval(1)", "optim.lr", "override-syntax", ["missing a required argument"]),
    ("optim.lr=interval(2,1)", "optim.lr", "sweep", ["=interval(1,2)"]),
    ("optim.lr=interval(1,1)", "optim.lr", "sweep", ["For a single value write optim.lr=1"]),
    ("optim.lr=interval(0,inf)", "optim.lr", "sweep", ["no finite ends"]),
    ("optim.lr=tag(log,interval(0,1))", "optim.lr", "sweep", ["begins at 0"]),
    ("optim.lr=tag(lgo,interval(1,2))", "optim.lr", "sweep", ["Nearest: log"]),
    ("optim.lr=tag(log,choice(1,2))", "optim.lr", "sweep", ["only for an interval"]),
    ("optim.lr=glob(*)", "optim.lr", "sweep", ["lists the files of a group"]),
    ("optim=glob(sgd*)", "optim", "sweep", ["no optim matches sgd*", "adamw"]),
    ("optim=adamw,adamm", "optim", "unknown-option", ["'adamm'", "Nearest: adamw"]),
    ("optim=adamw,3", "optim", "unknown-option", ["not '3'"]),
    ("run.output_dir=a,b", "run.output_dir", "sweep", ["a folder and a name of its own"]),
    ("run.name=a,b", "run.name", "sweep", ["a folder and a name of its own"]),
    ("run={name: a},{name: b}", "run", "sweep", ["a folder and a name of its own"]),
    ("checkpoint.resume=a,b", "checkpoint.resume", "sweep", ["its own checkpoint"]),
    ("hydra/launcher=basic,joblib", "hydra/launcher", "sweep", ["share its settings"]),
    ("hydra.launcher.n_jobs=1,2", "hydra.launcher.n_jobs", "sweep", ["share its settings"]),
    ("hydra/launcher=jobli", "hydra/launcher", "unknown-option", ["Nearest: joblib"]),
    ("hydra/launcher=null", "hydra/launcher", "unknown-option", ["Use one of: basic"]),
    ("hydra/sweeper=optuna2", "hydra/sweeper", "unknown-option", ["hydra/sweeper"]),
    ("hydra.launcher=joblib", "hydra.launcher", "hydra-setting", ["Write hydra/launcher=joblib"]),
    ("hydra.sweep.dir=x", "hydra.sweep.dir", "hydra-setting", ["run.output_dir"]),
    ("hydra.mode=MULTIRUN", "hydra.mode", "hydra-setting", ["hydra.launcher.KEY"]),
    ("hydra.launcher.a=${nope}", "hydra.launcher.a", "interpolation", ["there is no nope"]),
    ("optim.lr=5,6 optim.lr=7", "optim.lr", "given-twice", ["optim.lr=5,6 and optim.lr=7"]),
    ("oops", "", "override-syntax", ["isn't of the form"]),
]


@pytest.mark.parametrize(("line", "path", "code", "phrases"), FAULTS, ids=[c[0] for c in FAULTS])
def test_a_fault_of_a_sweep_is_told(
    line: str, path: str, code: str | None, phrases: list[str]
) -> None:
    request = read_sweep([GOOD, *line.split(" ", 1 if "{" not in line else 0)])
    assert [(fault.path, fault.code) for fault in request.faults] == (
        [(path, code)] if code else []
    )
    for fault in request.faults:
        report = format_fault(fault)
        assert [phrase for phrase in phrases if phrase not in report] == [], report
        assert fault.where.startswith("command line: ")
        assert fault.hint.endswith("."), fault
        assert fault.code in FAULT_CODES


@pytest.mark.parametrize(
    "line", ["recipe=nope", "recip=pocket_lora", "recipe=nope,nada", "~recipe"]
)
def test_a_recipe_that_doesnt_exist_is_told_by_each_point(line: str) -> None:
    request = read_sweep([line, "optim.lr=1,2"])
    assert request.faults == ()
    for point in request.points():
        (fault,) = compose_run(point).faults
        assert fault.path in ("recipe", "recip")


def test_a_recipe_is_no_number() -> None:
    (fault,) = read_sweep(["recipe=interval(1,2)"]).faults
    assert (fault.path, fault.message) == ("recipe", "a group is no number")


def test_every_fault_of_a_sweep_is_in_one_result() -> None:
    lines = [line for line, _, code, _ in FAULTS if code == "sweep" and line.count("=") == 1]
    keyed = [f"k{i}.{line}" for i, line in enumerate(lines) if line.startswith("optim.lr")]
    request = read_sweep([GOOD, *keyed, "oops", "hydra.mode=x"])
    assert len(request.faults) == len(keyed) + 2


def test_a_product_that_is_too_large_is_refused() -> None:
    request = read_sweep([GOOD, "optim.lr=range(1,201)", "trainer.seed=range(1,201)"])
    (fault,) = request.faults
    assert f"40,000 points (200 x 200); at most {MAX_POINTS:,}" in fault.message


def test_settings_come_from_files_and_overrides(settings_folder: Path) -> None:
    request = read_sweep(
        [GOOD, "hydra/launcher=joblib", "hydra/sweeper=search", "hydra.launcher.n_jobs=4"]
    )
    assert request.faults == ()
    assert request.settings == {
        "launcher": {"name": "joblib", "n_jobs": 4},
        "sweeper": {"name": "search", "n_trials": 20, "seed": 20},
    }
    assert request.base == (GOOD,)
    assert request.where("hydra.launcher.n_jobs") == "command line: hydra.launcher.n_jobs=4"
    assert request.where("hydra.launcher.name").endswith("_conf/hydra/launcher/joblib.yaml:2:1")


def test_settings_are_basic_by_default(settings_folder: Path) -> None:
    request = read_sweep([GOOD])
    assert request.settings == {"launcher": {"name": "basic"}, "sweeper": {"name": "basic"}}
    request = read_sweep([GOOD, "hydra.launcher={n_jobs: 3}"])
    assert request.settings["launcher"] == {"name": "basic", "n_jobs": 3}


def test_settings_of_a_sweep_dont_reach_a_run(settings_folder: Path) -> None:
    composition = compose_run([GOOD])
    assert composition.values == {"run": {"name": "x"}}
    assert composition.faults == ()


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "a b",
        "a,b",
        "[1]",
        "it's",
        'say "x"',
        "",
        "3",
        "null",
        "${x}",
        "\\",
        "a\\'b",
        "é=ü",
    ],
)
def test_any_text_survives_as_an_override(text: str) -> None:
    line = override_text("run.x", text)
    if "${" in text:
        line = line.replace("$", "\\$") if not line.startswith("run.x='") else line
        assert read_sweep([GOOD, line]).faults == ()
        return
    composition = compose_run([GOOD, line])
    assert composition.faults == ()
    assert composition.values["run"]["x"] == text


def test_overrides_are_replaced_by_key() -> None:
    old = [GOOD, "run.name=a", "++run.output_dir=b", "optim.lr=1"]
    new = replace_overrides(old, {"run.name": "c, d", "run.output_dir": "e"})
    assert new == [GOOD, "optim.lr=1", "run.name='c, d'", "run.output_dir=e"]

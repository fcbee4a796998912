"""Every fault of the YAML files is told with its line, and what isn't faulty is composed all the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.compose import compose_run, sources
from framework.errors import FAULT_CODES, format_fault

Write = Callable[[str, str], Path]

# recipes/mine.yaml; path, code and place of its one fault; what the report must hold; whether the rest is usable.
CASES = [
    (
        "optim: {lr: 1\nrun: x\n", "", "yaml-syntax", "2:4",
        ["expected ',' or '}'", "`run: x`", "starts in line 1"], False,
    ),
    ("optim:\n\tlr: 1\n", "", "yaml-syntax", "2:1", ["a tab stands where spaces belong"], False),
    ("run:\n  name: a: b\n", "", "yaml-syntax", "2:10", ["a colon stands where none"], False),
    ("run:\n  name: x\n   seed: 3\n", "", "yaml-syntax", "3:8", ["indent the keys"], False),
    ("run: {name: 'x\n", "", "yaml-syntax", "2:1", ["a quote isn't closed", "line 1"], False),
    ("a: 1\n---\nb: 2\n", "", "yaml-syntax", "2:1", ["a second document"], False),
    ("a: *nope\n", "", "yaml-syntax", "1:4", ["undefined alias 'nope'"], False),
    ("a: \x01\n", "", "yaml-syntax", "1:4", ["special characters"], False),
    ("- a\n- b\n", "", "yaml-syntax", "1:1", ["must be a mapping of keys, not a list"], False),
    ("hello\n", "", "yaml-syntax", "1:1", ["not a single value"], False),
    ("[" * 1200, "", "yaml-syntax", "", ["nested too deeply"], False),
    (
        "optim: {lr: 1}\noptim: {lr: 2}\n", "optim", "yaml-syntax", "2:1",
        ["duplicate key optim", "the other stands in line 1"], True,
    ),
    ("? [a]\n: 1\n", "", "yaml-syntax", "1:3", ["a key must be a word, not a list"], True),
    ("optim.lr: 3\n", "optim.lr", "unknown-key", "1:1", ["`optim: {lr: ...}`"], True),
    (
        "data: {path: !!python/object/apply:os.system [x]}\n", "data.path", "yaml-syntax", "1:14",
        ["!!python/object/apply:os.system can't be used"], True,
    ),
    ("a: &x {b: *x}\n", "a.b", "yaml-syntax", "1:4", ["an alias stands inside"], True),
    ("data: {path: 0b_}\n", "data.path", "yaml-syntax", "1:14", ["looks like a number"], True),
    ("# @package a b\n", "", "yaml-syntax", "1:1", ["takes one dotted path"], True),
    ("data: {path: '${oops'}\n", "data.path", "interpolation", "1:14", ["isn't closed"], True),
    ("data: {path: '${run.nme}'}\n", "data.path", "interpolation", "1:8", ["run.name"], True),
    ("data: {path: '${a.b}'}\na: {b: '???'}\n", "data.path", "interpolation", "1:8", ["a.b"], True),
    ("hydra: {run: {dir: x}}\n", "hydra", "hydra-setting", "1:1", ["Remove the section"], True),
    ("model: [1]\n", "model", "wrong-type", "1:1", ["a section in one file and a list"], True),
    ("defaults: pocket_lora\n", "defaults", "defaults-list", "1:1", ["must be a list"], False),
    ("defaults: {a: b}\n", "defaults", "defaults-list", "1:1", ["not a mapping"], False),
    ("defaults: [3]\n", "defaults", "defaults-list", "1:12", ["neither a name nor"], False),
    ("defaults: [{a: 1, b: 2}]\n", "defaults", "defaults-list", "1:12", ["several: a, b"], False),
    ("defaults: [{'': 1}]\n", "defaults", "defaults-list", "1:12", ["names no group"], True),
    ("defaults: [pocket_lra]\n", "recipe", "unknown-option", "1:12", ["Nearest: pocket_l"], False),
    ("defaults: [mine]\n", "recipe", "defaults-list", "1:12", ["stands on itself"], False),
    (
        "defaults: [pocket_lora.yaml]\n", "defaults", "defaults-list", "1:12",
        ["Write `- pocket_lora`"], True,
    ),
    (
        "defaults: [recipes/pocket_lora]\n", "defaults", "defaults-list", "1:12",
        ["Write `- pocket_lora`"], True,
    ),
    ("defaults: [_self_, _self_]\n", "defaults", "defaults-list", "1:20", ["twice"], True),
    ("defaults: [optim]\n", "defaults", "defaults-list", "1:12", ["names no option"], True),
    (
        "defaults: [override /modle: qwen_image]\n", "modle", "defaults-list", "1:12",
        ["Nearest: model", "Write `override /model: qwen_image`"], True,
    ),
    (
        "defaults: [override /model: fluxx]\n", "model", "unknown-option", "1:12",
        ["no model called 'fluxx'"], True,
    ),
    ("defaults: [override /optim: 3]\n", "optim", "defaults-list", "1:12", ["not 3"], True),
    (
        "defaults: [override optim: prodigy]\n", "optim", "defaults-list", "1:12",
        ["lacks its slash", "`override /optim: prodigy`"], True,
    ),
    ("defaults: [/optim: prodigy]\n", "optim", "defaults-list", "1:12", ["`override`"], True),
    ("defaults: [optim: prodigy]\n", "optim", "defaults-list", "1:12", ["`override`"], True),
    (
        "defaults: [overide /optim: prodigy]\n", "defaults", "defaults-list", "1:12",
        ["Nearest: override"], True,
    ),
    ("defaults: [override /optim@x: adamw]\n", "optim", "defaults-list", "1:12", ["with @"], True),
    (
        "defaults: [override /optim: '${model}']\n", "optim", "defaults-list", "1:12",
        ["no interpolations"], True,
    ),
    (
        "defaults: [recipe: pocket_lora]\n", "recipe", "defaults-list", "1:12",
        ["`- pocket_lora`"], False,
    ),
    (
        "defaults: [override /hydra/launcher: joblib]\n", "hydra/launcher", "hydra-setting",
        "1:12", ["on the command line"], True,
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "path", "code", "place", "phrases", "usable"), CASES, ids=[c[0][:40] for c in CASES]
)
def test_a_fault_is_told_and_the_rest_is_composed(
    write_recipe: Write,
    text: str,
    path: str,
    code: str,
    place: str,
    phrases: list[str],
    usable: bool,
) -> None:
    write_recipe("mine", text)
    composition = compose_run(["recipe=mine", "run.name=other", "trainer.extra=1"])
    assert [(fault.path, fault.code) for fault in composition.faults] == [(path, code)]
    (fault,) = composition.faults
    report = format_fault(fault)
    assert fault.where == f"recipes/mine.yaml:{place}".rstrip(":")
    assert [phrase for phrase in phrases if phrase not in report] == [], report
    assert fault.hint.endswith(".")
    assert not fault.message.endswith(".")
    assert fault.code in FAULT_CODES
    assert composition.complete == usable
    assert composition.values["trainer"]["extra"] == 1
    assert composition.values["run"]["name"] == "other"
    assert "defaults" not in composition.values


def test_every_fault_of_several_files_is_in_one_result(write_recipe: Write) -> None:
    write_recipe("base", "defaults: [override /optim: adamm]\nrun: {name: a, name: b}\n")
    write_recipe("broken", "optim: [\n")
    write_recipe(
        "mine",
        "defaults: [base, broken, nope, override /modle: x, _self_]\n"
        "optim.lr: 3\noptim: {lr: '${optim.lrr}', betas: !tuple [1]}\n",
    )
    composition = compose_run(["recipe=mine", "trainer=dpp"])
    assert {(fault.path, fault.where.partition("/")[2]) for fault in composition.faults} == {
        ("trainer", ""),
        ("optim", "base.yaml:1:12"),
        ("run.name", "base.yaml:2:16"),
        ("", "broken.yaml:2:1"),
        ("recipe", "mine.yaml:1:26"),
        ("modle", "mine.yaml:1:32"),
        ("optim.lr", "mine.yaml:2:1"),
        ("optim.lr", "mine.yaml:3:9"),
        ("optim.betas", "mine.yaml:3:36"),
    }


def test_a_circle_of_recipes_is_told_once(write_recipe: Write) -> None:
    write_recipe("one", "defaults: [two, _self_]\n")
    write_recipe("two", "defaults: [three]\n")
    write_recipe("three", "defaults: [one]\n")
    write_recipe("mine", "defaults: [one, _self_]\n")
    (fault,) = compose_run(["recipe=mine"]).faults
    assert fault.message == "one stands on itself: one → two → three → one"
    assert fault.where == "recipes/one.yaml:1:12"


def test_a_file_that_is_not_utf8_is_named_with_the_byte(user_folder: Path) -> None:
    (user_folder / "recipes" / "mine.yaml").write_bytes(b"a: 1\nrun: {name: caf\xe9}\n")
    (fault,) = compose_run(["recipe=mine"]).faults
    assert (fault.where, fault.code) == ("recipes/mine.yaml:2:16", "yaml-syntax")
    assert "0xe9" in fault.message


def test_a_byte_order_mark_is_no_fault(user_folder: Path) -> None:
    (user_folder / "recipes" / "mine.yaml").write_bytes(b"\xef\xbb\xbfrun: {name: x}\n")
    composition = compose_run(["recipe=mine"])
    assert composition.faults == ()
    assert composition.values["run"]["name"] == "x"


def test_a_file_that_cannot_be_read_is_named(user_folder: Path) -> None:
    (user_folder / "recipes" / "mine.yaml").symlink_to("nowhere")
    (fault,) = compose_run(["recipe=mine"]).faults
    assert (fault.where, fault.code) == ("recipes/mine.yaml", "file")


def test_a_folder_that_is_called_like_a_recipe_is_none(user_folder: Path) -> None:
    (user_folder / "recipes" / "mine.yaml").mkdir()
    (fault,) = compose_run(["recipe=mine"]).faults
    assert fault.message == "there is no recipe called 'mine'"


def test_two_files_of_one_name_are_told(write_recipe: Write, user_folder: Path) -> None:
    write_recipe("mine", "run: {name: x}\n")
    (user_folder / "recipes" / "mine.yml").write_text("run: {name: y}\n")
    (fault,) = compose_run(["recipe=mine"]).faults
    assert fault.message == "recipes/mine.yaml and recipes/mine.yml have the same name"


def test_aliases_that_multiply_each_other_are_refused(write_recipe: Write) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for i in range(1, 12):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]")
    write_recipe("mine", "\n".join(lines))
    (fault,) = compose_run(["recipe=mine"]).faults
    assert "aliases stand for more than 100,000 values" in fault.message


def test_the_order_of_overrides_in_a_defaults_list_is_free(write_recipe: Write) -> None:
    write_recipe("mine", "defaults: [override /optim: prodigy, pocket_lora, _self_]\n")
    composition = compose_run(["recipe=mine"])
    assert composition.faults == ()
    assert composition.values["optim"]["name"] == "prodigy"


def test_a_file_without_permission_is_named(
    write_recipe: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    write_recipe("mine", "run: {name: x}\n")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    faults = compose_run(["recipe=mine"]).faults
    assert {fault.message for fault in faults} == {"can't be read: Permission denied"}
    assert "conf/config.yaml" in faults[0].where


@pytest.fixture
def own_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree whose conf/ a person may have changed."""
    root = tmp_path / "tree"
    shutil.copytree(sources.conf_dir(), root / "conf")
    shutil.copytree(sources.shipped_recipes_dir(), root / "recipes")
    monkeypatch.setattr(sources, "_PACKAGE", root / "framework")
    monkeypatch.chdir(root)
    return root / "conf"


def test_a_broken_file_of_a_group_leaves_out_that_group_alone(own_conf: Path) -> None:
    (own_conf / "optim" / "adamw.yaml").write_text("name: [\n")
    (own_conf / "trainer" / "single.yaml").write_text("- a\n")
    composition = compose_run(["recipe=pocket_lora"])
    assert [fault.where for fault in composition.faults] == [
        "conf/optim/adamw.yaml:2:1",
        "conf/trainer/single.yaml:1:1",
    ]
    assert composition.complete
    assert composition.left_out == {"optim", "trainer"}
    assert composition.values["optim"]["lr"] == 2e-3


def test_a_broken_root_is_told_and_nothing_raises(own_conf: Path) -> None:
    (own_conf / "config.yaml").write_text("defaults: [\n")
    composition = compose_run(["recipe=pocket_lora", "optim.lr=1"])
    assert [fault.where for fault in composition.faults] == ["conf/config.yaml:2:1"]
    assert not composition.complete
    assert composition.values["optim"]["lr"] == 1


def test_an_unknown_option_of_the_root_can_still_be_chosen(own_conf: Path) -> None:
    file = own_conf / "config.yaml"
    file.write_text(file.read_text().replace("model: qwen_image", "model: qwen_imag"))
    composition = compose_run(["recipe=pocket_lora", "model=qwen_image"])
    (fault,) = composition.faults
    assert (fault.path, fault.nearest[0]) == ("model", "qwen_image")
    assert fault.where.startswith("conf/config.yaml:")
    assert composition.values["model"]["family"] == "qwen_image"


def test_a_group_of_ones_own_can_be_chosen(own_conf: Path) -> None:
    (own_conf / "validation").mkdir()
    (own_conf / "validation" / "long.yaml").write_text("max_samples: 500\n")
    composition = compose_run(["recipe=pocket_base", "validation=long"])
    assert composition.faults == ()
    assert composition.values["validation"] == {"max_samples": 500}

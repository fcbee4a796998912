"""Every fault of a command line is told in one report, in our words, and the rest is composed all the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from framework.compose import compose_run
from framework.errors import FAULT_CODES, Fault, format_fault

GOOD = "recipe=pocket_lora"

# What is typed beside a good recipe; path and code of the one fault; what its report must hold.
CASES = [
    ("oops", "", "override-syntax", ["'oops' isn't of the form key=value"]),
    ("pocket_lora", "", "override-syntax", ["recipe=pocket_lora"]),
    ("recipes/pocket_lora.yaml", "", "override-syntax", ["recipe=pocket_lora"]),
    ("=3", "", "override-syntax", ["'=3' has no key before ="]),
    ("~", "", "override-syntax", ["'~' can't be parsed"]),
    ("+++a=1", "a", "override-syntax", ["isn't a key"]),
    ("model..dit=3", "model.dit", "override-syntax", ["Write the key as a dotted path"]),
    ("sample.prompts[0]=a", "sample.prompts[0]", "override-syntax", ["sample.prompts.0=a"]),
    ("optim.lr = 1", "optim.lr", "override-syntax", ["a space before =", "Write optim.lr=1"]),
    ("data.path='é", "data.path", "override-syntax", ["a quote isn't closed: 'é"]),
    ("run.name=it's", "run.name", "override-syntax", ["a quote isn't closed"]),
    ("sample.prompts=[a,", "sample.prompts", "override-syntax", ["'[' isn't closed"]),
    ("sample.prompts=a]", "sample.prompts", "override-syntax", ["']' isn't opened"]),
    ("model.dit={a:1", "model.dit", "override-syntax", ["'{' isn't closed", "{one: 1, two: 2}"]),
    (
        "sample.prompts=[un château]",
        "sample.prompts",
        "override-syntax",
        ["the list can't be read", 'sample.prompts=["one","two"]'],
    ),
    ("optim.lr=fast(1,2)", "optim.lr", "override-syntax", ["there is no function 'fast'"]),
    ("x@y=1", "x", "override-syntax", ["another key with @"]),
    ("model@x=qwen_image", "model", "override-syntax", ["Write model=..."]),
    ("~optim.lr=1,2", "optim.lr", "override-syntax", ["Write ~optim.lr"]),
    ("optim.lr=1e-4,1e-5", "optim.lr", "override-syntax", ["holds several values", "-m", "[1,2]"]),
    ("optim.lr=range(3)", "optim.lr", "override-syntax", ["holds several values"]),
    ("recipe=recipes/pocket_lora.yaml", "recipe", "unknown-option", ["Write recipe=pocket_lora"]),
    ("model=fluxx", "model", "unknown-option", ["no model called 'fluxx'", "qwen_image"]),
    ("model=qwenimage", "model", "unknown-option", ["Nearest: qwen_image"]),
    ("optim=adam_w", "optim", "unknown-option", ["no optim called 'adam_w'", "Nearest: adamw"]),
    ("trainer=null", "trainer", "unknown-option", ["must name one of the files", "ddp, single"]),
    ("trainer=3", "trainer", "unknown-option", ["not '3'"]),
    ("trainer=", "trainer", "unknown-option", ["not ''"]),
    ("trainer=[ddp,3]", "trainer", "unknown-option", ["not '[ddp,3]'"]),
    ("trainer=[ddp,dpp]", "trainer", "unknown-option", ["no trainer called 'dpp'"]),
    ("~trainer=dpp", "trainer", "unknown-option", ["no trainer called 'dpp'"]),
    ("~trainer=ddp", "trainer", "defaults-list", ["hasn't chosen it"]),
    ("modle=qwen_image", "modle", "unknown-key", ["Nearest: model", "Write model=qwen_image"]),
    ("optimizer=prodigy", "optimizer", "unknown-key", ["Nearest: optim", "Write optim=prodigy"]),
    ("hydra.run.dir=x", "hydra.run.dir", "hydra-setting", ["run.output_dir"]),
    ("hydra=x", "hydra", "hydra-setting", ["Hydra's own settings"]),
    ("hydra/launcher=joblib", "hydra/launcher", "hydra-setting", ["octavo train -m"]),
    ("hydra.sweeper.n_trials=3", "hydra.sweeper.n_trials", "hydra-setting", ["octavo train -m"]),
    ("optim.lr.x=1", "optim.lr", "wrong-type", ["a single value (0.002)"]),
    ("sample.prompts.99=a", "sample.prompts[99]", "out-of-range", ["no element 99", "it has 8"]),
    ("sample.prompts.x=a", "sample.prompts.x", "out-of-range", ["no element x"]),
    ("model.dit.lora=[1]", "model.dit.lora", "wrong-type", ["to a list", "model.dit.lora.rank"]),
    ("sample.prompts={a: 1}", "sample.prompts", "wrong-type", ["can't be set to a section"]),
    ("~optim.bta", "optim.bta", "unknown-key", ["there is no such key"]),
    ("~optim.lrr", "optim.lrr", "unknown-key", ["Nearest: optim.lr"]),
    ("~trainer.seed", "trainer.seed", "unknown-key", ["its default already"]),
    ("~nothing", "nothing", "unknown-key", ["there is no such key"]),
    ("~optim.lr=7", "optim.lr", "wrong-value", ["its value is 0.002"]),
    ("~sample.prompts.0", "sample.prompts[0]", "override-syntax", ["Give the whole list"]),
    ("run.name=${run.nme}", "run.name", "interpolation", ["no run.nme", "Nearest: run.name"]),
    ("run.name=${nme}", "run.name", "interpolation", ["there is no nme"]),
    ("sample.seed=${trainer.seed}", "sample.seed", "interpolation", ["no file or override sets"]),
    ("optim.lr=${optim.lr}", "optim.lr", "interpolation", ["leads back to itself"]),
    ("optim.lr=${optim.lr", "optim.lr", "interpolation", ["its brace after ${ isn't closed"]),
    ("run.name='${optim.lr'", "run.name", "interpolation", ["its brace isn't closed"]),
    ("run.name=${oc.env:NOPE_X}", "run.name", "interpolation", ["variable NOPE_X isn't set"]),
    ("run.name=${oc.envv:HOME}", "run.name", "interpolation", ["Nearest: oc.env"]),
    ("run.name=${env:HOME}", "run.name", "interpolation", ["Nearest: oc.env"]),
    ("run.name=${now:%Y}", "run.name", "interpolation", ["there is no resolver 'now'"]),
    ("--model.dit.precision=fp8", "--model.dit.precision", "foreign-flag", ["have no dashes"]),
    ("--recipe=pocket_lora", "--recipe", "foreign-flag", ["have no dashes: recipe=pocket_lora"]),
    ("--fp8_models", "--fp8_models", "foreign-flag", ["model.dit.precision"]),
]


def is_whole(fault: Fault, line: str | None = None) -> bool:
    """Whether a fault says what, where, of which kind, and what to do."""
    says_where = fault.where.startswith("command line: ") if line else bool(fault.where)
    return bool(
        fault.message
        and says_where
        and fault.hint.endswith(".")
        and fault.code in FAULT_CODES
        and fault.code != "invalid"
        and not fault.message.endswith(".")
        and "hydra.cc" not in fault.message
    )


@pytest.mark.parametrize(("line", "path", "code", "phrases"), CASES, ids=[c[0] for c in CASES])
def test_a_fault_is_told_and_the_rest_is_composed(
    line: str, path: str, code: str, phrases: list[str]
) -> None:
    composition = compose_run([GOOD, line, "validation.seed=9", "trainer.extra=1"])
    assert [(fault.path, fault.code) for fault in composition.faults] == [(path, code)]
    (fault,) = composition.faults
    report = format_fault(fault)
    assert [phrase for phrase in phrases if phrase not in report] == [], report
    assert is_whole(fault, line), fault
    assert line in fault.where
    assert composition.complete
    assert composition.values["model"]["source"] == "assets/pocket"
    assert composition.values["validation"]["seed"] == 9
    assert composition.values["trainer"]["extra"] == 1


WITHOUT_RECIPE = [
    ([], "recipe", "missing-key", ["recipe: must be given", "pocket_lora"]),
    (["recipe=pocket_lra"], "recipe", "unknown-option", ["Nearest: pocket_lora"]),
    (["recipe=Pocket_Lra"], "recipe", "unknown-option", ["Nearest: pocket_lora"]),
    (["recipe=null"], "recipe", "unknown-option", ["must name one of the files"]),
    (["recipe=1"], "recipe", "unknown-option", ["must name one of the files"]),
    (["recipe={a: 1}"], "recipe", "unknown-option", ["must name one of the files"]),
    (["~recipe"], "recipe", "unknown-option", ["a run needs a recipe"]),
    (["recipe=../pocket_lora"], "recipe", "unknown-option", ["no recipe called"]),
    (["recipe=pocket_lora,pocket_base"], "recipe", "override-syntax", ["several values"]),
    (["recipe=glob(*)"], "recipe", "override-syntax", ["several values"]),
]


@pytest.mark.parametrize(
    ("lines", "path", "code", "phrases"), WITHOUT_RECIPE, ids=lambda v: str(v)[:30]
)
def test_without_a_recipe_the_overrides_are_still_composed(
    lines: list[str], path: str, code: str, phrases: list[str]
) -> None:
    composition = compose_run([*lines, "model.dit.precison=fp8", "optim.lr=fast"])
    assert [(fault.path, fault.code) for fault in composition.faults] == [(path, code)]
    report = format_fault(composition.faults[0])
    assert [phrase for phrase in phrases if phrase not in report] == [], report
    assert is_whole(composition.faults[0])
    assert not composition.complete
    assert composition.values["model"]["dit"] == {"precison": "fp8"}
    assert composition.values["optim"]["lr"] == "fast"


def test_every_fault_of_a_command_line_is_in_one_result() -> None:
    lines = [
        "oops", "=x", "a[0]=1", "data.path='é", "optim=adamm", "trainer=dpp", "modle=qwen_image",
        "optim.lr=1,2", "optim.betas.x.y=1", "hydra.job.name=x", "~nothing", "run.name=${run.nme}",
        "sample.seed=${env:X}", "--fp8_models", "model=null",
    ]  # fmt: skip
    composition = compose_run(["recipe=pocket_lra", *lines])
    told = " ".join(fault.where for fault in composition.faults)
    missing = [line for line in ["recipe=pocket_lra", *lines] if line not in told]
    assert missing == ["optim.betas.x.y=1"]  # no file sets betas, so this makes a section
    assert composition.values["optim"]["betas"] == {"x": {"y": 1}}


@pytest.mark.parametrize(
    "words", [["optim.lr", "=", "1"], ["optim.lr=", "1"], ["optim.lr", "=1"], ["recipe", "=", "a"]]
)
def test_spaces_around_the_sign_are_one_fault(words: list[str]) -> None:
    composition = compose_run([GOOD, *words])
    (fault,) = composition.faults
    assert fault.message == "there are spaces around ="
    assert fault.where == f"command line: {' '.join(words)}"
    assert fault.nearest == ("".join(words),)


TWICE = [
    (["optim.lr=1", "optim.lr=2"], "optim.lr"),
    (["optim.lr=1", "++optim.lr=2"], "optim.lr"),
    (["validation={fraction: 0.1}", "validation.fraction=0.2"], "validation.fraction"),
    (["model.dit.lora.rank=4", "model.dit.lora=null"], "model.dit.lora"),
    (["optim.lr=1", "~optim.lr"], "optim.lr"),
    (["optim=adamw", "optim=prodigy"], "optim"),
    (["recipe=pocket_lora", "recipe=pocket_base"], "recipe"),
    (["sample.prompts.0=a", "sample.prompts.0=b"], "sample.prompts[0]"),
]


@pytest.mark.parametrize(("lines", "path"), TWICE, ids=lambda v: str(v)[:40])
def test_a_key_with_two_values_is_a_fault_that_names_both(lines: list[str], path: str) -> None:
    overrides = lines if lines[0].startswith("recipe") else [GOOD, *lines]
    composition = compose_run(overrides)
    (fault,) = composition.faults
    assert (fault.path, fault.code) == (path, "given-twice")
    assert fault.message == f"is given twice: {lines[0]} and {lines[1]}"
    assert composition.complete


@pytest.mark.parametrize(
    "lines",
    [
        ["optim.lr=1", "optim.lr=1"],
        ["optim.lr=1e-4", "optim.lr=0.0001"],
        ["optim={lr: 1}", "optim.warmup_steps=2"],
        ["model.dit.lora=null", "model.dit.lora.rank=4"],
        ["sample.prompts=[a,b]", "sample.prompts.0=c"],
        ["optim=prodigy", "optim.lr=1"],
    ],
)
def test_values_that_agree_are_no_fault(lines: list[str]) -> None:
    assert compose_run([GOOD, *lines]).faults == ()


def test_a_circle_is_told_for_each_of_its_keys_and_not_for_what_follows_from_it() -> None:
    lines = ["optim.lr=${validation.seed}", "validation.seed=${optim.lr}", "data.path=${optim.lr}"]
    faults = compose_run([GOOD, *lines]).faults
    assert {fault.path for fault in faults} == {"optim.lr", "validation.seed"}


def test_a_misspelt_recipe_key_is_taken_as_it_was_meant() -> None:
    composition = compose_run(["recip=pocket_lora"])
    (fault,) = composition.faults
    assert (fault.path, fault.nearest, fault.code) == ("recip", ("recipe",), "unknown-key")
    assert composition.values["model"]["source"] == "assets/pocket"


def test_a_recipe_elsewhere_is_named_with_its_folder(user_folder: Path) -> None:
    (user_folder / "team").mkdir()
    (user_folder / "team" / "ours.yaml").write_text("run: {name: ours}\n")
    (fault,) = compose_run(["recipe=team/ours.yaml"]).faults
    assert "--config-dir team recipe=ours" in fault.hint


def test_values_behind_a_foreign_flag_belong_to_it(
    faults_of: Callable[..., tuple[Fault, ...]],
) -> None:
    faults = faults_of(GOOD, "--lora_rank", "32", "--learning_rate", "1e-4", "--x=1", "y=2")
    assert [fault.where for fault in faults] == [
        "command line: --lora_rank 32",
        "command line: --learning_rate 1e-4",
        "command line: --x=1",
    ]
    assert {fault.code for fault in faults} == {"foreign-flag"}


def test_what_follows_from_a_part_that_was_left_out_isnt_kept() -> None:
    composition = compose_run(["recipe=pocket_lra", "optim.lr=fast"])
    missing = Fault("data.path", "must be set", "", code="missing-key")
    rule = Fault("model", "nothing trains", "default", code="rule")
    typed = Fault("optim.lr", "no number", "command line: optim.lr=fast", code="wrong-type")
    assert [composition.keeps(fault) for fault in (missing, rule, typed)] == [False, False, True]
    complete = compose_run([GOOD, "optim=adamm"])
    inside = Fault("optim.lr", "x", "recipes/pocket_lora.yaml:1:1", code="rule")
    assert not complete.keeps(inside)
    assert complete.keeps(missing)


def test_no_message_repeats_hydras_advice() -> None:
    for line in ["optm.lr=1", "+optim.lr=1", "new=1", "++optim.new=1", "+optim.lr=2"]:
        assert compose_run([GOOD, line]).faults == ()
    reports = [format_fault(f) for line, *_ in CASES for f in compose_run([GOOD, line]).faults]
    assert not [r for r in reports if re.search(r"use \+|append|full_key|object_type", r)]


def test_resolvers_that_others_registered_mean_nothing_and_stay() -> None:
    OmegaConf.register_new_resolver("now", lambda pattern: pattern, replace=True)
    try:
        composition = compose_run([GOOD, "run.name=${now:%Y}"])
        assert [fault.code for fault in composition.faults] == ["interpolation"]
        assert OmegaConf.has_resolver("now")
    finally:
        OmegaConf.clear_resolver("now")

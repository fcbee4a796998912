"""`octavo validate` for machines: JSON, annotations of GitHub Actions, SARIF."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import jsonschema
import pytest

from framework import __version__
from framework.cli.findings import Judged, Report, read_place
from framework.cli.formats import github_summary, report_github, report_json
from framework.cli.main import main
from framework.cli.sarif import report_sarif
from framework.errors import FAULT_CODES, Fault

Capture = pytest.CaptureFixture[str]

IN_FILE = Fault(
    "model.dit.precision",
    "'fp9' is not allowed; it must be one of fp8, bf16",
    "recipes/ink.yaml:3:5",
    ("fp8",),
    "Write model.dit.precision=fp8.",
    code="wrong-value",
    value="fp9",
    allowed="one of fp8, bf16",
)
TYPED = Fault("optim.lr", "50 is too much", "command line: optim.lr=50", code="out-of-range")
UNSET = Fault("data.path", "must be set", "", hint="Set it.", code="missing-key")
WARNING = Fault("optim.lr", "1 is unusual", "recipes/base.yaml:7:3", code="unusual")
NO_DATA = Fault("data.path", '"x" does not exist', "recipes/ink.yaml:9:3", code="file")


def report(*judged: Judged, strict: bool = False) -> Report:
    return Report(judged, 0.94, strict)


def ink(*faults: Fault, warnings: tuple[Fault, ...] = ()) -> Judged:
    return Judged("recipe=ink", ("recipe=ink", "optim.lr=50"), faults, warnings, "recipes/ink.yaml")


def chalk(*faults: Fault, warnings: tuple[Fault, ...] = ()) -> Judged:
    return Judged("recipe=chalk", ("recipe=chalk",), faults, warnings, "recipes/chalk.yaml")


@pytest.fixture(autouse=True)
def outside_of_actions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("GITHUB_WORKSPACE", raising=False)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("where", "parts"),
    [
        ("recipes/a.yaml:14:5", ("file", "recipes/a.yaml", 14, 5, "")),
        ("recipes/a.yaml:14", ("file", "recipes/a.yaml", 14, 0, "")),
        ("/a b/c:d.yaml", ("file", "/a b/c:d.yaml", 0, 0, "")),
        ("command line: a.b=c:1:2", ("override", "", 0, 0, "a.b=c:1:2")),
        ("default", ("default", "", 0, 0, "")),
        ("", ("unknown", "", 0, 0, "")),
    ],
)
def test_a_place_is_split_into_its_parts(where: str, parts: tuple[Any, ...]) -> None:
    place = read_place(where)
    assert (place.kind, place.file, place.line, place.column, place.override) == parts


def test_summary_counts_configurations_and_different_warnings() -> None:
    both = report(ink(IN_FILE, warnings=(WARNING,)), chalk(warnings=(WARNING,)))
    assert both.summary() == "2 configurations: 1 valid, 1 with faults, 1 warning; 0.9 s"
    assert report(ink()).summary() == "1 configuration: 1 valid; 0.9 s"
    assert not report(ink(warnings=(NO_DATA,)), strict=True).failed
    assert report(ink(warnings=(WARNING,)), strict=True).failed


def test_json_says_everything_in_a_stable_shape() -> None:
    shape = json.loads(report_json(report(ink(IN_FILE, TYPED), chalk(warnings=(WARNING,)))))
    assert shape["version"] == 1
    assert shape["tool"] == {"name": "octavo", "version": __version__}
    assert shape["valid"] is False
    assert shape["summary"] == {
        "configurations": 2,
        "valid": 1,
        "faulty": 1,
        "warnings": 1,
        "strict": False,
        "seconds": 0.94,
    }
    first, second = shape["configurations"]
    assert {key: first[key] for key in ("name", "file", "overrides", "valid")} == {
        "name": "recipe=ink",
        "file": "recipes/ink.yaml",
        "overrides": ["recipe=ink", "optim.lr=50"],
        "valid": False,
    }
    assert first["faults"][0] == {
        "code": "wrong-value",
        "path": "model.dit.precision",
        "message": "'fp9' is not allowed; it must be one of fp8, bf16",
        "value": "fp9",
        "allowed": "one of fp8, bf16",
        "nearest": ["fp8"],
        "hint": "Write model.dit.precision=fp8.",
        "where": {
            "kind": "file",
            "text": "recipes/ink.yaml:3:5",
            "file": "recipes/ink.yaml",
            "line": 3,
            "column": 5,
            "override": None,
        },
    }
    assert first["faults"][1]["where"]["override"] == "optim.lr=50"
    assert second["valid"] is True
    assert [warning["code"] for warning in second["warnings"]] == ["unusual"]


COMMAND = re.compile(r"::(?P<level>error|warning) (?P<properties>[^:]*)::(?P<text>.*)")


def annotations(text: str) -> list[dict[str, str]]:
    """Read workflow commands as the runner of GitHub Actions does."""
    found = []
    for line in text.splitlines():
        match = COMMAND.fullmatch(line)
        if match is None:
            continue
        pairs = dict(pair.split("=", 1) for pair in match["properties"].split(","))
        read = {name: unquote(value) for name, value in pairs.items()}
        found.append({"level": match["level"], "text": unquote(match["text"]), **read})
    return found


def test_annotations_point_at_lines_of_files() -> None:
    text = report_github(report(ink(IN_FILE, UNSET), chalk(IN_FILE, warnings=(WARNING,))))
    first, second, third = annotations(text)
    assert first == {
        "level": "error",
        "file": "recipes/ink.yaml",
        "line": "3",
        "col": "5",
        "title": "model.dit.precision",
        "text": "'fp9' is not allowed; it must be one of fp8, bf16\nNearest: fp8\n"
        "Next: Write model.dit.precision=fp8.\nIn: all 2 configurations",
    }
    assert (second["file"], second["line"]) == ("recipes/ink.yaml", "1"), "the recipe that lacks it"
    assert (third["level"], third["file"]) == ("warning", "recipes/base.yaml")
    assert (
        text.splitlines()[-1]
        == report(ink(IN_FILE, UNSET), chalk(IN_FILE, warnings=(WARNING,))).summary()
    )


def test_what_was_typed_has_no_file_but_says_where_it_comes_from() -> None:
    (found,) = annotations(report_github(report(ink(TYPED))))
    assert "file" not in found
    assert "Set by: command line: optim.lr=50" in found["text"]


def test_annotations_are_escaped_as_the_runner_wants_it() -> None:
    fault = Fault("a:b,c", "100%\r\nof :: it, all", "recipes/a,b: c%.yaml:3")
    line = report_github(report(ink(fault))).splitlines()[0]
    assert line == (
        "::error file=recipes/a%2Cb%3A c%25.yaml,line=3,title=a%3Ab%2Cc::100%25%0D%0Aof :: it, all"
    )
    (found,) = annotations(line)
    assert found["file"] == "recipes/a,b: c%.yaml"
    assert found["text"] == "100%\r\nof :: it, all"


def test_repositories_are_not_told_of_files_that_this_machine_lacks(
    outside_of_actions: Path, capsys: Capture
) -> None:
    command = ["validate", "recipe=pocket_lora", "data.path=nowhere"]
    for form, told in (("json", True), ("github", False), ("sarif", False)):
        assert main([*command, "--format", form]) == 0
        assert ("nowhere" in capsys.readouterr().out) == told


def test_with_strict_counted_warnings_are_shown_as_errors() -> None:
    warnings = ink(warnings=(WARNING, NO_DATA))
    assert [a["level"] for a in annotations(report_github(report(warnings)))] == ["warning"] * 2
    strict = annotations(report_github(report(warnings, strict=True)))
    assert [(a["level"], a["title"]) for a in strict] == [
        ("error", "optim.lr"),
        ("warning", "data.path"),
    ]


def test_paths_start_at_the_root_of_the_repository(
    outside_of_actions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = outside_of_actions / "training"
    folder.mkdir()
    monkeypatch.setenv("GITHUB_WORKSPACE", str(outside_of_actions))
    monkeypatch.chdir(folder)
    (found,) = annotations(report_github(report(ink(IN_FILE))))
    assert found["file"] == "training/recipes/ink.yaml"
    log = json.loads(report_sarif(report(ink(IN_FILE))))["runs"][0]
    assert log["originalUriBaseIds"]["SRCROOT"]["uri"] == f"{outside_of_actions.as_uri()}/"
    place = log["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]
    assert place == {"uri": "training/recipes/ink.yaml", "uriBaseId": "SRCROOT"}


def test_a_file_outside_of_the_repository_is_named_in_the_text() -> None:
    shipped = Fault("a", "is wrong", "/opt/octavo/recipes/base.yaml:3:5")
    (found,) = annotations(report_github(report(ink(shipped))))
    assert "file" not in found
    assert "Set by: /opt/octavo/recipes/base.yaml:3:5" in found["text"]
    result = json.loads(report_sarif(report(ink(shipped))))["runs"][0]["results"][0]
    place = result["locations"][0]["physicalLocation"]["artifactLocation"]
    assert place == {"uri": "file:///opt/octavo/recipes/base.yaml"}


def test_the_job_summary_is_appended_in_markdown(
    outside_of_actions: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    summary = outside_of_actions / "summary.md"
    summary.write_text("# Before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    command = ["validate", "recipe=pocket_lora", "model.dit.precision=fp8,fp9"]
    assert main([*command, "--format", "github"]) == 2
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("::error title=model.dit.precision::'fp9' is not allowed")
    text = summary.read_text()
    assert text.startswith("# Before\n### Octavo: 2 configurations: 1 valid, 1 with faults")
    assert "| `recipe=pocket_lora model.dit.precision=fp9` | ❌ 1 fault" in text
    assert "- **Fault** `model.dit.precision`: 'fp9' is not allowed" in text
    main([*command, "--format", "text"])
    assert summary.read_text() == text, "only asked for by --format github"


def test_the_job_summary_is_kept_short() -> None:
    many = [Judged(f"recipe=r{i}", (), (Fault(f"k{i}", "bad"),), ()) for i in range(500)]
    text = github_summary(report(*many))
    assert "| … and 300 more | |" in text
    assert text.count("**Fault**") == 200


def test_what_a_person_wrote_is_no_markdown() -> None:
    fault = Fault("a", "<img> and *stars* | a_b", "command line: a=`x`|y")
    text = github_summary(report(ink(fault)))
    assert "&lt;img> and \\*stars\\* \\| a\\_b" in text
    assert "`command line: a='x'\\|y`" in text


# The part of the SARIF 2.1.0 schema and of its text that says what these reports must look like.
TEXT = {
    "type": "object",
    "required": ["text"],
    "properties": {"text": {"type": "string", "minLength": 1}},
}
LEVEL = {"enum": ["none", "note", "warning", "error"]}
INDEX = {"type": "integer", "minimum": -1}
SARIF: dict[str, Any] = {
    "type": "object",
    "required": ["version", "runs"],
    "additionalProperties": False,
    "properties": {
        "$schema": {"type": "string", "format": "uri"},
        "version": {"enum": ["2.1.0"]},
        "runs": {"type": "array", "items": {"$ref": "#/definitions/run"}},
    },
    "definitions": {
        "run": {
            "type": "object",
            "required": ["tool"],
            "additionalProperties": False,
            "properties": {
                "tool": {
                    "type": "object",
                    "required": ["driver"],
                    "additionalProperties": False,
                    "properties": {"driver": {"$ref": "#/definitions/driver"}},
                },
                "columnKind": {"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
                "originalUriBaseIds": {
                    "type": "object",
                    "additionalProperties": {
                        "required": ["uri"],
                        "properties": {"uri": {"pattern": "^[a-z]+:.*/$"}},
                    },
                },
                "invocations": {"type": "array", "items": {"$ref": "#/definitions/invocation"}},
                "results": {"type": "array", "items": {"$ref": "#/definitions/result"}},
                "properties": {"type": "object"},
            },
        },
        "driver": {
            "type": "object",
            "required": ["name"],
            "additionalProperties": False,
            "properties": {
                "name": {"type": "string"},
                "version": {"type": "string"},
                "semanticVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+"},
                "rules": {
                    "type": "array",
                    "uniqueItems": True,
                    "items": {
                        "type": "object",
                        "required": ["id"],
                        "additionalProperties": False,
                        "properties": {
                            "id": {"type": "string"},
                            "shortDescription": TEXT,
                            "help": TEXT,
                            "defaultConfiguration": {"properties": {"level": LEVEL}},
                        },
                    },
                },
            },
        },
        "invocation": {
            "type": "object",
            "required": ["executionSuccessful"],
            "additionalProperties": False,
            "properties": {
                "executionSuccessful": {"type": "boolean"},
                "exitCode": {"type": "integer"},
                "toolConfigurationNotifications": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["message"],
                        "additionalProperties": False,
                        "properties": {
                            "message": TEXT,
                            "level": LEVEL,
                            "associatedRule": {
                                "properties": {"id": {"type": "string"}, "index": INDEX},
                                "additionalProperties": False,
                            },
                            "properties": {"type": "object"},
                        },
                    },
                },
            },
        },
        "result": {
            "type": "object",
            # Code scanning refuses a report in which one result has no place in a file.
            "required": ["message", "ruleId", "locations"],
            "additionalProperties": False,
            "properties": {
                "ruleId": {"type": "string"},
                "ruleIndex": INDEX,
                "level": LEVEL,
                "message": TEXT,
                "locations": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["physicalLocation"],
                        "additionalProperties": False,
                        "properties": {
                            "physicalLocation": {"$ref": "#/definitions/physicalLocation"},
                            "logicalLocations": {"type": "array"},
                        },
                    },
                },
                "partialFingerprints": {
                    "type": "object",
                    "additionalProperties": {"type": "string"},
                },
                "properties": {"type": "object"},
            },
        },
        "physicalLocation": {
            "type": "object",
            "required": ["artifactLocation", "region"],
            "properties": {
                "artifactLocation": {
                    "required": ["uri"],
                    "additionalProperties": False,
                    "properties": {
                        "uri": {"type": "string", "not": {"pattern": r"^/|[\\ ]"}},
                        "uriBaseId": {"type": "string"},
                    },
                },
                "region": {
                    "required": ["startLine"],
                    "additionalProperties": False,
                    "properties": {
                        "startLine": {"type": "integer", "minimum": 1},
                        "startColumn": {"type": "integer", "minimum": 1},
                    },
                },
            },
        },
    },
}


def sarif_run(*judged: Judged, strict: bool = False) -> dict[str, Any]:
    """A report's only run, after its structure was checked."""
    log = json.loads(report_sarif(report(*judged, strict=strict)))
    jsonschema.Draft7Validator(SARIF).validate(log)
    run: dict[str, Any] = log["runs"][0]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    for result in run["results"]:
        assert rules[result["ruleIndex"]] == result["ruleId"]
    return run


def test_sarif_has_a_rule_for_every_code() -> None:
    rules = sarif_run(ink())["tool"]["driver"]["rules"]
    assert {rule["id"]: rule["shortDescription"]["text"] for rule in rules} == dict(FAULT_CODES)


def test_sarif_places_results_in_files() -> None:
    run = sarif_run(ink(IN_FILE, UNSET), chalk(IN_FILE, warnings=(WARNING,)))
    first, second, third = run["results"]
    assert first["locations"] == [
        {
            "physicalLocation": {
                "artifactLocation": {"uri": "recipes/ink.yaml", "uriBaseId": "SRCROOT"},
                "region": {"startLine": 3, "startColumn": 5},
            },
            "logicalLocations": [{"fullyQualifiedName": "model.dit.precision", "kind": "member"}],
        }
    ]
    assert first["properties"]["configurations"] == ["recipe=ink", "recipe=chalk"]
    assert (second["ruleId"], second["level"]) == ("missing-key", "error")
    assert second["locations"][0]["physicalLocation"]["region"] == {"startLine": 1}
    assert (third["ruleId"], third["level"]) == ("unusual", "warning")
    assert run["invocations"][0]["exitCode"] == 2


def test_sarif_tells_what_was_typed_as_a_notification() -> None:
    run = sarif_run(ink(TYPED))
    assert run["results"] == []
    (told,) = run["invocations"][0]["toolConfigurationNotifications"]
    assert told["associatedRule"]["id"] == "out-of-range"
    assert "Set by: command line: optim.lr=50" in told["message"]["text"]


def test_sarif_fingerprints_stay_when_lines_move() -> None:
    moved = Fault(**{**vars(IN_FILE), "where": "recipes/ink.yaml:30:5"})
    other = Fault(**{**vars(IN_FILE), "value": "fp7", "message": "'fp7' is not allowed"})
    marks = [
        sarif_run(ink(f))["results"][0]["partialFingerprints"] for f in (IN_FILE, moved, other)
    ]
    assert marks[0] == marks[1] != marks[2]


def test_sarif_uris_are_escaped() -> None:
    fault = Fault("a", "is wrong", "my recipes/a#1%.yaml:3:5")
    result = sarif_run(ink(fault))["results"][0]
    place = result["locations"][0]["physicalLocation"]["artifactLocation"]
    assert place["uri"] == "my%20recipes/a%231%25.yaml"


@pytest.mark.parametrize("form", ["json", "github", "sarif"])
def test_machines_get_an_answer_also_where_the_command_makes_no_sense(
    form: str, capsys: Capture
) -> None:
    assert main(["validate", "nowhere.yaml", "--format", form]) == 2
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "there is no file 'nowhere.yaml'" in captured.out
    if form != "github":
        json.loads(captured.out)

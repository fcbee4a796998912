"""Reports of `octavo validate` as SARIF 2.1.0, the format of code scanning.

Only what stands in a file is a result: code scanning refuses a whole report in which one result lacks a place in a
file. What the command line got wrong is told as a notification of the invocation, which is what SARIF has them for.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from framework import __version__
from framework.cli.findings import Finding, Report, from_repository, repository_root
from framework.errors import FAULT_CODES

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
_ROOT = "SRCROOT"
_RULES = tuple(FAULT_CODES)


def report_sarif(report: Report) -> str:
    """Write a report as SARIF, ending in a line break."""
    findings = report.findings()
    run = {
        "tool": {"driver": _driver()},
        "columnKind": "unicodeCodePoints",
        "originalUriBaseIds": {_ROOT: {"uri": f"{repository_root().as_uri()}/"}},
        "invocations": [
            {
                "executionSuccessful": True,
                "exitCode": 2 if report.failed else 0,
                "toolConfigurationNotifications": [
                    _notification(report, finding)
                    for finding in findings
                    if finding.place.kind != "file"
                ],
            }
        ],
        "results": [
            _result(report, finding) for finding in findings if finding.place.kind == "file"
        ],
        "properties": {"summary": report.summary()},
    }
    log = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=2, ensure_ascii=False) + "\n"


def _driver() -> dict[str, Any]:
    rules = [
        {
            "id": code,
            "shortDescription": {"text": text},
            "help": {
                "text": f"{text} The result says what is allowed; `octavo explain KEY` tells all about a key."
            },
            "defaultConfiguration": {"level": "warning" if code in _WARNINGS else "error"},
        }
        for code, text in FAULT_CODES.items()
    ]
    return {
        "name": "Octavo",
        "version": __version__,
        "semanticVersion": __version__,
        "rules": rules,
    }


_WARNINGS = ("unused", "unusual")


def _result(report: Report, finding: Finding) -> dict[str, Any]:
    fault, place = finding.fault, finding.place
    file = from_repository(place.file)
    artifact: dict[str, Any] = {"uri": Path(place.file).resolve().as_uri()}
    if file is not None:
        artifact = {"uri": quote(file), "uriBaseId": _ROOT}
    region = {"startLine": place.line or 1}
    if place.column:
        region["startColumn"] = place.column
    location: dict[str, Any] = {
        "physicalLocation": {"artifactLocation": artifact, "region": region}
    }
    if fault.path:
        location["logicalLocations"] = [{"fullyQualifiedName": fault.path, "kind": "member"}]
    identity = "\0".join([fault.code, fault.path, fault.value or fault.message, file or place.file])
    return {
        **_reference(finding),
        "level": finding.level,
        "message": {"text": _message(report, finding)},
        "locations": [location],
        "partialFingerprints": {"octavoFault/v1": hashlib.sha256(identity.encode()).hexdigest()},
        "properties": _properties(finding),
    }


def _notification(report: Report, finding: Finding) -> dict[str, Any]:
    reference = _reference(finding)
    return {
        "associatedRule": {"id": reference["ruleId"], "index": reference["ruleIndex"]},
        "level": finding.level,
        "message": {"text": _message(report, finding)},
        "properties": {**_properties(finding), "path": finding.fault.path},
    }


def _reference(finding: Finding) -> dict[str, Any]:
    return {"ruleId": finding.fault.code, "ruleIndex": _RULES.index(finding.fault.code)}


def _message(report: Report, finding: Finding) -> str:
    fault = finding.fault
    lines = [f"{fault.path}: {fault.message}." if fault.path else f"{fault.message}."]
    lines += [f"Set by: {fault.where}."] if fault.where and finding.place.kind != "file" else []
    lines += [f"Nearest: {', '.join(fault.nearest)}."] if fault.nearest else []
    lines += [f"Next: {fault.hint}"] if fault.hint else []
    concerned = report.concerned(finding)
    return " ".join([*lines, f"In {concerned}."] if concerned else lines)


def _properties(finding: Finding) -> dict[str, Any]:
    fault = finding.fault
    told = {"value": fault.value, "allowed": fault.allowed, "nearest": list(fault.nearest)}
    return {
        **{name: value for name, value in told.items() if value},
        "configurations": list(finding.names),
    }

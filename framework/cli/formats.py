"""Reports of `octavo validate` for machines: JSON for scripts, and annotations and a summary for GitHub Actions."""

from __future__ import annotations

import json
from typing import Any

from framework import __version__
from framework.cli.findings import Finding, Judged, Report, from_repository, read_place
from framework.errors import Fault

JSON_VERSION = 1
_MAX_SUMMARY_ROWS = 200


def report_json(report: Report) -> str:
    """Write a report as JSON, ending in a line break. Keys are only ever added while "version" stays the same."""
    warnings = {fault for one in report.judged for fault in one.warnings}
    shape = {
        "version": JSON_VERSION,
        "tool": {"name": "octavo", "version": __version__},
        "valid": not report.failed,
        "summary": {
            "configurations": len(report.judged),
            "valid": len(report.judged) - report.num_faulty,
            "faulty": report.num_faulty,
            "warnings": len(warnings),
            "strict": report.strict,
            "seconds": round(report.seconds, 3),
        },
        "configurations": [_judged_shape(one) for one in report.judged],
    }
    return json.dumps(shape, indent=2, ensure_ascii=False) + "\n"


def _judged_shape(one: Judged) -> dict[str, Any]:
    return {
        "name": one.name,
        "file": one.file or None,
        "overrides": list(one.overrides),
        "valid": not one.faults,
        "faults": [_fault_shape(fault) for fault in one.faults],
        "warnings": [_fault_shape(fault) for fault in one.warnings],
    }


def _fault_shape(fault: Fault) -> dict[str, Any]:
    place = read_place(fault.where)
    return {
        "code": fault.code,
        "path": fault.path,
        "message": fault.message,
        "value": fault.value or None,
        "allowed": fault.allowed or None,
        "nearest": list(fault.nearest),
        "hint": fault.hint or None,
        "where": {
            "kind": place.kind,
            "text": place.text or None,
            "file": place.file or None,
            "line": place.line or None,
            "column": place.column or None,
            "override": place.override or None,
        },
    }


def report_github(report: Report) -> str:
    """Write one workflow command per finding, which GitHub Actions shows at the line of the file, then the summary."""
    lines = [_annotation(report, finding) for finding in report.findings()]
    return "\n".join([*lines, report.summary()]) + "\n"


def _annotation(report: Report, finding: Finding) -> str:
    place, fault = finding.place, finding.fault
    file = from_repository(place.file) if place.kind == "file" else None
    numbers = {"line": place.line, "col": place.column}
    properties: dict[str, object] = {} if file is None else {"file": file, **numbers}
    properties["title"] = fault.path or fault.code
    told = ",".join(
        f"{name}={_escaped_property(str(value))}" for name, value in properties.items() if value
    )
    body = [fault.message]
    if fault.where and file is None:
        body.append(f"Set by: {fault.where}")
    if fault.nearest:
        body.append(f"Nearest: {', '.join(fault.nearest)}")
    if fault.hint:
        body.append(f"Next: {fault.hint}")
    concerned = report.concerned(finding)
    if concerned:
        body.append(f"In: {concerned}")
    text = _escaped("\n".join(body))
    return f"::{finding.level} {told}::{text}"


def _escaped(text: str) -> str:
    """Escape the text of a workflow command, which must be one line."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _escaped_property(text: str) -> str:
    """Escape a property of a workflow command; commas and colons would end it."""
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")


def github_summary(report: Report) -> str:
    """Write the job summary in Markdown: every configuration with its result, then every finding."""
    lines = [f"### Octavo: {report.summary()}", "", "| configuration | result |", "|---|---|"]
    for one in report.judged[:_MAX_SUMMARY_ROWS]:
        counts = [(len(one.faults), "fault"), (len(one.warnings), "warning")]
        told = ", ".join(f"{count} {word}{'s' * (count != 1)}" for count, word in counts if count)
        sign = "❌" if one.faults else "⚠️" if one.warnings else "✅"
        lines.append(f"| {_code(one.name)} | {sign} {told or 'valid'} |")
    left_out = len(report.judged) - _MAX_SUMMARY_ROWS
    lines += [f"| … and {left_out} more | |"] if left_out > 0 else []
    for finding in report.findings()[:_MAX_SUMMARY_ROWS]:
        lines += ["", *_finding_lines(report, finding)]
    return "\n".join(lines) + "\n\n"


def _finding_lines(report: Report, finding: Finding) -> list[str]:
    fault = finding.fault
    word = "Fault" if finding.level == "error" else "Warning"
    path = f" {_code(fault.path)}:" if fault.path else ""
    lines = [f"- **{word}**{path} {_plain(fault.message)}"]
    details = [
        ("Set by", _code(fault.where) if fault.where else ""),
        ("Nearest", ", ".join(_code(name) for name in fault.nearest)),
        ("Next", _plain(fault.hint)),
        ("In", _plain(report.concerned(finding))),
    ]
    return lines + [f"  - {name}: {text}" for name, text in details if text]


def _code(text: str) -> str:
    """Write text as code that may stand in a Markdown table."""
    return f"`{text.replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _plain(text: str) -> str:
    """Keep what a person wrote from being read as Markdown or HTML; our own `code` stays."""
    return text.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_").replace("|", "\\|")

"""Makes docs/errors.md: every broken configuration with the report that it gets.

Run as `python -m tests.broken_configs.page > docs/errors.md`.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path

from tests.broken_configs.running import Case, Outcome, read_cases, run_case

HEAD = """# What is reported for a broken configuration

Made by `python -m tests.broken_configs.page > docs/errors.md`; a test fails when this page is stale, and each of its
{count} cases is a test of its own. Reports go to stderr, exit code 2; nothing is read but small files, nothing is
written, torch isn't loaded. Every fault of a configuration is in one report. In each: the dotted path, what was asked
and what is allowed, what set it (file, line and column, or the override), the nearest valid name, and the next step.
"""


def render_page() -> str:
    cases = read_cases()
    parts = [HEAD.format(count=len(cases)), _overview(cases)]
    section = ""
    for case in cases:
        if case.section != section:
            section = case.section
            parts.append(f"## {section}\n")
        with tempfile.TemporaryDirectory() as folder:
            parts.append(_entry(case, run_case(case, Path(folder))))
    return "\n".join(parts)


def _overview(cases: list[Case]) -> str:
    rows = ["| case | written | kind |", "|---|---|---|"]
    for case in cases:
        codes = dict.fromkeys(expected["code"] for expected in case.faults + case.warnings)
        written = " ".join(case.args) if not case.files else ", ".join(case.files)
        anchor = "".join(c for c in case.title.lower() if c.isalnum() or c in " -_").replace(
            " ", "-"
        )
        rows.append(
            f"| [{case.title}](#{anchor}) | `{written.replace('|', chr(92) + '|')}` | {', '.join(codes)} |"
        )
    return "\n".join([*rows, ""])


def _entry(case: Case, outcome: Outcome) -> str:
    lines = [f"### {case.title}", ""]
    for name, text in case.files.items():
        lines += [f"`{name}`", "", "```yaml", text.rstrip("\n"), "```", ""]
    command = shlex.join(["octavo", case.command, *case.args])
    return "\n".join([*lines, "```console", f"$ {command}", outcome.report.rstrip("\n"), "```", ""])


if __name__ == "__main__":
    sys.stdout.write(render_page())

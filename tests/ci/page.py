"""docs/ci.md as data: its files, commands and codes. `python -m tests.ci.page` writes what the commands print anew."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import tempfile
from pathlib import Path

from framework.cli.main import main
from framework.errors import FAULT_CODES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ci.md"
BLOCK = re.compile(r"^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
CODES = re.compile(r"(?<=<!-- codes -->).*(?=<!-- end of codes -->)", re.DOTALL)


def blocks(kind: str) -> list[str]:
    """Text of every block of one language."""
    found = BLOCK.finditer(PAGE.read_text(encoding="utf-8"))
    return [match["text"] for match in found if match["kind"] == kind]


def write_files(folder: Path) -> dict[str, str]:
    """Write the files that the page shows; each names itself in its first line."""
    files = {text.splitlines()[0].removeprefix("# "): text for text in blocks("yaml")}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return files


def output_of(line: str) -> str:
    """What `$ octavo ...` prints in the current folder, errors first."""
    program, *arguments = shlex.split(line.removeprefix("$ "))
    assert program == "octavo"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        main(arguments)
    return err.getvalue() + out.getvalue()


def table_of_codes() -> str:
    """The page's table of fault codes."""
    rows = [f"| `{code}` | {text} |" for code, text in FAULT_CODES.items()]
    return "\n".join(["", "| code | means |", "|---|---|", *rows, ""])


def _anew(match: re.Match[str]) -> str:
    if match["kind"] != "console":
        return match[0]
    line = match["text"].splitlines()[0]
    return f"```console\n{line}\n{output_of(line)}```"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        write_files(Path(name))
        page = CODES.sub(lambda _: table_of_codes(), PAGE.read_text(encoding="utf-8"))
        PAGE.write_text(BLOCK.sub(_anew, page), encoding="utf-8")

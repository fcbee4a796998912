"""Makes docs/migration.md: which recipe each method of other trainers is, and what each of their settings is here.

Run as `python -m tests.migration.page > docs/migration.md`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from framework.migrate import TRAINERS, Row, Table, read_table

HEAD_FILE = Path(__file__).with_name("head.md")
FATES = {"same": "", "changed": "", "unneeded": "needs no setting", "lost": "no counterpart"}
INTRODUCTIONS = {
    "diffsynth": "Every flag of its training parsers.",
    "kohya": "Options of the training scripts for FLUX.1 and SDXL, and keys of the data set file.",
    "musubi": "Options of the training scripts for Qwen-Image, Wan and Z-Image, and keys of the data set file.",
    "ai-toolkit": "Keys below `config.process`.",
}


def render_page() -> str:
    parts = [HEAD_FILE.read_text(encoding="utf-8")]
    for trainer in TRAINERS:
        table = read_table(trainer)
        parts += [f"## {table.trainer}\n", f"{INTRODUCTIONS[trainer]}\n"]
        for title, rows in table.groups.items():
            parts += [f"### {title} ({table.trainer})\n", _table(table, rows)]
    return "\n".join(parts)


def _table(table: Table, rows: tuple[Row, ...]) -> str:
    lines = ["| there | here | |", "|---|---|---|"]
    for row in rows:
        names = ", ".join(f"`{table.prefix}{name}`" for name in row.names)
        here = ", ".join(f"`{key}`" for key in row.here) if row.fate != "lost" else ""
        lines.append(f"| {names} | {here or FATES[row.fate]} | {_cell(row.note)} |")
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")


if __name__ == "__main__":
    sys.stdout.write(render_page())

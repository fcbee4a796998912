"""`octavo schema`: every key of a configuration, for editors and for people."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Literal

from framework.cli.report import output_console
from framework.errors import ConfigError, Fault
from framework.schema.json_schema import json_schema, schema_names
from framework.schema.reference import render_reference

Form = Literal["json", "markdown"]


def schema_text(form: Form, of: str = "run") -> str:
    """Return a JSON Schema or the page of keys, ending in a line break.

    of: "run" for a whole configuration, "recipe" for what a recipe's file may hold, or a group such as "model".
    Raises ConfigError where there is no such schema.
    """
    names = schema_names()
    if of not in names:
        message = f"there is no schema called {of!r}; allowed: {', '.join(names)}"
        fault = Fault(
            "--of",
            message,
            f"command line: --of {of}",
            tuple(difflib.get_close_matches(of, names)),
            "Use `--of recipe` for the files in ./recipes, `--of run` for a whole configuration.",
            code="wrong-value",
            value=of,
            allowed=", ".join(names),
        )
        raise ConfigError([fault])
    if form == "markdown":
        return render_reference(of if of not in ("run", "recipe") else "")
    return json.dumps(json_schema(of), indent=2, ensure_ascii=False) + "\n"


def write_schemas(folder: Path) -> None:
    """Write every JSON Schema into a folder, which is made where it is missing; files there are replaced."""
    try:
        for name in schema_names():
            file = folder / f"{name}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(schema_text("json", name), encoding="utf-8")
    except OSError as error:
        message = f"the schemas can't be written: {error.strerror or error}"
        hint = "Name a folder that can be written to."
        where = f"command line: --write {folder}"
        fault = Fault("--write", message, where, hint=hint, code="file")
        raise ConfigError([fault]) from error
    output_console().print(f"{len(schema_names())} schemas in {folder}")

"""`octavo schema`: every key of a configuration, for editors and for people."""

from __future__ import annotations

import json
from typing import Literal

from framework.schema.reference import render_reference
from framework.schema.run import RunConfig


def schema_text(form: Literal["json", "markdown"]) -> str:
    """Return the JSON Schema of a whole configuration, or the reference page, ending in a line break."""
    if form == "markdown":
        return render_reference().rstrip("\n") + "\n"
    return json.dumps(RunConfig.model_json_schema(), indent=2, ensure_ascii=False) + "\n"

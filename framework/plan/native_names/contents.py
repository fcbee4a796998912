"""Tells by its keys what a file holds, so that a wrong one is refused in words before anything else is said of it."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from framework.errors import SourceError
from framework.hub import ComponentHeaders, read_component_config
from framework.plan.native_names.form import Content
from framework.plan.native_names.tables import CONTENTS, NAMES, prefixes_of
from framework.plan.published import without_prefix
from framework.schema.family import ComponentSpec


def check_contents(headers: ComponentHeaders, spec: ComponentSpec, component: str) -> None:
    """Refuse weights that are surely another model's, and single files in which nothing known is found.

    Raises SourceError that says what the file holds and what it should.
    """
    kind = spec.kind[1]
    inside = without_prefix(headers.tensors, prefixes_of(spec))
    found = contents_of(inside)
    wanted = [content for content in CONTENTS if kind in content.kinds]
    if not wanted or any(kind in content.kinds for content in found):
        _check_markers(inside, kind, headers)
        return
    if not found:
        found = contents_of(headers.tensors)
    if not found and headers.file is None:
        return  # what doesn't fit the folder's config.json is said when it is built
    words = ", ".join(dict.fromkeys(content.words for content in found))
    first = next(iter(headers.tensors), "no tensor at all")
    hints = [content.hint for content in found if content.hint]
    expected = " or ".join(dict.fromkeys(content.words for content in wanted))
    raise SourceError(
        f"the weights for {component} are not {expected}",
        where=str(headers.file or Path(headers.place)),
        found=words or f"nothing that is known here; its first tensor is {first}",
        hint=hints[0] if hints else f"correct the source of {component}, or model.family",
    )


def _check_markers(inside: Collection[str], kind: str, headers: ComponentHeaders) -> None:
    """Refuse a config of another version of the model, with weights of the same names and shapes."""
    for names in NAMES:
        for marker, (key, value) in names.markers if kind in names.kinds else ():
            if marker in inside and read_component_config(headers.place).get(key) != value:
                raise SourceError(
                    "weights and config.json are of different versions of the model",
                    where=str(headers.file or headers.place),
                    found=f"{marker} in the weights, but not {key}: {json.dumps(value)} in {headers.place}/config.json",
                    hint="take the config from the version that the weights are of: set model.source",
                )


def contents_of(keys: Collection[str]) -> list[Content]:
    """Everything known that a file with these keys holds."""
    return [content for content in CONTENTS if content.is_in(keys)]

"""JSON Schemas of a configuration: for editors that complete and check keys, for `octavo explain` and the page of keys.

Everything that a person reads about a key comes from here, so that editor, terminal and page can't disagree. Written as
draft 7 without references, because that is what YAML language servers understand in full.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from framework.schema.base import UNIT
from framework.schema.in_words import Json, default_in_words, is_section, values_in_words
from framework.schema.names import section_class
from framework.schema.run import RunConfig
from framework.schema.sweep import SweepSettings

DRAFT = "http://json-schema.org/draft-07/schema#"
WHOLE_RUN, RECIPE = "run", "recipe"
VRAM = "vram"
"""The group whose files are laid over the recipe's `model` section and hold keys about storage alone."""

GROUPS = ("model", "data", "objective", "optim", "trainer", "logger", VRAM)
"""Groups of which conf/ holds a choice of files: sections of a run, and set-ups of where weights rest."""

SWEEP_GROUPS = ("hydra/launcher", "hydra/sweeper")
"""Groups of settings that a sweep reads; each of their files has keys of its own."""

# "${optim.lr}" is filled in from another key; "???" must still be given.
INTERPOLATION = r"\$\{.+\}|^\?\?\?$"
_DEFAULTS_KEY = rf"^(optional )?(override )?/?({'|'.join((*GROUPS, RECIPE))}|hydra/\w+)(@[\w.]+)?$"


def schema_names() -> tuple[str, ...]:
    """What `json_schema` can be asked for: the whole run, a recipe, then every group."""
    return (WHOLE_RUN, RECIPE, *GROUPS, *SWEEP_GROUPS)


def json_schema(name: str) -> Json:
    """Build one schema.

    name: "run" for a complete configuration, "recipe" for a file that is merged with others (nothing is required,
    interpolations are allowed), or a group for one of its files.   Raises KeyError for other names.
    """
    if name == WHOLE_RUN:
        schema = copy.deepcopy(run_schema())
        title, description = (
            "A whole run",
            "A complete configuration, as `config.yaml` in a run folder.",
        )
    elif name == RECIPE:
        schema = _overlay(run_schema(), allow_text=False)
        title, description = (
            "A recipe",
            "What a recipe sets; keys that it leaves out keep their value.",
        )
    elif name == VRAM:
        schema = _overlay(_storage_keys(run_schema()["properties"]["model"]), allow_text=False)
        title, description = f"A choice of `{VRAM}`", _VRAM_DESCRIPTION
    elif name in GROUPS:
        schema = _overlay(run_schema()["properties"][name], allow_text=False)
        title, description = f"A choice of `{name}`", schema["description"]
    elif name in SWEEP_GROUPS:
        options = [_overlay(option, allow_text=False) for option in sweep_options(name)]
        schema = {"type": "object", "anyOf": options}
        title = f"A choice of `{name}`"
        field = SweepSettings.model_fields[name.rpartition("/")[2]]
        description = str(field.description)
    else:
        raise KeyError(name)
    if name not in (WHOLE_RUN, *SWEEP_GROUPS):
        schema["properties"] = {"defaults": _DEFAULTS_LIST, **schema["properties"]}
    schema |= {"$schema": DRAFT, "title": title, "description": description}
    return _ordered(schema)


@cache
def run_schema() -> Json:
    """The strict schema of `RunConfig`. Shared: copy it before changing it."""
    return section_schema(RunConfig, "")


def sweep_options(group: str) -> tuple[Json, ...]:
    """The strict schema of each choice of a sweep's group, e.g. of every launcher; its `name` has one value."""
    kind = group.rpartition("/")[2]
    union = get_args(SweepSettings.model_fields[kind].annotation) or ()
    return tuple(section_schema(choice, group.replace("/", ".")) for choice in union)


def section_schema(section: type[BaseModel], path: str) -> Json:
    """Build the strict schema of a section.   path: its dotted path, which titles start with; "" for the whole."""
    raw = section.model_json_schema()
    schema: Json = _inline(raw, raw.get("$defs", {}))
    _set_titles(schema, path)
    _describe_sections(schema, section)
    return schema


def find(schema: Json, path: str) -> Json | None:
    """The part of a strict schema that describes the key at a dotted path; None where there is no such key."""
    for piece in path.split(".") if path else ():
        part = schema.get("properties", {}).get(piece)
        if part is None:
            return None
        schema = part
    return schema


def walk_sections(schema: Json, path: str = "") -> Iterator[tuple[str, Json]]:
    """Yield every (dotted path, section), the outer before the inner."""
    yield path, schema
    for name, part in schema["properties"].items():
        if is_section(part):
            yield from walk_sections(part, f"{path}.{name}" if path else name)


def _inline(node: Any, definitions: Mapping[str, Any]) -> Any:
    """Copy a schema with references replaced by what they mean, and pydantic's forms by those of draft 7."""
    if isinstance(node, list):
        return [_inline(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = definitions[node["$ref"].rpartition("/")[2]]
        return _inline({**target, **{k: v for k, v in node.items() if k != "$ref"}}, definitions)
    copied = {key: _inline(value, definitions) for key, value in node.items() if key != "$defs"}
    if "prefixItems" in copied:
        copied["items"] = copied.pop("prefixItems")
        if all(item == copied["items"][0] for item in copied["items"]):
            copied["items"] = copied["items"][0]
    if "const" in copied:
        copied["enum"] = [copied.pop("const")]
    return _merge_nullable_section(copied)


def _merge_nullable_section(schema: Json) -> Json:
    """Write "a section or null" as one schema with two types, so that its keys are found at once."""
    options = schema.get("anyOf", [])
    sections = [option for option in options if "properties" in option]
    if len(options) != 2 or len(sections) != 1 or {"type": "null"} not in options:
        return schema
    outer = {key: value for key, value in schema.items() if key != "anyOf"}
    return {**sections[0], **outer, "type": ["object", "null"]}


def _set_titles(schema: Json, path: str) -> None:
    """Title every key with its dotted path, which is what an editor shows above its description."""
    schema["title"] = path or "run"
    for name, part in schema.get("properties", {}).items():
        _set_titles(part, f"{path}.{name}" if path else name)


def _describe_sections(schema: Json, root: type[BaseModel]) -> None:
    """Describe each section by its class, or by the key that holds it where a class serves several keys."""
    names: dict[type[BaseModel], set[str]] = {}
    found = list(_section_classes(root, schema))
    for name, _, section in found:
        names.setdefault(section, set()).add(name)
    for _, part, section in found:
        if len(names[section]) == 1:
            _, unset, meaning = part.get("description", "").partition("; unset means ")
            part["description"] = (section.__doc__ or "").strip().splitlines()[0]
            part["description"] += f" Unset means {meaning}" if unset else ""


def _section_classes(
    section: type[BaseModel], schema: Json, name: str = ""
) -> Iterator[tuple[str, Json, type[BaseModel]]]:
    """Yield (key, its schema, its class) of a section and of every one below it."""
    yield name, schema, section
    for key, field in section.model_fields.items():
        inner = section_class(field.annotation)
        if inner is not None:
            yield from _section_classes(inner, schema["properties"][key], key)


def _storage_keys(model: Json) -> Json:
    """The schema of the `model` section with only what says how weights rest and are fetched."""
    kept = {
        name: _storage_keys(part) if is_section(part) and name not in _STORAGE_KEYS else part
        for name, part in model["properties"].items()
        if name in _STORAGE_KEYS or "precision" in part.get("properties", {})
    }
    return {**model, "required": [], "properties": kept}


def _overlay(schema: Json, *, allow_text: bool = True) -> Json:
    """Turn a strict schema into one for a file that is merged with others.

    Nothing is required, and wherever a value stands, an interpolation or "???" may stand instead.
    allow_text: whether the value as a whole may be such a text.
    """
    changed = {key: value for key, value in schema.items() if key != "required"}
    if is_section(schema):
        required = schema.get("required", ())
        changed["properties"] = {
            name: _overlay({**part, **_hint(part, required=name in required)})
            for name, part in schema["properties"].items()
        }
    if isinstance(schema.get("items"), dict):
        changed["items"] = _overlay(schema["items"])
    if "anyOf" in schema:
        changed["anyOf"] = [_overlay(option, allow_text=False) for option in schema["anyOf"]]
    return _or_text(changed) if allow_text else changed


def _hint(key: Json, *, required: bool) -> Json:
    """What an editor shows when the mouse rests on a key; its own display leaves out ranges, units and defaults."""
    if is_section(key):
        return {}
    values, default = values_in_words(key, "`"), default_in_words(key, required=required, mark="`")
    return {
        "markdownDescription": f"{key['description']}\n\nValues: {values}\n\nDefault: {default}"
    }


def _or_text(schema: Json) -> Json:
    """Let an interpolation stand for a value."""
    kind = schema.get("type")
    text = {"type": "string", "pattern": INTERPOLATION}
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], text]}
    if "enum" in schema or (kind == "string" and "pattern" in schema):
        about = {key: value for key, value in schema.items() if key in _ABOUT}
        value = {key: value for key, value in schema.items() if key not in _ABOUT}
        if "pattern" in value:
            value["patternErrorMessage"] = f"It must be {values_in_words(value)}."
        return {**about, "anyOf": [value, text]}
    if kind == "string":
        return schema
    # A pattern binds texts only, so it can stand beside the limits of numbers, lists and sections.
    kinds = kind if isinstance(kind, list) else [kind]
    wanted = " or ".join(_KINDS[kind] for kind in kinds if kind in _KINDS)
    message = f"It must be {wanted}, or an interpolation such as ${{optim.lr}}."
    return {
        **schema,
        "type": [*kinds, "string"],
        "pattern": INTERPOLATION,
        "patternErrorMessage": message,
    }


def _ordered(schema: Json) -> Json:
    """Copy a schema with its keywords in the order in which a person reads them; the order of keys stays."""
    ranks = {keyword: rank for rank, keyword in enumerate(_READING_ORDER)}
    copied: Json = {}
    for keyword in sorted(schema, key=lambda keyword: ranks.get(keyword, len(ranks))):
        value = schema[keyword]
        if keyword in ("properties", "patternProperties"):
            value = {name: _ordered(part) for name, part in value.items()}
        elif keyword == "anyOf":
            value = [_ordered(option) for option in value]
        elif keyword == "items" and isinstance(value, dict):
            value = _ordered(value)
        copied[keyword] = value
    return copied


_READING_ORDER = (
    "$schema", "title", "description", "markdownDescription", "type", "enum", "pattern",
    "patternErrorMessage", UNIT, "minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "default", "examples", "anyOf",
    "items", "required", "additionalProperties", "properties", "patternProperties",
)  # fmt: skip
_ABOUT = ("title", "description", "markdownDescription", "default", "examples", UNIT)
_STORAGE_KEYS = frozenset(
    {"precision", "fp8", "offload", "granularity", "gradient_checkpointing", "vram_limit"}
)
_VRAM_DESCRIPTION = (
    "Where frozen weights rest and how they are fetched; laid over the recipe's `model` section."
)
_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "a section with keys of its own",
    "null": "null",
}
_DEFAULTS_LIST: Json = {
    "title": "defaults",
    "description": "Files that are merged first, in this order; `_self_` is this file. "
    "`override /optim: prodigy` takes another file of a group, a bare name another recipe.",
    "type": "array",
    "items": {
        "type": ["string", "object"],
        "minLength": 1,
        "patternProperties": {
            _DEFAULTS_KEY: {"type": ["string", "null", "array"], "items": {"type": "string"}}
        },
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    },
    "examples": [["pocket_lora", "_self_"], [{"override /optim": "prodigy"}]],
}

"""Reads the small files of a published checkpoint: configs and tokenizers. What all families need alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framework.errors import SourceError

_FETCH_TOKENIZER = "fetch the checkpoint's tokenizer folder again"


def untyped(thing: object) -> Any:
    """Lift the type of a module or class whose own methods aren't typed."""
    return thing


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object; SourceError where the file is missing, isn't JSON or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(
            "the config file is missing", where=str(path), hint="fetch the checkpoint again"
        ) from error
    except ValueError as error:
        raise SourceError("the config isn't JSON", where=str(path), found=str(error)) from error
    if not isinstance(values, dict):
        raise SourceError("the config isn't a JSON object", where=str(path))
    return values


def check_kind(found: object, expected: str, where: Path, *, family: str) -> None:
    """Refuse a config that says it is of another class or model type than `expected`."""
    if found != expected:
        raise SourceError(
            f"this is no {expected}",
            where=str(where),
            found=repr(found),
            hint=f"give model.source a checkpoint of the family {family}",
        )


def check_values(
    values: Mapping[str, Any], expected: Mapping[str, Any], folder: Path, *, what: str
) -> None:
    """Refuse a config of the right class but of a variant that is called in another way.

    expected: key -> the one value that a family can run; a key that the config leaves out has its class's default,
    which callers have put into `values`.   what: the variant that is wanted, for the message ("a FLUX.1 DiT").
    """
    wrong = {key: values.get(key) for key, value in expected.items() if values.get(key) != value}
    if wrong:
        needed = ", ".join(f"{key} {expected[key]}" for key in wrong)
        raise SourceError(
            f"{what} has {needed}",
            where=str(folder / "config.json"),
            found=", ".join(f"{key} {value}" for key, value in wrong.items()),
            hint="take a checkpoint of that model, or another model.family",
        )


def read_tokenizer(tokenizer_class: Any, folder: Path, *, frame_token: str | None = None) -> Any:
    """Load a tokenizer of the given class from a published folder.

    frame_token: a special token that every caption is framed with; it must be one token.
    Raises SourceError where the folder is missing, can't be read, or has no vocabulary, of which transformers says
    nothing: it makes an empty tokenizer.
    """
    if not folder.is_dir():
        raise SourceError(
            "the tokenizer is missing", where=str(folder), hint="fetch the checkpoint again"
        )
    probe = frame_token or "a"
    try:
        tokenizer = tokenizer_class.from_pretrained(str(folder), local_files_only=True)
        tokens = tokenizer(probe, add_special_tokens=False).input_ids
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _unreadable(folder, str(error)) from error
    if frame_token is not None and len(tokens) != 1:
        found = f"{frame_token}, which frames every caption, is {len(tokens)} tokens, not 1"
        raise _unreadable(folder, found)
    if frame_token is None and tokenizer.unk_token_id in tokens:
        raise _unreadable(folder, f"{probe!r} isn't in its vocabulary of {len(tokenizer)} tokens")
    return tokenizer


def _unreadable(folder: Path, found: str) -> SourceError:
    return SourceError(
        "the tokenizer can't be read", where=str(folder), found=found, hint=_FETCH_TOKENIZER
    )

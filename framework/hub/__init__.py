"""Finds a model's files: in a folder, in one file, in the hub's cache, or at the hub.

A hub component is planned from its headers (range requests); its weights are fetched when it is loaded. The place of
a component that isn't on this machine yet is written `hf://<owner>/<name>@<commit>/<subfolder>`, with `#<variant>`
where it was published in variants. huggingface_hub is imported only for hub ids.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.errors import SourceError
from framework.hub.local import (
    REPOSITORY,
    find_folder,
    has_variants,
    is_complete,
    snapshot_of,
    subfolder_of,
)
from framework.hub.remote import (
    cached_folder,
    commit_on_disk,
    download,
    hub_errors,
    remote_inventory,
    resolve_commit,
    translate,
)
from framework.inventory import StoredTensor, read_file_header, read_inventory

__all__ = [
    "REPOSITORY",
    "ComponentFiles",
    "ComponentHeaders",
    "fetch_place",
    "find_folder",
    "find_on_disk",
    "locate_component",
    "locate_extra",
    "locate_headers",
    "read_component_config",
    "read_headers",
]

_HUB_PLACE = re.compile(
    r"hf://(?P<repo>[^@]+)@(?P<commit>[^/]+)/(?P<subfolder>[^#]+)(?:#(?P<variant>.+))?"
)


@dataclass(frozen=True)
class ComponentFiles:
    """Where a component lies on this machine.

    folder: with its config.json, and with its weights unless they are in one `file` elsewhere.
    commit: of the hub repository; None for what is the user's own.
    variant: of the weights in the folder; None for the plain ones.
    """

    folder: Path
    commit: str | None
    file: Path | None = None
    variant: str | None = None


@dataclass(frozen=True)
class ComponentHeaders:
    """What is known of a component before its weights are read.

    place: absolute folder, or `hf://...` where the weights haven't been fetched.
    tensors: key -> StoredTensor; offsets of tensors that haven't been fetched count from the start of the file's data.
    file: the single file that holds the weights; None where they lie in the place.
    variant: of the weights; None for the plain ones.
    """

    place: str
    commit: str | None
    tensors: dict[str, StoredTensor]
    file: Path | None = None
    variant: str | None = None


def locate_component(
    source: str,
    subfolder: str,
    *,
    revision: str,
    weights: bool = True,
    variant: str | None = None,
) -> ComponentFiles:
    """Return the folder of a component, fetching it from the hub if it isn't here.

    source: a folder (relative to the working directory or to the repository), a single file, or a hub id.
    subfolder: of the component, e.g. "transformer".
    weights: False fetches only small files (tokenizer, configuration), and a single file stands for its folder.
    variant: "fp16", where the component is published in variants.
    Fetching shows a progress bar, goes on where it was cut, and takes safetensors only, never pickles.
    Raises SourceError where the folder, the repository or the revision doesn't exist, is gated, or can't be reached.
    """
    local = find_folder(source)
    if local is not None:
        return _local_files(local, subfolder, revision, variant if weights else None)
    commit = resolve_commit(source, revision)
    cached = cached_folder(source, subfolder, commit)
    if cached is not None and (not weights or is_complete(cached, variant)):
        return ComponentFiles(cached, commit, variant=variant)
    folder = download(source, subfolder, commit=commit, weights=weights, variant=variant)
    return ComponentFiles(folder, commit, variant=variant)


def find_on_disk(
    source: str,
    subfolder: str,
    *,
    revision: str,
    config_source: str | None = None,
    variant: str | None = None,
) -> ComponentFiles | None:
    """Where a component lies, without asking the hub: None where it, or its config, would have to be fetched.

    config_source: where a single file's config.json is looked for, unless it lies beside the file.
    """
    local = find_folder(source)
    if local is not None:
        if local.is_file():
            folder = _config_on_disk(local, subfolder, config_source, revision)
            return None if folder is None else ComponentFiles(folder, None, local)
        return _local_files(local, subfolder, revision, variant)
    commit = commit_on_disk(source, revision)
    cached = cached_folder(source, subfolder, commit) if commit else None
    if cached is None or not is_complete(cached, variant):
        return None
    return ComponentFiles(cached, commit, variant=variant if has_variants(cached) else None)


def locate_extra(source: str, name: str, *, revision: str) -> Path:
    """Return the folder of something without weights: "tokenizer", "scheduler"."""
    return locate_component(source, name, revision=revision, weights=False).folder


def locate_headers(
    source: str,
    subfolder: str,
    *,
    revision: str,
    config_source: str | None = None,
    variant: str | None = None,
) -> ComponentHeaders:
    """Read what a component holds without fetching its weights.

    config_source: folder or hub id with a single file's config.json, unless one lies beside the file.
    variant: is passed over by components that were published without any.
    """
    local = find_folder(source)
    if local is not None:
        if local.is_file():
            folder = _config_on_disk(local, subfolder, config_source, revision)
            if folder is None:
                assert config_source is not None  # a hub id
                folder = locate_component(
                    config_source, subfolder, revision=revision, weights=False
                ).folder
            return read_headers(ComponentFiles(folder, None, local))
        return read_headers(_local_files(local, subfolder, revision, variant))
    commit = resolve_commit(source, revision)
    cached = cached_folder(source, subfolder, commit)
    if cached is not None and is_complete(cached, variant):
        found = variant if has_variants(cached) else None
        return read_headers(ComponentFiles(cached, commit, variant=found))
    tensors, found = remote_inventory(source, subfolder, commit, variant)
    place = f"hf://{source}@{commit}/{subfolder}" + (f"#{found}" if found else "")
    return ComponentHeaders(place, commit, tensors, variant=found)


def read_headers(files: ComponentFiles) -> ComponentHeaders:
    """Read the headers of a component that lies on this machine."""
    if files.file is not None:
        tensors = read_file_header(files.file)
    else:
        tensors = read_inventory(files.folder, variant=files.variant)
    return ComponentHeaders(str(files.folder), files.commit, tensors, files.file, files.variant)


def read_component_config(place: str) -> dict[str, Any]:
    """Read the `config.json` of a planned component, a small file, so that a wrong model is refused early.

    Raises SourceError where it is missing or isn't a JSON object.
    """
    match = _HUB_PLACE.fullmatch(place)
    path = Path(place) / "config.json"
    if match is not None:
        from huggingface_hub import hf_hub_download

        name = f"{match['subfolder']}/config.json"
        try:
            path = Path(hf_hub_download(match["repo"], name, revision=match["commit"]))
        except hub_errors() as error:
            raise translate(error, match["repo"], match["commit"]) from error
    hint = "fetch the checkpoint again"
    if not path.is_file():
        raise SourceError("the config file is missing", where=str(path), hint=hint)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(
            "the config file can't be read", where=str(path), found=str(error), hint=hint
        ) from error
    if not isinstance(values, dict):
        raise SourceError("the config file isn't a JSON object", where=str(path), hint=hint)
    return values


def fetch_place(place: str) -> Path:
    """Turn the place of a planned component into a folder on this machine, fetching its weights if need be."""
    match = _HUB_PLACE.fullmatch(place)
    if match is None:
        return Path(place)
    return locate_component(
        match["repo"], match["subfolder"], revision=match["commit"], variant=match["variant"]
    ).folder


def _local_files(
    local: Path, subfolder: str, revision: str, variant: str | None = None
) -> ComponentFiles:
    """The component in a local folder; of a repository in the hub's cache, the one in the snapshot of `revision`."""
    if local.is_file():
        local = local.parent
    local, commit = snapshot_of(local, revision)
    folder = subfolder_of(local, subfolder)
    return ComponentFiles(
        folder, commit, variant=variant if variant and has_variants(folder) else None
    )


def _config_on_disk(
    file: Path, subfolder: str, config_source: str | None, revision: str
) -> Path | None:
    """Folder with the config.json of a single file; None where the hub has it and it isn't in the cache.

    It is the one beside the file, or else that of `config_source`. A single file there stands for its folder.
    """
    if (file.parent / "config.json").is_file():
        return file.parent
    source = config_source if config_source is not None else str(file)
    local = find_folder(source)
    if local is None:
        commit = commit_on_disk(source, revision)
        cached = cached_folder(source, subfolder, commit) if commit else None
        return cached if cached is not None and (cached / "config.json").is_file() else None
    root, _ = snapshot_of(local.parent if local.is_file() else local, revision)
    if (root / subfolder / "config.json").is_file():
        return root / subfolder
    # Of a whole checkpoint without any config this is said once, not for each of its parts.
    some = sorted(path.parent.name for path in root.glob("*/config.json"))
    missing = f"{subfolder}/config.json" if some else "folder with configs"
    raise SourceError(
        f"there is no {missing} for the weights in {file.name}",
        where=str(root),
        found=f"configs of {', '.join(some)}" if some else "",
        hint="give the file as the `source` of its component (model.dit.source, model.vae.source, ...), and a "
        "folder or hub id with configs, tokenizer and scheduler as model.source",
    )

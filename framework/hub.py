"""Finds a model's files: in a folder, in the hub's cache, or at the hub. Imports huggingface_hub only for hub ids.

A hub component is planned from its headers (range requests); its weights are fetched when it is loaded. The place of
a component that isn't on this machine yet is written `hf://<owner>/<name>@<commit>/<subfolder>`.
"""

from __future__ import annotations

import errno
import json
import logging
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from framework.errors import SourceError
from framework.inventory import (
    StoredTensor,
    check_index,
    find_index,
    parse_header,
    parse_index,
    read_index,
    read_inventory,
)

REPOSITORY = Path(__file__).resolve().parents[1]
"""Relative sources are looked up here after the working directory: `assets/pocket` works from anywhere."""

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_HUB_PLACE = re.compile(r"hf://(?P<repo>[^@]+)@(?P<commit>[^/]+)/(?P<subfolder>.+)")
_SMALL_FILES = ("*.json", "*.txt", "*.jinja", "*.model")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS})
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComponentFiles:
    """Where a component lies on this machine.   commit: of the hub repository; None for a folder of the user's."""

    folder: Path
    commit: str | None


@dataclass(frozen=True)
class ComponentHeaders:
    """What is known of a component before its weights are read.

    place: absolute folder, or `hf://...` where the weights haven't been fetched.
    tensors: key -> StoredTensor; offsets of tensors that haven't been fetched count from the start of the file's data.
    """

    place: str
    commit: str | None
    tensors: dict[str, StoredTensor]


def locate_component(
    source: str, subfolder: str, *, revision: str, weights: bool = True
) -> ComponentFiles:
    """Return the folder of a component, fetching it from the hub if it isn't here.

    source: a folder (relative to the working directory or to the repository) or a hub id.
    subfolder: of the component, e.g. "transformer".
    weights: False fetches only small files (tokenizer, configuration).   Fetching shows a progress bar, goes on where
    it was cut, and takes safetensors only, never pickles.
    Raises SourceError where the folder, the repository or the revision doesn't exist, is gated, or can't be reached.
    """
    local = find_folder(source)
    if local is not None:
        return ComponentFiles(_subfolder_of(local, subfolder), None)
    commit = _resolve_commit(source, revision)
    cached = _cached_folder(source, subfolder, commit)
    if cached is not None and (not weights or _is_complete(cached)):
        return ComponentFiles(cached, commit)
    return ComponentFiles(_download(source, subfolder, commit=commit, weights=weights), commit)


def find_on_disk(source: str, subfolder: str, *, revision: str) -> ComponentFiles | None:
    """Like `locate_component`, but never asks the hub: None where the component would have to be fetched."""
    local = find_folder(source)
    if local is not None:
        return ComponentFiles(_subfolder_of(local, subfolder), None)
    commit = revision if _COMMIT.fullmatch(revision) else _cached_refs(source, revision)
    cached = _cached_folder(source, subfolder, commit) if commit else None
    return ComponentFiles(cached, commit) if cached is not None and _is_complete(cached) else None


def locate_extra(source: str, name: str, *, revision: str) -> Path:
    """Return the folder of something without weights: "tokenizer", "scheduler"."""
    return locate_component(source, name, revision=revision, weights=False).folder


def locate_headers(source: str, subfolder: str, *, revision: str) -> ComponentHeaders:
    """Read what a component holds without fetching its weights."""
    local = find_folder(source)
    if local is not None:
        folder = _subfolder_of(local, subfolder)
        return ComponentHeaders(str(folder), None, read_inventory(folder))
    commit = _resolve_commit(source, revision)
    cached = _cached_folder(source, subfolder, commit)
    if cached is not None and _is_complete(cached):
        return ComponentHeaders(str(cached), commit, read_inventory(cached))
    return ComponentHeaders(
        f"hf://{source}@{commit}/{subfolder}", commit, _remote_inventory(source, subfolder, commit)
    )


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
        except _hub_errors() as error:
            raise _translate(error, match["repo"], match["commit"]) from error
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
    return locate_component(match["repo"], match["subfolder"], revision=match["commit"]).folder


def find_folder(source: str) -> Path | None:
    """Return the folder that `source` names, or None if it is a hub id.

    Raises SourceError for what can only be a path and doesn't exist.
    """
    path = Path(source).expanduser()
    for candidate in (path,) if path.is_absolute() else (Path.cwd() / path, REPOSITORY / path):
        if candidate.is_dir():
            return candidate.resolve()
    if _HUB_ID.fullmatch(source) and not source.startswith("."):
        return None
    raise SourceError(
        f'the model folder "{source}" does not exist',
        where=str(path if path.is_absolute() else Path.cwd() / path),
        found=_neighbours(path),
        hint="correct `source`: a folder in the published layout, or a hub id such as Qwen/Qwen-Image",
    )


def _subfolder_of(folder: Path, subfolder: str) -> Path:
    if (folder / subfolder).is_dir():
        return folder / subfolder
    if (folder / "config.json").is_file():
        return folder
    inside = sorted(path.name for path in folder.iterdir() if path.is_dir())
    raise SourceError(
        f'the model has no folder "{subfolder}"',
        where=str(folder),
        found=f"folders: {', '.join(inside[:8])}" if inside else "no folders inside",
        hint="`source` must hold the published layout (transformer/, text_encoder/, vae/, tokenizer/, scheduler/)",
    )


def _neighbours(path: Path) -> str:
    """Say which folders lie where `path` was looked for, nearest names first."""
    for base in (Path.cwd(), REPOSITORY):
        parent = (base / path).parent
        if parent.is_dir():
            names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir())
            near = get_close_matches(path.name, names, n=3, cutoff=0.5)
            if near:
                return f"nearest folders in {parent}: {', '.join(near)}"
    return ""


def _resolve_commit(source: str, revision: str) -> str:
    """The commit that `revision` stands for now; what the cache knows if the hub can't be reached."""
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    if _is_offline():
        if known := _cached_refs(source, revision):
            return known
        raise _offline_error(source, revision)
    try:
        commit = HfApi().model_info(source, revision=revision, timeout=10).sha
    except _hub_errors() as error:
        if _is_unreachable(error) and (known := _cached_refs(source, revision)):
            _log.warning(
                "the hub can't be reached; %s stands for commit %s, fetched before", revision, known
            )
            return known
        raise _translate(error, source, revision) from error
    if not commit:
        raise SourceError(f"the hub names no commit for revision {revision}", where=source)
    return commit


def _cached_refs(source: str, revision: str) -> str | None:
    """The commit that the local cache has for a branch or tag."""
    from huggingface_hub import constants

    ref = Path(constants.HF_HUB_CACHE) / f"models--{source.replace('/', '--')}" / "refs" / revision
    return ref.read_text(encoding="utf-8").strip() if ref.is_file() else None


def _cached_folder(source: str, subfolder: str, commit: str) -> Path | None:
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE) / f"models--{source.replace('/', '--')}"
    folder = repository / "snapshots" / commit / subfolder
    return folder if folder.is_dir() else None


def _is_complete(folder: Path) -> bool:
    """Whether configuration and every weight file are there; files appear in the cache only when they are whole."""
    if not (folder / "config.json").is_file():
        return False
    index = find_index(folder)
    if index is None:
        return any(folder.glob("*.safetensors"))
    return all((folder / name).is_file() for name in set(read_index(index).values()))


def _download(source: str, subfolder: str, *, commit: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    if _is_offline():
        cached = _cached_folder(source, subfolder, commit)
        if cached is not None and not weights:
            return cached
        raise _offline_error(source, commit)
    patterns = [
        f"{subfolder}/{pattern}"
        for pattern in (*_SMALL_FILES, *(("*.safetensors",) if weights else ()))
    ]
    try:
        root = snapshot_download(source, revision=commit, allow_patterns=patterns)
    except _hub_errors() as error:
        raise _translate(error, source, commit) from error
    folder = Path(str(root)) / subfolder
    if not folder.is_dir():
        raise SourceError(f'the repository has no folder "{subfolder}"', where=f"{source}@{commit}")
    return folder


def _remote_inventory(source: str, subfolder: str, commit: str) -> dict[str, StoredTensor]:
    """Read headers by range requests, and the index, which is small."""
    from huggingface_hub import HfApi, hf_hub_download

    if _is_offline():
        raise _offline_error(source, commit)
    api = HfApi()
    where = f"{source}@{commit}/{subfolder}"
    try:
        listed = api.list_repo_files(source, revision=commit)
        inside = [name for name in listed if name.rpartition("/")[0] == subfolder]
        indexes = sorted((n for n in inside if n.endswith(".safetensors.index.json")), key=len)
        weight_map: dict[str, str] = {}
        if indexes:
            path = hf_hub_download(source, indexes[0], revision=commit)
            weight_map = parse_index(Path(path).read_text(encoding="utf-8"), where=where)
            names = sorted({f"{subfolder}/{name}" for name in weight_map.values()})
        else:
            names = [
                n for n in inside if n.endswith(".safetensors") and Path(n).name.count(".") == 1
            ]
        if not names or not set(names) <= set(inside):
            raise SourceError(
                f'the repository has no complete safetensors weights in "{subfolder}"',
                where=where,
                found=", ".join(sorted({n.split("/")[0] for n in listed if "/" in n})[:8]),
            )
        headers = {
            name: api.parse_safetensors_file_metadata(source, name, revision=commit)
            for name in names
        }
    except _hub_errors() as error:
        raise _translate(error, source, commit) from error
    tensors: dict[str, StoredTensor] = {}
    for name, metadata in headers.items():
        tensors.update(
            parse_header(
                _as_header(metadata), file=Path(name).name, data_start=0, where=f"{source}/{name}"
            )
        )
    check_index(weight_map, tensors, where=where)
    return tensors


def _as_header(metadata: Any) -> dict[str, Any]:
    """Give huggingface_hub's object the form of the JSON that it was parsed from."""
    return {
        key: {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": list(info.data_offsets),
        }
        for key, info in metadata.tensors.items()
    }


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub and its HTTP client raise; SourceError is none of these."""
    from huggingface_hub import errors

    http = getattr(errors, "HTTPError", OSError)
    return (OSError, ValueError, http, errors.SafetensorsParsingError, errors.EntryNotFoundError)


def _is_unreachable(error: Exception) -> bool:
    """Whether no answer came at all, as opposed to a refusal or a full disk."""
    if isinstance(error, ValueError) or getattr(error, "errno", None) in _DISK_ERRORS:
        return False
    return getattr(error, "response", None) is None


def _translate(error: Exception, source: str, revision: str) -> SourceError:
    """Say what a hub error means for the user and what to do next."""
    from huggingface_hub import errors

    where = f"hub repository {source}"
    if isinstance(error, errors.GatedRepoError):
        return SourceError(
            "the repository is gated: its licence must be accepted first",
            where=where,
            hint=f"accept it on the page of {source}, then run `hf auth login`",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(
            f'the repository has no revision "{revision}"',
            where=where,
            hint="set `model.revision` to a branch, tag or commit",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return SourceError(
            "the repository does not exist, or is private",
            where=where,
            found=_neighbours(Path(source)),
            hint="correct `model.source`; for a private repository run `hf auth login`",
        )
    if getattr(error, "errno", None) in _DISK_ERRORS:
        return SourceError(
            "what is fetched can't be written",
            where=where,
            found=str(error),
            hint="make room, or set HF_HOME to a folder on another disk; then run the same command again",
        )
    if _is_unreachable(error):
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        near = _neighbours(Path(source))  # `assets/pockt` may have been meant as a folder
        return SourceError(
            "the hub can't be reached",
            where=where,
            found=f"{reason}; {near}" if near else reason,
            hint="check the connection and run the same command again: what was fetched is kept; "
            "or name a folder in `model.source`",
        )
    return SourceError(
        "the hub refused",
        where=where,
        found=str(error).splitlines()[0] if str(error) else type(error).__name__,
    )


def _offline_error(source: str, revision: str) -> SourceError:
    return SourceError(
        f"{source} at revision {revision} isn't on this machine, and HF_HUB_OFFLINE forbids to fetch it",
        where=f"hub repository {source}",
        found=_neighbours(Path(source)),
        hint="unset HF_HUB_OFFLINE, or name a folder in `model.source`",
    )

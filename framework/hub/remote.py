"""Asks the hub, and its cache on this machine. Imports huggingface_hub only when it is called."""

from __future__ import annotations

import errno
import logging
import re
from pathlib import Path
from typing import Any

from framework.errors import SourceError
from framework.hub.local import neighbours
from framework.inventory import (
    StoredTensor,
    check_index,
    choose_index,
    choose_single,
    file_variant,
    list_variants,
    parse_header,
    parse_index,
)

_SMALL_FILES = ("*.json", "*.txt", "*.jinja", "*.model")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS})
_log = logging.getLogger(__name__)


def resolve_commit(source: str, revision: str) -> str:
    """The commit that `revision` stands for now; what the cache knows if the hub can't be reached."""
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    if _is_offline():
        if known := cached_refs(source, revision):
            return known
        raise _offline_error(source, revision)
    try:
        commit = HfApi().model_info(source, revision=revision, timeout=10).sha
    except hub_errors() as error:
        if _is_unreachable(error) and (known := cached_refs(source, revision)):
            _log.warning(
                "the hub can't be reached; %s stands for commit %s, fetched before", revision, known
            )
            return known
        raise translate(error, source, revision) from error
    if not commit:
        raise SourceError(f"the hub names no commit for revision {revision}", where=source)
    return commit


def cached_refs(source: str, revision: str) -> str | None:
    """The commit that the local cache has for a branch or tag."""
    from huggingface_hub import constants

    ref = Path(constants.HF_HUB_CACHE) / f"models--{source.replace('/', '--')}" / "refs" / revision
    return ref.read_text(encoding="utf-8").strip() if ref.is_file() else None


def commit_on_disk(source: str, revision: str) -> str | None:
    """The commit that `revision` stands for as far as the cache knows; a full commit stands for itself."""
    return revision if _COMMIT.fullmatch(revision) else cached_refs(source, revision)


def cached_folder(source: str, subfolder: str, commit: str) -> Path | None:
    """A component's folder in the hub's cache, whole or not; None where there is none."""
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE) / f"models--{source.replace('/', '--')}"
    folder = repository / "snapshots" / commit / subfolder
    return folder if folder.is_dir() else None


def download(
    source: str, subfolder: str, *, commit: str, weights: bool, variant: str | None
) -> Path:
    """Fetch a component's folder into the cache, with its weights or its small files alone."""
    from huggingface_hub import snapshot_download

    if _is_offline():
        cached = cached_folder(source, subfolder, commit)
        if cached is not None and not weights:
            return cached
        raise _offline_error(source, commit)
    # Some families' settings stand in the index of the whole checkpoint.
    patterns = ["model_index.json", *(f"{subfolder}/{pattern}" for pattern in _SMALL_FILES)]
    if weights:
        names = _weight_names(source, subfolder, commit, variant)
        patterns += [f"{subfolder}/{name}" for name in names]
    try:
        root = snapshot_download(source, revision=commit, allow_patterns=patterns)
    except hub_errors() as error:
        raise translate(error, source, commit) from error
    folder = Path(str(root)) / subfolder
    if not folder.is_dir():
        raise SourceError(f'the repository has no folder "{subfolder}"', where=f"{source}@{commit}")
    return folder


def _weight_names(source: str, subfolder: str, commit: str, variant: str | None) -> list[str]:
    """Patterns of the weight files to fetch: all safetensors, or those of one form where there are several."""
    names = _listed(source, subfolder, commit)
    variants = list_variants(names)
    if not variants:
        return ["*.safetensors"]
    chosen = [n for n in names if n.endswith(".safetensors") and file_variant(n) == variant]
    if variant in variants and (index := choose_index(names, variant)) is not None:
        chosen += [index]
    return chosen


def _listed(source: str, subfolder: str, commit: str) -> list[str]:
    """Names of the files in a folder of a repository.   Raises SourceError as the hub answers."""
    from huggingface_hub import HfApi

    try:
        listed = HfApi().list_repo_files(source, revision=commit)
    except hub_errors() as error:
        raise translate(error, source, commit) from error
    inside = [name.rpartition("/")[2] for name in listed if name.rpartition("/")[0] == subfolder]
    if not any(name.endswith(".safetensors") for name in inside):
        raise SourceError(
            f'the repository has no complete safetensors weights in "{subfolder}"',
            where=f"{source}@{commit}/{subfolder}",
            found=", ".join(sorted({n.split("/")[0] for n in listed if "/" in n})[:8]),
        )
    return inside


def remote_inventory(
    source: str, subfolder: str, commit: str, variant: str | None
) -> tuple[dict[str, StoredTensor], str | None]:
    """Read headers by range requests, and the index, which is small. Returns also the variant that was taken."""
    from huggingface_hub import HfApi, hf_hub_download

    if _is_offline():
        raise _offline_error(source, commit)
    api = HfApi()
    where = f"{source}@{commit}/{subfolder}"
    inside = _listed(source, subfolder, commit)
    taken = variant if list_variants(inside) else None
    index = choose_index(inside, taken)
    weight_map: dict[str, str] = {}
    try:
        if index is not None:
            path = hf_hub_download(source, f"{subfolder}/{index}", revision=commit)
            weight_map = parse_index(Path(path).read_text(encoding="utf-8"), where=where)
            names = sorted(set(weight_map.values()))
        else:
            weights = [name for name in inside if name.endswith(".safetensors")]
            names = [choose_single(weights, taken, where)]
        if missing := sorted(set(names) - set(inside)):
            raise SourceError(
                f'the repository has no complete safetensors weights in "{subfolder}"',
                where=where,
                found=f"missing: {', '.join(missing[:5])}",
            )
        headers = {
            name: api.parse_safetensors_file_metadata(
                source, f"{subfolder}/{name}", revision=commit
            )
            for name in names
        }
    except hub_errors() as error:
        raise translate(error, source, commit) from error
    tensors: dict[str, StoredTensor] = {}
    for name, metadata in headers.items():
        found = _as_header(metadata)
        tensors.update(parse_header(found, file=name, data_start=0, where=f"{where}/{name}"))
    check_index(weight_map, tensors, where=where)
    return tensors, taken


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


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub and its HTTP client raise; SourceError is none of these."""
    from huggingface_hub import errors

    http = getattr(errors, "HTTPError", OSError)
    return (OSError, ValueError, http, errors.SafetensorsParsingError, errors.EntryNotFoundError)


def _is_unreachable(error: Exception) -> bool:
    """Whether no answer came at all, as opposed to a refusal or a full disk."""
    if isinstance(error, ValueError) or getattr(error, "errno", None) in _DISK_ERRORS:
        return False
    return getattr(error, "response", None) is None


def translate(error: Exception, source: str, revision: str) -> SourceError:
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
            found=neighbours(Path(source)),
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
        near = neighbours(Path(source))  # `assets/pockt` may have been meant as a folder
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
        found=neighbours(Path(source)),
        hint="unset HF_HUB_OFFLINE, or name a folder in `model.source`",
    )

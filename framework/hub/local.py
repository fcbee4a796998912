"""Finds a model's files on this machine: folders, single files, and repositories in the hub's cache."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

from framework.errors import SourceError
from framework.inventory import file_variant, find_index, list_variants, pickle_error, read_index

REPOSITORY = Path(__file__).resolve().parents[2]
"""Relative sources are looked up here after the working directory: `assets/pocket` works from anywhere."""

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_FILE_SUFFIXES = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def find_folder(source: str) -> Path | None:
    """Return the folder, or the single weight file, that `source` names; None if it is a hub id.

    Raises SourceError for what can only be a path and doesn't exist, and for files that are never read.
    """
    path = Path(source).expanduser()
    for candidate in (path,) if path.is_absolute() else (Path.cwd() / path, REPOSITORY / path):
        if candidate.is_dir():
            return candidate.resolve()
        if candidate.is_file():
            return _readable(candidate)
    is_file = source.endswith(_FILE_SUFFIXES)
    if _HUB_ID.fullmatch(source) and not source.startswith(".") and not is_file:
        return None
    owner, _, rest = source.partition("/")
    name, _, inside = rest.partition("/")
    fetch = f"; a file at the hub is fetched first: `hf download {owner}/{name} {inside}`"
    raise SourceError(
        f'the model {"file" if is_file else "folder"} "{source}" does not exist',
        where=str(path if path.is_absolute() else Path.cwd() / path),
        found=neighbours(path, files=is_file),
        hint="correct `source`: a folder in the published layout, a hub id such as Qwen/Qwen-Image, or a "
        f".safetensors file{fetch if is_file and inside and owner not in ('', '.', '..', '~') else ''}",
    )


def _readable(file: Path) -> Path:
    """A single weight file by its full path, links kept: what they point to in the hub's cache has no suffix."""
    if file.suffix in _PICKLES:
        raise pickle_error(file)
    if file.suffix not in (".safetensors", ".sft"):
        raise SourceError(
            "the model file isn't a safetensors file",
            where=str(file),
            found=f"a {file.suffix or 'nameless'} file",
            hint="give a .safetensors file, a folder in the published layout, or a hub id",
        )
    return file.absolute()


def snapshot_of(folder: Path, revision: str) -> tuple[Path, str | None]:
    """Folder and commit of a revision where `folder` is a repository in the hub's cache; else the folder itself."""
    snapshots = folder / "snapshots"
    if not folder.name.startswith("models--") or not snapshots.is_dir():
        return folder, None
    ref = folder / "refs" / revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    if (snapshots / commit).is_dir():
        return snapshots / commit, commit
    refs = folder / "refs"
    known = [str(path.relative_to(refs)) for path in sorted(refs.rglob("*")) if path.is_file()]
    commits = sorted(path.name for path in snapshots.iterdir())
    owner, _, name = folder.name.removeprefix("models--").partition("--")
    raise SourceError(
        f'the cached repository has no snapshot of revision "{revision}"',
        where=str(folder),
        found=f"revisions: {', '.join(known) or 'none'}; commits: {', '.join(commits) or 'none'}",
        hint=f"set model.revision to one of them, or fetch it: `hf download {owner}/{name} --revision {revision}`",
    )


def has_variants(folder: Path) -> bool:
    """Whether a component was published in variants."""
    return bool(list_variants([path.name for path in folder.iterdir()]))


def subfolder_of(folder: Path, subfolder: str) -> Path:
    """The component's folder inside a model's folder; a folder with a config.json may be the component's itself."""
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


def neighbours(path: Path, *, files: bool = False) -> str:
    """Say which folders, or files, lie where `path` was looked for, nearest names first."""
    for base in (Path.cwd(), REPOSITORY):
        parent = (base / path).parent
        if parent.is_dir():
            names = sorted(
                entry.name
                for entry in parent.iterdir()
                if (entry.suffix in _FILE_SUFFIXES if files else entry.is_dir())
            )
            near = get_close_matches(path.name, names, n=3, cutoff=0.5)
            if near:
                return f"nearest {'files' if files else 'folders'} in {parent}: {', '.join(near)}"
    return ""


def is_complete(folder: Path, variant: str | None = None) -> bool:
    """Whether configuration and every weight file are there; files appear in the cache only when they are whole."""
    if not (folder / "config.json").is_file():
        return False
    # What was published in one form only is taken in that form.
    for wanted in (variant, None) if variant else (None,):
        index = find_index(folder, variant=wanted)
        if index is not None:
            return all((folder / name).is_file() for name in set(read_index(index).values()))
        if any(file_variant(path.name) == wanted for path in folder.glob("*.safetensors")):
            return wanted == variant or not has_variants(folder)
    return False

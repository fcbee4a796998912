"""What an encoder is, for the names of cached entries: its weights' content and how they are stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from framework.atomic import write_text
from framework.data import encoder_identity
from framework.plan.types import ComponentPlan, VramPlan

# Part of every identity: raise it when a change to a family's encode step alters a single number.
ENCODE_VERSION = 1
_BLOCK_BYTES = 1 << 22


def read_encoder_identity(
    plan: VramPlan,
    component: ComponentPlan,
    *,
    stamp_folder: Path,
    tokenizers: Sequence[Path] = (),
) -> str:
    """Describe the encoder so that anything which changes its output changes the description.

    The weights of a hub checkpoint are named by their commit. Local weight files are read once in full;
    their hashes are remembered in `stamp_folder` while path, size and modification time stay the same.
    tokenizers: folders of tokenizers and the like, where captions are encoded; hashed in full (they are small).
    """
    files = {Path(tensor.file) for group in component.groups for tensor in group.tensors}
    files.add(Path(component.folder) / "config.json")
    weights = hashlib.sha256()
    for file in sorted(files):
        if component.commit is not None:
            content = f"{component.source}@{component.commit}"
        else:
            content = _file_hash(file, stamp_folder)
        weights.update(f"{file.name}={content}\n".encode())
    for tokenizer in tokenizers:
        index = tokenizer.parent / "model_index.json"  # which pipeline's prompt template is used
        files_beside = sorted(path for path in tokenizer.iterdir() if path.is_file())
        for file in [*files_beside, *([index] if index.is_file() else [])]:
            weights.update(f"{file.name}={_hash(file)}\n".encode())
    return encoder_identity(
        component.name,
        weights=weights.hexdigest(),
        storage=_storage(component),
        compute_dtype=f"{plan.compute_dtype} on {plan.device.partition(':')[0]}",
        code_version=ENCODE_VERSION,
    )


def _storage(component: ComponentPlan) -> str:
    """Hash of which tensor rests in which format."""
    rows = [
        [group.states.onload.storage_dtype, group.scaling, sorted(t.name for t in group.tensors)]
        for group in component.groups
    ]
    return hashlib.sha256(json.dumps(sorted(rows, key=str)).encode()).hexdigest()


def _file_hash(file: Path, stamp_folder: Path) -> str:
    """Hash of a weight file, from its stamp where the file hasn't changed since."""
    status = file.stat()
    state = [str(file.resolve()), status.st_size, status.st_mtime_ns]
    stamp = stamp_folder / f"{hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]}.json"
    try:
        found = json.loads(stamp.read_text(encoding="utf-8"))
        if found["state"] == state:
            return str(found["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no stamp, or a damaged one: hash the file and write it anew
    digest = _hash(file)
    write_text(stamp, json.dumps({"state": state, "sha256": digest}))
    return digest


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()

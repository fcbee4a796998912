from __future__ import annotations

from pathlib import Path

import pytest
import torch

from framework.atomic import atomic_write, remove_partial_files
from framework.errors import RunError
from framework.training.checkpoint_io import (
    AtomicCheckpointIO,
    checkpoint_name,
    list_checkpoints,
    prune_checkpoints,
    read_checkpoint,
    step_of,
)


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / checkpoint_name(7)
    AtomicCheckpointIO().save_checkpoint({"a": torch.arange(5), "step": 7}, path)
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert loaded["step"] == 7
    assert torch.equal(loaded["a"], torch.arange(5))
    assert [file.name for file in path.parent.iterdir()] == ["step-00000007.ckpt"]


def test_an_exception_during_the_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / checkpoint_name(1)
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def half(checkpoint: object, file: object) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    monkeypatch.undo()
    assert read_checkpoint(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_rename_is_the_last_thing_that_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_partial_files_of_killed_processes_are_cleared(tmp_path: Path) -> None:
    (tmp_path / "step-00000001.ckpt.123.partial").write_bytes(b"cut")
    (tmp_path / "step-00000001.ckpt").write_bytes(b"whole")
    remove_partial_files(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["step-00000001.ckpt"]


def test_partial_files_are_never_taken_for_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "step-00000001.ckpt.123.partial").write_bytes(b"cut")
    (tmp_path / "last.ckpt").write_bytes(b"other")
    assert list_checkpoints(tmp_path) == []
    assert list_checkpoints(tmp_path / "missing") == []


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (8, 10, 100, 9):
        (tmp_path / checkpoint_name(step)).touch()
    prune_checkpoints(tmp_path, keep_last=2)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [10, 100]


def test_a_cut_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / checkpoint_name(1)
    AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(RunError, match=r"step-00000001.ckpt: the checkpoint can't be read"):
        read_checkpoint(path)


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / checkpoint_name(1)
    torch.save({"a": Path("x")}, path)
    with pytest.raises(RunError, match="can't be read"):
        read_checkpoint(path)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="doesn't exist"):
        read_checkpoint(tmp_path / "nothing.ckpt")

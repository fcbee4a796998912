from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from framework.errors import RunError
from framework.schema import RunConfig
from framework.training.checkpoint_io import checkpoint_name
from framework.training.run_folder import (
    RunFolder,
    check_same_sources,
    config_key,
    find_start,
    is_locked,
    read_state,
)


def config(tmp_path: Path, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": {"family": "qwen_image", "source": "x", "dit": {"trainable": "full"}},
        "data": {"path": "pictures"},
        "run": {"name": "test", "output_dir": str(tmp_path)},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values.setdefault(section, {})[name] = value
    return RunConfig.model_validate(values)


def begin(config: RunConfig, *, steps: tuple[int, ...] = (), finished: bool = False) -> Path:
    folder = RunFolder.claim(find_start(config))
    folder.begin(config, config_yaml="a: 1\n", sources={})
    for step in steps:
        path = folder.path / "checkpoints" / checkpoint_name(step)
        path.parent.mkdir(exist_ok=True)
        path.touch()
    if finished:
        folder.write_state(state="finished")
    folder.release()
    return folder.path


def test_folders_are_numbered(tmp_path: Path) -> None:
    run = config(tmp_path)
    assert [begin(run).name for _ in range(3)] == ["001", "002", "003"]
    assert (tmp_path / "test" / "002" / "config.yaml").read_text() == "a: 1\n"
    state = read_state(tmp_path / "test" / "002")
    assert state["state"] == "running"
    assert state["key"] == config_key(run)
    assert {"octavo", "python", "torch", "diffusers"} <= set(state["versions"])


def test_numbers_go_on_after_the_highest(tmp_path: Path) -> None:
    (tmp_path / "test" / "041").mkdir(parents=True)
    (tmp_path / "test" / "notes").mkdir()
    assert begin(config(tmp_path)).name == "042"


def test_an_unfinished_run_is_gone_on_with_from_its_newest_checkpoint(tmp_path: Path) -> None:
    run = config(tmp_path)
    folder = begin(run, steps=(5, 10))
    start = find_start(run)
    assert start.folder == folder
    assert start.checkpoint == folder / "checkpoints" / "step-00000010.ckpt"
    assert start.resume_step == 10
    assert begin(run) == folder


def test_a_finished_run_is_never_written_over(tmp_path: Path) -> None:
    run = config(tmp_path)
    begin(run, steps=(5,))
    begin(run, steps=(10,), finished=True)
    # 001 was gone on with and is finished now.
    assert begin(run).name == "002"


def test_a_run_without_a_checkpoint_is_started_anew(tmp_path: Path) -> None:
    run = config(tmp_path)
    begin(run)
    assert find_start(run).folder is None
    assert begin(run).name == "002"


def test_another_configuration_gets_another_folder(tmp_path: Path) -> None:
    begin(config(tmp_path), steps=(5,))
    assert find_start(config(tmp_path, optim__lr=0.5)).folder is None


@pytest.mark.parametrize("change", [{"trainer__log_every_n_steps": 1}, {"logger__csv": False}])
def test_settings_that_change_no_result_may_differ(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = begin(config(tmp_path), steps=(5,))
    assert find_start(config(tmp_path, **change)).folder == folder


def test_never_starts_anew(tmp_path: Path) -> None:
    begin(config(tmp_path), steps=(5,))
    start = find_start(config(tmp_path, checkpoint__resume="never"))
    assert start.folder is None
    assert start.checkpoint is None


def test_a_path_starts_a_new_folder_from_that_checkpoint(tmp_path: Path) -> None:
    folder = begin(config(tmp_path), steps=(5, 10))
    start = find_start(config(tmp_path, checkpoint__resume=str(folder)))
    assert (start.folder, start.resume_step) == (None, None)
    assert start.checkpoint == folder / "checkpoints" / "step-00000010.ckpt"
    file = folder / "checkpoints" / "step-00000005.ckpt"
    assert find_start(config(tmp_path, checkpoint__resume=str(file))).checkpoint == file


def test_a_path_to_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="names nothing that exists"):
        find_start(config(tmp_path, checkpoint__resume=str(tmp_path / "gone")))
    with pytest.raises(RunError, match="a folder without checkpoints"):
        find_start(config(tmp_path, checkpoint__resume=str(tmp_path)))


def hold(run: RunConfig, held: Any, let_go: Any) -> None:
    folder = RunFolder.claim(find_start(run))
    held.set()
    let_go.wait(30)
    folder.release()


def test_two_processes_never_share_a_folder(tmp_path: Path) -> None:
    run = config(tmp_path)
    folder = begin(run, steps=(5,))
    start = find_start(run)
    context = multiprocessing.get_context("spawn")
    held, let_go = context.Event(), context.Event()
    process = context.Process(target=hold, args=(run, held, let_go))
    process.start()
    assert held.wait(120)
    assert is_locked(folder)
    assert find_start(run).folder is None
    with pytest.raises(RunError, match="another process has just gone on"):
        RunFolder.claim(start)
    process.kill()
    process.join()
    assert not is_locked(folder)
    assert find_start(run).folder == folder


def test_a_checkpoint_that_moved_on_the_hub_is_refused(tmp_path: Path) -> None:
    run = config(tmp_path)
    folder = RunFolder.claim(find_start(run))
    folder.begin(run, config_yaml="", sources={"dit": {"source": "x", "commit": "abc"}})
    folder.release()
    (folder.path / "checkpoints").mkdir()
    (folder.path / "checkpoints" / checkpoint_name(1)).touch()
    start = find_start(run)
    check_same_sources(start, {"dit": "abc"})
    with pytest.raises(RunError, match=r"dit on the hub have changed(.|\n)*model.revision=abc"):
        check_same_sources(start, {"dit": "def"})


def test_a_run_keeps_its_id_and_shares_it_with_no_other(tmp_path: Path) -> None:
    folder = begin(config(tmp_path), steps=(1,))
    first = read_state(folder)["id"]
    assert begin(config(tmp_path)) == folder
    assert read_state(folder)["id"] == first
    other = begin(config(tmp_path / "elsewhere"))
    assert other.name == folder.name
    assert read_state(other)["id"] != first

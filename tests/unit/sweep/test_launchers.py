from __future__ import annotations

import importlib.util
import os
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from framework.compose import compose_run, conf_dir
from framework.schema.sweep import (
    LAUNCHERS,
    SWEEPERS,
    BasicLauncher,
    JoblibLauncher,
    LauncherSettings,
    RayLauncher,
    SubmititLocalLauncher,
    SubmititSlurmLauncher,
)
from framework.sweep import launchers
from framework.sweep.launchers import PointNeeds, launch, missing_package, plugin_settings
from framework.sweep.machines import ray_gpus, visible_gpus

FILES = sorted(conf_dir().glob("hydra/*/*.yaml"))


@dataclass(frozen=True)
class NotePoint:
    """A task that every kind of worker can load."""

    folder: str

    def __call__(self, config: Any) -> None:
        names = ("SLURM_PROCID", "PYTHONSAFEPATH")
        found = {name: os.environ.get(name) for name in names}
        (Path(self.folder) / str(config.point)).write_text(f"{os.getpid()} {Path.cwd()} {found}")


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_shipped_setting_is_one_of_the_section_and_none_is_missing(file: Path) -> None:
    values = yaml.safe_load(file.read_text())
    section = {"launcher": LAUNCHERS, "sweeper": SWEEPERS}[file.parent.name][file.stem]
    assert section.model_validate(values) == section()
    assert list(values) == list(section.model_fields)


def test_every_section_has_a_file() -> None:
    names = {f"{file.parent.name}/{file.stem}" for file in FILES}
    assert names == {f"launcher/{name}" for name in LAUNCHERS} | {f"sweeper/{n}" for n in SWEEPERS}


@pytest.mark.parametrize("settings", [BasicLauncher(), JoblibLauncher(n_jobs=1)], ids=["b", "j"])
def test_a_launcher_calls_each_point_and_leaves_hydra_as_it_was(
    tmp_path: Path, settings: LauncherSettings
) -> None:
    folder = tmp_path / "it's ${here}, a=b" / "001"
    before = (GlobalHydra.instance().hydra, HydraConfig.instance().cfg)
    launch(settings, NotePoint(str(tmp_path)), 3, folder=folder, needs=PointNeeds())
    noted = [(tmp_path / str(index)).read_text() for index in range(3)]
    assert all(text.split()[1] == str(Path.cwd()) for text in noted)
    assert list(folder.iterdir()) == []
    assert (GlobalHydra.instance().hydra, HydraConfig.instance().cfg) == before
    assert "octavo_sweep.yaml" not in ConfigStore.instance().repo
    assert "PYTHONSAFEPATH" not in os.environ
    assert compose_run(["recipe=pocket_lora"]).faults == ()


@pytest.mark.parametrize(
    ("launcher", "package", "extra"),
    [
        ("joblib", "hydra-joblib-launcher", "joblib"),
        ("submitit_local", "hydra-submitit-launcher", "slurm"),
        ("submitit_slurm", "hydra-submitit-launcher", "slurm"),
        ("ray", "hydra-ray-launcher", "ray"),
    ],
)
def test_a_missing_plugin_is_named_with_its_extra(
    launcher: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert missing_package(launcher, where="x") is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fault = missing_package(launcher, where="x")
    assert fault is not None
    assert f"needs the package {package}, which isn't installed" in fault.message
    assert fault.hint == f"Run `pip install octavo[{extra}]`."
    assert missing_package("basic", where="x") is None


def test_a_missing_namespace_is_a_missing_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> None:
        raise ModuleNotFoundError("hydra_plugins")

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    assert missing_package("ray", where="x") is not None


def test_slurm_is_asked_for_what_the_points_need() -> None:
    settings = SubmititSlurmLauncher(partition="gpu", setup=("module load cuda",), max_requeues=1)
    asked = plugin_settings(settings, name="pocket", needs=PointNeeds(2, 8, uses_gpus=True))
    assert (asked["nodes"], asked["tasks_per_node"], asked["gpus_per_node"]) == (2, 8, 8)
    assert (asked["name"], asked["partition"], asked["max_num_timeout"]) == ("pocket", "gpu", 1)
    assert asked["setup"] == ["module load cuda"]
    assert "account" not in asked
    without = SubmititSlurmLauncher(gpus_per_node=0)
    assert plugin_settings(without, name="x", needs=PointNeeds(1, 2, True))["gpus_per_node"] is None


def test_gpus_of_ray_follow_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = PointNeeds(processes=2, uses_gpus=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert ray_gpus(RayLauncher(), needs) == 0
    assert ray_gpus(RayLauncher(address="auto"), needs) == 2
    assert ray_gpus(RayLauncher(num_gpus=0.5), needs) == 0.5
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 5")
    assert visible_gpus() == ["4", "5"]
    assert ray_gpus(RayLauncher(), needs) == 2
    assert ray_gpus(RayLauncher(), PointNeeds()) == 0


def test_ray_makes_a_token_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def init(address: str, **settings: Any) -> None:
        seen.update(address=address, environment=dict(os.environ), **settings)

    fake: Any = type("ray", (), {"init": staticmethod(init), "shutdown": lambda: None})
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with launchers._ray(RayLauncher()):
        assert len(seen["environment"]["RAY_AUTH_TOKEN"]) == 64
        assert seen["address"] == "local"
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with launchers._ray(RayLauncher(address="auto")):
        assert "RAY_AUTH_TOKEN" not in seen["environment"]
        assert seen["address"] == "auto"


# ---- a stand-in for Slurm's commands: what submitit asks of them, on this machine ------------------

SBATCH = """
import os, re, subprocess, sys
from pathlib import Path
script = Path(sys.argv[1])
text = script.read_text()
Path(os.environ["FAKE_SLURM"], "script").write_text(text)
array = re.search(r"--array=0-(\\d+)", text)
for task in range(int(array[1]) + 1 if array else 1):
    extra = {"SLURM_JOB_ID": str(77 + task), "SLURM_JOB_NUM_NODES": "1"}
    if array:
        extra |= {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": str(task)}
    subprocess.Popen(
        ["bash", str(script)],
        env={**os.environ, **extra},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
print("Submitted batch job 77")
"""
SRUN = """
import os, subprocess, sys
arguments = sys.argv[1:]
while arguments[0].startswith("--"):
    flag = arguments.pop(0)
    if flag in ("--output", "--error"):
        arguments.pop(0)
tasks = int(os.environ["FAKE_TASKS"])
processes = [
    subprocess.Popen(
        arguments,
        env={**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_NTASKS": str(tasks)},
    )
    for i in range(tasks)
]
sys.exit(max(process.wait() for process in processes))
"""
SACCT = "print('JobID|State|NodeList')"


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, code in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
        file = folder / name
        file.write_text(f"#!{sys.executable}\n{code}")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(folder))
    monkeypatch.setenv("FAKE_TASKS", "2")
    return folder


def sbatch_options(folder: Path) -> Mapping[str, str]:
    lines = (folder / "script").read_text().splitlines()
    options = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH --")]
    return dict(option.partition("=")[::2] for option in options)


def test_slurm_gets_one_job_per_point_with_a_process_per_device(
    tmp_path: Path, fake_slurm: Path
) -> None:
    settings = SubmititSlurmLauncher(
        timeout_min=30,
        partition="gpu",
        mem_gb=8,
        array_parallelism=2,
        additional_parameters={"reservation": "demo"},
    )
    out = tmp_path / "out"
    out.mkdir()
    folder = tmp_path / "sweeps" / "pocket" / "001"
    needs = PointNeeds(1, 2, uses_gpus=True)
    launch(settings, NotePoint(str(out)), 2, folder=folder, needs=needs)
    assert sorted(path.name for path in out.iterdir()) == ["0", "1"]
    options = sbatch_options(fake_slurm)
    wanted = {
        "array": "0-1%2",
        "job-name": "pocket",
        "time": "30",
        "partition": "gpu",
        "mem": "8GB",
        "nodes": "1",
        "ntasks-per-node": "2",
        "gpus-per-node": "2",
        "reservation": "demo",
    }
    assert {key: options.get(key) for key in wanted} == wanted
    assert any((folder / "submitit").iterdir())


def test_submitit_local_starts_no_more_than_asked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[list[str]]] = []

    class Plugin:
        def launch(self, job_overrides: list[list[str]], initial_job_idx: int) -> None:
            batches.append(job_overrides)

    from contextlib import nullcontext

    monkeypatch.setattr(launchers, "_launcher", lambda *a, **k: nullcontext(Plugin()))
    settings = SubmititLocalLauncher(n_jobs=2)
    launch(settings, NotePoint(""), 3, folder=tmp_path, needs=PointNeeds())
    assert batches == [[["+point=0"], ["+point=1"]], [["+point=2"]]]

"""Starts the points of a sweep with Hydra's launcher plugins.

The only place outside compose/ that knows Hydra. A launcher is given a configuration of its own, not the run's: which
plugin, with which settings, and for each job nothing but the number of its point.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import initialize
from hydra._internal.callbacks import Callbacks
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode

from framework.errors import Fault
from framework.schema.sweep import (
    LauncherSettings,
    RayLauncher,
    SubmititLocalLauncher,
    SubmititSlurmLauncher,
)
from framework.sweep.process import code_environment

SUBMITIT_FOLDER = "submitit"
_CONFIG_NAME = "octavo_sweep"
# Launcher: the packages that it needs, and the extra of ours that brings them.
_NEEDS: Mapping[str, tuple[tuple[str, str], str]] = {
    "joblib": (("hydra_plugins.hydra_joblib_launcher", "joblib"), "joblib"),
    "submitit_local": (("hydra_plugins.hydra_submitit_launcher", "submitit"), "slurm"),
    "submitit_slurm": (("hydra_plugins.hydra_submitit_launcher", "submitit"), "slurm"),
    "ray": (("hydra_plugins.hydra_ray_launcher", "ray"), "ray"),
}


@dataclass(frozen=True)
class PointNeeds:
    """What one point needs of a machine: nodes, processes on each of them, and whether these use GPUs."""

    nodes: int = 1
    processes: int = 1
    uses_gpus: bool = False

    @property
    def gpus(self) -> int:
        """GPUs on each node."""
        return self.processes if self.uses_gpus else 0


def missing_package(launcher: str, *, where: str) -> Fault | None:
    """Say which package a launcher lacks here and how to get it; None where nothing is missing."""
    modules, extra = _NEEDS.get(launcher, ((), ""))
    for module in modules:
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            package = module.removeprefix("hydra_plugins.").replace("_", "-")
            message = (
                f"the launcher {launcher!r} needs the package {package}, which isn't installed"
            )
            hint = f"Run `pip install octavo[{extra}]`."
            return Fault("hydra.launcher", message, where, hint=hint, value=launcher)
    return None


def launch(
    settings: LauncherSettings,
    task: Callable[[Any], Any],
    count: int,
    *,
    folder: Path,
    needs: PointNeeds,
) -> None:
    """Call `task(config)` for config.point = 0 .. count - 1 as the launcher does it; returns when all have ended.

    folder: the sweep's.   Raises whatever the launcher raises when it loses a job.
    """
    if isinstance(settings, SubmititLocalLauncher):
        batches = [
            range(i, min(i + settings.n_jobs, count)) for i in range(0, count, settings.n_jobs)
        ]
    else:
        batches = [range(count)]
    with ExitStack() as stack:
        stack.enter_context(_found_by_workers())
        if isinstance(settings, RayLauncher):
            stack.enter_context(_ray(settings))
        launcher = stack.enter_context(_launcher(settings, task, folder=folder, needs=needs))
        for batch in batches:
            launcher.launch([[f"+point={index}"] for index in batch], initial_job_idx=batch.start)


@contextmanager
def _launcher(
    settings: LauncherSettings, task: Callable[[Any], Any], *, folder: Path, needs: PointNeeds
) -> Iterator[Any]:
    """Hydra's launcher on a configuration of its own; Hydra's global state is as before afterwards."""
    outer_config = HydraConfig.instance().cfg
    node = launcher_config(settings, folder=folder, needs=needs)
    ConfigStore.instance().store(name=_CONFIG_NAME, node=node)
    try:
        with initialize(config_path=None, job_name="octavo", version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            config = hydra.compose_config(
                _CONFIG_NAME, [], run_mode=RunMode.MULTIRUN, from_shell=False
            )
            HydraConfig.instance().set_config(config)
            yield Plugins.instance().instantiate_launcher(
                hydra_context=HydraContext(hydra.config_loader, Callbacks()),
                task_function=task,
                config=config,
            )
    finally:
        HydraConfig.instance().cfg = outer_config
        # Asked for again: a launcher that runs jobs in this process may have put another store there.
        ConfigStore.instance().repo.pop(f"{_CONFIG_NAME}.yaml", None)


def launcher_config(
    settings: LauncherSettings, *, folder: Path, needs: PointNeeds
) -> dict[str, Any]:
    """The whole configuration that Hydra's launcher is given; it writes nothing but what the plugin must."""
    path = str(folder.absolute()).replace("${", "\\${")
    return {
        "defaults": [
            "_self_",
            {"override hydra/launcher": settings.name},
            {"override hydra/job_logging": "none"},
            {"override hydra/hydra_logging": "none"},
        ],
        "hydra": {
            "output_subdir": None,
            "job": {"chdir": False},
            "sweep": {"dir": path, "subdir": "."},
            "launcher": plugin_settings(settings, name=folder.parent.name, needs=needs),
        },
    }


def plugin_settings(settings: LauncherSettings, *, name: str, needs: PointNeeds) -> dict[str, Any]:
    """Our settings in the plugin's words.   name: of the sweep, which Slurm shows."""
    ours = settings.model_dump(exclude={"name", "gpus_per_point"})
    if isinstance(settings, SubmititSlurmLauncher):
        gpus = needs.gpus if settings.gpus_per_node is None else settings.gpus_per_node
        ours["max_num_timeout"] = ours.pop("max_requeues")
        return {
            **{key: value for key, value in ours.items() if value is not None},
            "nodes": needs.nodes,
            "tasks_per_node": needs.processes,
            "gpus_per_node": gpus or None,
            "setup": list(settings.setup) or None,
            "name": name,
            "submitit_folder": f"${{hydra.sweep.dir}}/{SUBMITIT_FOLDER}/%j",
        }
    if isinstance(settings, SubmititLocalLauncher):
        return {
            "timeout_min": settings.timeout_min,
            "gpus_per_node": 0,
            "name": name,
            "submitit_folder": f"${{hydra.sweep.dir}}/{SUBMITIT_FOLDER}/%j",
        }
    if isinstance(settings, RayLauncher):
        remote = {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus, "max_retries": 0}
        return {"ray": {"init": {}, "remote": remote}}
    if settings.name == "joblib":
        return {"n_jobs": settings.n_jobs, "batch_size": 1, "pre_dispatch": "n_jobs"}
    return {}


@contextmanager
def _found_by_workers() -> Iterator[None]:
    """Let processes that the launchers start find this code."""
    with _variables(code_environment()):
        yield


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _ray(settings: RayLauncher) -> Iterator[None]:
    """Start or join Ray, silently, and leave nothing of it behind.

    A Ray of our own gets a token of its own; without one it writes a token into the user's home folder. Ray sets signal
    handlers of its own, so that ours are put back.
    """
    variables = {"RAY_USAGE_STATS_ENABLED": "0"}
    if settings.address is None and "RAY_AUTH_MODE" not in os.environ:
        variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with _variables(variables):
        import ray

        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if settings.address is None:
            quiet |= {"include_dashboard": False, "object_store_memory": 80 * 2**20}
        ray.init(address=settings.address or "local", **quiet)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        try:
            yield
        finally:
            ray.shutdown()


def cancel_queued(folder: Path) -> None:
    """Take a stopped sweep's jobs out of Slurm's queue; those that run end by themselves."""
    ids = {path.name.partition("_")[0] for path in (folder / SUBMITIT_FOLDER).glob("*")}
    known = sorted(number for number in ids if number.isdecimal())
    if known:
        subprocess.run(["scancel", "--state=PENDING", *known], check=False, timeout=60)

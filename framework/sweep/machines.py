"""What a sweep's points need of a machine, and whether the launcher can give it to them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from framework.errors import Fault
from framework.judge import Verdict
from framework.schema.run import RunConfig
from framework.schema.sweep import (
    JoblibLauncher,
    RayLauncher,
    SubmititLocalLauncher,
    SubmititSlurmLauncher,
    SweepSettings,
)
from framework.sweep.launchers import PointNeeds, missing_package

if TYPE_CHECKING:
    from framework.compose import SweepRequest


def machine_faults(
    settings: SweepSettings, verdicts: Sequence[Verdict], request: SweepRequest
) -> list[Fault]:
    """What keeps this launcher from running these points here.   verdicts: of the points without faults."""
    launcher = settings.launcher
    where = f"command line: hydra/launcher={launcher.name}"
    configs = [verdict.valid_config() for verdict in verdicts]
    key = "trainer.num_nodes"
    missing = missing_package(launcher.name, where=where)
    faults = [missing] if missing is not None else []
    if isinstance(launcher, SubmititSlurmLauncher):
        if missing is None and (shutil.which("sbatch") is None or shutil.which("srun") is None):
            message = "'submitit_slurm' needs Slurm's commands sbatch and srun, which aren't here"
            hint = "Start the sweep on a machine of the cluster, or use hydra/launcher=joblib."
            faults.append(Fault("hydra.launcher", message, where, hint=hint, code="rule"))
        if len({needs_of(config) for config in configs}) > 1:
            message = (
                "the points need different nodes, processes or GPUs; one Slurm request serves all"
            )
            hint = "Sweep trainer.num_nodes, trainer.devices and model.device one by one."
            faults.append(Fault("hydra.launcher", message, where, hint=hint, code="rule"))
    elif any(config.trainer.num_nodes > 1 for config in configs):
        message = f"several machines per point can't be started by the launcher {launcher.name!r}"
        hint = "Set hydra/launcher=submitit_slurm, or trainer.num_nodes=1."
        several = (v for v in verdicts if v.valid_config().trainer.num_nodes > 1)
        faults.append(Fault(key, message, next(several).where(key), hint=hint, code="rule"))
    faults += _gpu_faults(settings, configs, request)
    return faults


def _gpu_faults(
    settings: SweepSettings, configs: Sequence[RunConfig], request: SweepRequest
) -> list[Fault]:
    launcher = settings.launcher
    if not isinstance(launcher, JoblibLauncher | SubmititLocalLauncher):
        return []
    gpus, each = _gpus_for(configs), _gpus_each(launcher, configs)
    wanted = min(launcher.n_jobs, max(1, len(configs))) * each
    if not gpus or not each or wanted <= len(gpus):
        return []
    message = (
        f"{launcher.n_jobs} points at once with {each} GPU{'s' if each > 1 else ''} each need "
        f"{wanted}; this machine shows {len(gpus)}"
    )
    hint = (
        f"Set hydra.launcher.n_jobs={max(1, len(gpus) // each)}, or hydra.launcher.gpus_per_point=0 "
        "to let points share GPUs."
    )
    key = "hydra.launcher.n_jobs"
    return [Fault(key, message, request.where(key), hint=hint, code="rule")]


def needs_of(config: RunConfig) -> PointNeeds:
    """What a point asks of a cluster; a device that isn't named counts as a GPU."""
    trainer = config.trainer
    return PointNeeds(trainer.num_nodes, trainer.devices, config.model.device != "cpu")


def deal_gpus(settings: SweepSettings, configs: Sequence[RunConfig]) -> tuple[tuple[str, ...], str]:
    """Groups of GPUs for points that run at once, and the GPUs that all see where none are dealt."""
    launcher, gpus = settings.launcher, _gpus_for(configs)
    if not gpus or not isinstance(launcher, JoblibLauncher | SubmititLocalLauncher):
        return (), ""
    each = _gpus_each(launcher, configs)
    if not each:
        return (), ",".join(gpus)
    groups = [gpus[i : i + each] for i in range(0, len(gpus) - each + 1, each)]
    return tuple(",".join(group) for group in groups[: launcher.n_jobs]), ""


def _gpus_each(
    launcher: JoblibLauncher | SubmititLocalLauncher, configs: Sequence[RunConfig]
) -> int:
    if launcher.gpus_per_point == 0:
        return 0
    return max(launcher.gpus_per_point, *(config.trainer.devices for config in configs), 1)


def _gpus_for(configs: Sequence[RunConfig]) -> list[str]:
    """GPUs to deal out: none where no point uses one, or where a point names its own ("cuda:1")."""
    devices = {config.model.device for config in configs}
    if devices <= {"cpu", "mps"} or any(":" in device for device in devices):
        return []
    return visible_gpus()


def visible_gpus() -> list[str]:
    """NVIDIA GPUs that a process started here sees, as CUDA_VISIBLE_DEVICES names them; torch isn't asked."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [
            name for name in (part.strip() for part in told.split(",")) if name and name != "-1"
        ]
    folder = Path("/proc/driver/nvidia/gpus")
    return [str(index) for index, _ in enumerate(folder.iterdir())] if folder.is_dir() else []


def ray_gpus(launcher: RayLauncher, needs: PointNeeds) -> float:
    """GPUs that Ray sets aside for a point."""
    if launcher.num_gpus is not None:
        return launcher.num_gpus
    return needs.gpus if launcher.address is not None or visible_gpus() else 0

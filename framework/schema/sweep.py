"""The settings of a sweep: where its points run (`hydra.launcher`) and how they are chosen (`hydra.sweeper`).

Octavo's own keys, the same on the command line and in conf/hydra/; `framework/sweep/launchers.py` says them to Hydra's plugins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from framework.schema.base import Section, unit

_GPUS_PER_POINT = Field(
    1,
    ge=0,
    description="GPUs that each point sees, so that points at once don't share one; 0 lets every point see all. "
    "Read only where this machine has GPUs, and not below a point's trainer.devices.",
    json_schema_extra=unit("GPUs", examples=[1, 2]),
)
_POINTS_AT_ONCE = Field(
    2,
    ge=1,
    description="Points that run at the same time on this machine.",
    json_schema_extra=unit("points", examples=[2, 8]),
)


class BasicLauncher(Section):
    """One point after the other, on this terminal."""

    name: Literal["basic"] = Field("basic", description="The launcher.")


class JoblibLauncher(Section):
    """Several points at once on this machine; needs the extra `joblib`."""

    name: Literal["joblib"] = Field("joblib", description="The launcher.")
    n_jobs: int = _POINTS_AT_ONCE
    gpus_per_point: int = _GPUS_PER_POINT


class SubmititLocalLauncher(Section):
    """As `submitit_slurm`, but with processes of this machine, to try a sweep before it is queued; extra `slurm`."""

    name: Literal["submitit_local"] = Field("submitit_local", description="The launcher.")
    n_jobs: int = Field(
        2,
        ge=1,
        description="Points that are started together; the next ones start when all of these have ended.",
        json_schema_extra=unit("points", examples=[2, 8]),
    )
    gpus_per_point: int = _GPUS_PER_POINT
    timeout_min: int = Field(
        10080,
        ge=1,
        description="A point that runs longer is stopped; the same command goes on with it.",
        json_schema_extra=unit("minutes", examples=[60, 10080]),
    )


class SubmititSlurmLauncher(Section):
    """One Slurm job per point, as a job array; extra `slurm`, and a folder that all machines share.

    Nodes and tasks are asked for as the points need them: trainer.num_nodes, and trainer.devices tasks on each.
    """

    name: Literal["submitit_slurm"] = Field("submitit_slurm", description="The launcher.")
    timeout_min: int = Field(
        1440,
        ge=1,
        description="Time limit of a job (sbatch --time).",
        json_schema_extra=unit("minutes", examples=[240, 1440]),
    )
    max_requeues: int = Field(
        3,
        ge=0,
        description="How often a point whose time is up is queued again; it goes on from its last checkpoint.",
        json_schema_extra=unit("times", examples=[0, 3]),
    )
    array_parallelism: int = Field(
        16,
        ge=1,
        description="Jobs of the sweep that run at the same time.",
        json_schema_extra=unit("jobs", examples=[4, 16]),
    )
    partition: str | None = Field(
        None,
        description="Partition (sbatch --partition); unset means the cluster's default.",
        examples=["gpu"],
    )
    account: str | None = Field(
        None, description="Account that is charged (sbatch --account).", examples=["vision"]
    )
    qos: str | None = Field(
        None, description="Quality of service (sbatch --qos).", examples=["normal"]
    )
    constraint: str | None = Field(
        None, description="Features that a node must have (sbatch --constraint).", examples=["a100"]
    )
    gpus_per_node: int | None = Field(
        None,
        ge=0,
        description="GPUs per node (sbatch --gpus-per-node); unset means trainer.devices, and 0 with model.device=cpu.",
        json_schema_extra=unit("GPUs", examples=[1, 8]),
    )
    cpus_per_task: int | None = Field(
        None,
        ge=1,
        description="Processor cores per process (sbatch --cpus-per-task).",
        json_schema_extra=unit("cores", examples=[8]),
    )
    mem_gb: int | None = Field(
        None,
        ge=1,
        description="Memory per node (sbatch --mem).",
        json_schema_extra=unit("GB", examples=[64]),
    )
    setup: tuple[str, ...] = Field(
        (),
        description="Shell lines that run in the job before the point starts.",
        examples=[["module load cuda"]],
    )
    additional_parameters: dict[str, str | int | bool] = Field(
        default_factory=dict,
        description="Other options of sbatch by their long names, without dashes.",
        examples=[{"reservation": "demo", "exclusive": True}],
    )


class RayLauncher(Section):
    """Points as Ray tasks, on this machine or on a running Ray cluster; needs the extra `ray`."""

    name: Literal["ray"] = Field("ray", description="The launcher.")
    address: str | None = Field(
        None,
        min_length=1,
        description="Head of a running Ray cluster whose machines share the folders; unset starts Ray on this machine.",
        examples=["auto", "10.0.0.1:6379"],
    )
    num_cpus: float = Field(
        1.0,
        gt=0,
        description="Processor cores that Ray sets aside for a point; decides how many run at once.",
        json_schema_extra=unit("cores", examples=[1.0, 8.0]),
    )
    num_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs that Ray sets aside for a point; unset means trainer.devices, and 0 with model.device=cpu or "
        "where this machine has none and no `address` is given.",
        json_schema_extra=unit("GPUs", examples=[1.0, 0.5]),
    )


class BasicSweeper(Section):
    """Every combination of the values given."""

    name: Literal["basic"] = Field("basic", description="How points are chosen.")


class OptunaSweeper(Section):
    """Optuna looks for the point with the lowest validation loss; needs the extra `optuna`."""

    name: Literal["optuna"] = Field("optuna", description="How points are chosen.")
    n_trials: int = Field(
        20,
        ge=1,
        description="Points that are tried in all.",
        json_schema_extra=unit("points", examples=[20, 100]),
    )
    n_jobs: int = Field(
        1,
        ge=1,
        description="Points that are chosen and started together; more than one needs a launcher that runs them at once.",
        json_schema_extra=unit("points", examples=[1, 4]),
    )
    sampler: Literal["tpe", "random"] = Field(
        "tpe",
        description="`tpe` learns from earlier points (Bergstra et al. 2011), `random` doesn't.",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="Seed of the sampler.",
        examples=[0],
    )
    pruner: Literal["none", "median", "asha"] = Field(
        "median",
        description="Stops points early: `median` below the median of earlier points at the same step, `asha` keeps the "
        "best share of each rung (Li et al. 2018, arXiv:1810.05934), `none` lets all run to their end.",
    )
    startup_trials: int = Field(
        5,
        ge=0,
        description="Points that run to their end before any is stopped; read only with `pruner: median`.",
        json_schema_extra=unit("points", examples=[5]),
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        description="No point is stopped before this optimizer step; with `pruner: asha` the first rung.",
        json_schema_extra=unit("optimizer steps", examples=[200]),
    )
    reduction_factor: int = Field(
        3,
        ge=2,
        description="One in so many points goes on from each rung to the next; read only with `pruner: asha`.",
        json_schema_extra=unit("points", examples=[3, 4]),
    )


LauncherSettings = Annotated[
    BasicLauncher | JoblibLauncher | SubmititLocalLauncher | SubmititSlurmLauncher | RayLauncher,
    Field(discriminator="name"),
]
SweeperSettings = Annotated[BasicSweeper | OptunaSweeper, Field(discriminator="name")]
LAUNCHERS: Mapping[str, type[Section]] = {
    "basic": BasicLauncher,
    "joblib": JoblibLauncher,
    "submitit_local": SubmititLocalLauncher,
    "submitit_slurm": SubmititSlurmLauncher,
    "ray": RayLauncher,
}
SWEEPERS: Mapping[str, type[Section]] = {"basic": BasicSweeper, "optuna": OptunaSweeper}


class SweepSettings(Section):
    """What `hydra/launcher=`, `hydra/sweeper=` and their keys set for `octavo train -m`."""

    launcher: LauncherSettings = Field(
        default_factory=BasicLauncher, description="Where and how the points run."
    )
    sweeper: SweeperSettings = Field(
        default_factory=BasicSweeper, description="How the points are chosen."
    )

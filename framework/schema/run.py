"""The sections of a run beside `model`, and `RunConfig`, the only form in which settings travel."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from framework.schema.base import Section, unit
from framework.schema.data_config import DataConfig as DataConfig
from framework.schema.export import ExportConfig
from framework.schema.model import ModelConfig

OptimizerName = Literal[
    "adamw", "adam", "nadam", "radam", "adafactor", "sgd", "rmsprop", "adagrad",
    "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "prodigy",
]  # fmt: skip
Sigma = Annotated[float, Field(gt=0, le=1)]


class ObjectiveConfig(Section):
    """What the denoiser learns.

    Flow matching (Lipman et al. 2022, arXiv:2210.02747): x_sigma = (1 - sigma) x0 + sigma noise, target noise - x0. DDPM
    (Ho et al. 2020, arXiv:2006.11239): a noise schedule of 1000 steps, target noise or v. Direct distillation: the whole
    sampling in few steps, target the picture that a teacher made of the same noise.
    """

    name: Literal["flow_matching", "ddpm", "direct_distill"] = Field(
        "flow_matching",
        description="The training objective; must be the one that the family was trained with, or direct_distill in place of flow_matching.",
    )
    sigma_min: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Lowest noise level that is trained, after any shift; with ddpm the lowest step / 1000.",
        json_schema_extra=unit("noise level, 0 clean to 1 noise", examples=[0.0, 0.4]),
    )
    sigma_max: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Highest noise level that is trained, after any shift; with ddpm the highest step / 1000.",
        json_schema_extra=unit("noise level, 0 clean to 1 noise", examples=[1.0, 0.9]),
    )
    guidance: float = Field(
        1.0,
        gt=0,
        description="Guidance scale that models distilled with guidance (FLUX.1 dev) are given while they train; others don't read it.",
        json_schema_extra=unit("factor", examples=[1.0, 3.5]),
    )
    min_snr_gamma: float | None = Field(
        None,
        gt=0,
        description="Weight steps by min(SNR, gamma) (Hang et al. 2023, arXiv:2303.09556); read only with `name: ddpm`; unset weighs all alike.",
        examples=[5.0],
    )
    noise_offset: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Standard deviation of a constant added to each channel's noise, for darker and brighter pictures; read only with `name: ddpm`.",
        json_schema_extra=unit("standard deviations", examples=[0.05]),
    )
    distill_steps: int = Field(
        4,
        ge=1,
        description="Denoising steps of the student; read only with `name: direct_distill`.",
        json_schema_extra=unit("denoising steps", examples=[4, 8]),
    )
    timestep_sampling: Literal["uniform", "logit_normal"] = Field(
        "logit_normal",
        description="How noise levels are drawn (Esser et al. 2024, arXiv:2403.03206, section 3.1).",
    )
    logit_mean: float = Field(
        0.0,
        description="Mean of the logit-normal distribution; higher means noisier.",
        json_schema_extra=unit("log-odds of the noise level", examples=[0.0, 0.5]),
    )
    logit_std: float = Field(
        1.0,
        gt=0,
        description="Standard deviation of the logit-normal distribution.",
        json_schema_extra=unit("log-odds of the noise level", examples=[1.0]),
    )
    shift: Literal["scheduler"] | Annotated[float, Field(gt=0)] = Field(
        "scheduler",
        description="Moves noise levels towards 1: a factor (1 = none), or as the checkpoint's scheduler config says for the picture's size.",
        json_schema_extra=unit("factor", examples=["scheduler", 1.0, 3.0]),
    )
    loss: Literal["mse", "huber"] = Field(
        "mse", description="Distance between prediction and target."
    )
    huber_delta: float = Field(
        0.1,
        gt=0,
        description="Where the Huber loss turns from square to linear; read only with `loss: huber`.",
        json_schema_extra=unit("difference of prediction and target", examples=[0.1]),
    )
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = Field(
        "none",
        description="Weight of each noise level in the loss (arXiv:2403.03206, section 3.1).",
    )
    vae_kl_weight: float = Field(
        1e-6,
        ge=0,
        description="Weight of the KL term where the VAE trains (on reconstruction; Kingma & Welling 2013, arXiv:1312.6114).",
        json_schema_extra=unit("factor", examples=[1e-6]),
    )


class EmaConfig(Section):
    """An exponential moving average of the weights that train; samples, validation and the saved result use it."""

    decay: float = Field(
        0.999,
        gt=0,
        lt=1,
        description="Share of the average that each step keeps.",
        json_schema_extra=unit("share", examples=[0.999, 0.9999]),
    )


class OptimConfig(Section):
    """The optimizer and its learning-rate schedule."""

    name: OptimizerName = Field(
        "adamw",
        description="torch's optimizers; *_8bit need bitsandbytes, prodigy needs prodigyopt.",
    )
    lr: float = Field(
        1e-4,
        gt=0,
        lt=10,
        description="Peak learning rate.",
        examples=[1e-4, 5e-5],
    )
    betas: (
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] | None
    ) = Field(
        None,
        description="Decay of the moment estimates, for optimizers of the Adam kind; unset means the optimizer's own.",
        json_schema_extra=unit("share", examples=[[0.9, 0.999]]),
    )
    weight_decay: float = Field(
        0.01,
        ge=0,
        description="Decoupled weight decay where the optimizer has it.",
        examples=[0.0, 0.01],
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        description="Steps over which the rate rises linearly from 0.",
        json_schema_extra=unit("optimizer steps", examples=[100]),
    )
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant",
        description="What the rate does after warm-up: stay, or fall to 0 at `trainer.max_steps`.",
    )
    ema: EmaConfig | None = Field(
        None, description="Keep a moving average of the trained weights; unset means none."
    )


class TrainerConfig(Section):
    """How long and on what the run trains."""

    max_steps: int = Field(
        1000,
        ge=1,
        description="Optimizer steps.",
        json_schema_extra=unit("optimizer steps", examples=[2000]),
    )
    accumulate_grad_batches: int = Field(
        1,
        ge=1,
        description="Micro-steps whose gradients are averaged into one optimizer step.",
        json_schema_extra=unit("micro-steps", examples=[4]),
    )
    global_batch_size: int | None = Field(
        None,
        ge=1,
        description="Pictures per optimizer step over all processes. It sets nothing: where it is given, it must equal `data.batch_size` x `accumulate_grad_batches` x `devices` x `num_nodes`.",
        json_schema_extra=unit("pictures", examples=[64]),
    )
    gradient_clip_val: float | None = Field(
        1.0,
        gt=0,
        description="Largest gradient norm; null turns clipping off.",
        json_schema_extra=unit("L2 norm of the gradient", examples=[1.0]),
    )
    devices: int = Field(
        1,
        ge=1,
        description="Processes (one per GPU, or CPU processes with `strategy: ddp`).",
        json_schema_extra=unit("processes", examples=[1, 8]),
    )
    num_nodes: int = Field(
        1, ge=1, description="Machines.", json_schema_extra=unit("machines", examples=[1, 2])
    )
    strategy: Literal["auto", "ddp"] = Field(
        "auto",
        description="`ddp` averages gradients over processes; `auto` is one process, or ddp with several.",
    )
    log_every_n_steps: int = Field(
        10,
        ge=1,
        description="Optimizer steps between log rows.",
        json_schema_extra=unit("optimizer steps", examples=[10]),
    )
    seed: int = Field(
        42,
        ge=0,
        lt=2**32,
        description="Seeds adapter initialisation, data order, noise and dropout.",
        examples=[42],
    )


class CheckpointConfig(Section):
    """What a stopped run goes on from."""

    every_n_steps: int = Field(
        500,
        ge=1,
        description="Optimizer steps between checkpoints; one is also written at the last step.",
        json_schema_extra=unit("optimizer steps", examples=[500]),
    )
    keep_last: int = Field(
        2,
        ge=1,
        description="How many checkpoints of the run are kept.",
        json_schema_extra=unit("checkpoints", examples=[2]),
    )
    resume: str = Field(
        "auto",
        min_length=1,
        description="`auto` goes on with an unfinished run of the same configuration, `never` starts anew, a path names a run folder or a .ckpt file.",
        examples=["auto", "never", "outputs/pocket_lora/001"],
    )


class SampleConfig(Section):
    """Pictures made before, during and after training, always from the same noise."""

    prompts: tuple[str, ...] = Field(
        (),
        description="One picture per prompt; empty means no samples.",
        examples=[["red apple", "a cabin beside a lake"]],
    )
    negative_prompt: str = Field(
        " ", description="What guidance leads away from.", examples=["", "blurry, low quality"]
    )
    every_n_steps: int = Field(
        0,
        ge=0,
        description="Optimizer steps between samples; 0 means only before and after.",
        json_schema_extra=unit("optimizer steps", examples=[500]),
    )
    num_inference_steps: int = Field(
        30,
        ge=1,
        description="Denoising steps.",
        json_schema_extra=unit("denoising steps", examples=[20, 50]),
    )
    guidance_scale: float = Field(
        4.0,
        ge=1,
        description="Classifier-free guidance (arXiv:2207.12598); 1 turns it off and halves the work.",
        json_schema_extra=unit("factor", examples=[1.0, 4.0]),
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="Seed of the first prompt's noise; prompt i uses seed + i.",
        examples=[0],
    )
    num_frames: int = Field(
        1,
        ge=1,
        description="Frames of a sample clip, for families that make clips; 1 for pictures.",
        json_schema_extra=unit("frames", examples=[1, 81]),
    )
    control_images: tuple[str, ...] = Field(
        (),
        description="Control pictures, one per prompt, for families that edit pictures.",
        examples=[["data/cat.png", "data/house.png"]],
    )
    size_px: tuple[Annotated[int, Field(ge=16)], Annotated[int, Field(ge=16)]] = Field(
        (1024, 1024),
        description="Width and height.",
        json_schema_extra=unit("pixels", examples=[[64, 64], [1328, 1328]]),
    )


class ValidationConfig(Section):
    """Loss on a held-out part of the data, at fixed noise levels and noise, so that its values can be compared."""

    fraction: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="Share of the pictures held out; 0 turns validation off.",
        json_schema_extra=unit("share of the pictures", examples=[0.05]),
    )
    every_n_steps: int = Field(
        500,
        ge=1,
        description="Optimizer steps between validations.",
        json_schema_extra=unit("optimizer steps", examples=[500]),
    )
    max_samples: int = Field(
        64,
        ge=1,
        description="At most this many held-out pictures are used.",
        json_schema_extra=unit("pictures", examples=[64]),
    )
    sigmas: tuple[Sigma, ...] = Field(
        (0.1, 0.3, 0.5, 0.7, 0.9),
        min_length=1,
        description="Noise levels at which each picture is judged.",
        json_schema_extra=unit("noise level, 0 clean to 1 noise", examples=[[0.25, 0.5, 0.75]]),
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="Chooses the held-out pictures and their noise.",
        examples=[0],
    )


class WandbConfig(Section):
    """Weights & Biases; needs the extra `wandb`."""

    project: str = Field(
        min_length=1, description="Project that the run is shown in.", examples=["my-styles"]
    )
    entity: str | None = Field(None, description="Team or user.", examples=["my-team"])
    mode: Literal["online", "offline"] = Field(
        "online", description="`offline` writes files to upload later."
    )


class LoggerConfig(Section):
    """Where losses and pictures are logged."""

    tensorboard: bool = Field(True, description="Event files in `<run>/tensorboard`.")
    csv: bool = Field(True, description="`<run>/metrics.csv`.")
    wandb: WandbConfig | None = Field(None, description="Weights & Biases; unset means off.")


class RunSection(Section):
    """What the run is called and where its folder lies."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name of the run; its folder is `<output_dir>/<name>/<number>`.",
        examples=["pocket_lora", "ink-v2"],
    )
    output_dir: str = Field(
        "outputs",
        min_length=1,
        description="Folder of all runs.",
        examples=["outputs", "/scratch/runs"],
    )


class RunConfig(Section):
    """A whole training run."""

    model: ModelConfig = Field(description="The checkpoint and its components.")
    data: DataConfig = Field(description="Pictures and captions.")
    objective: ObjectiveConfig = Field(
        default_factory=ObjectiveConfig, description="Noise levels and loss."
    )
    optim: OptimConfig = Field(default_factory=OptimConfig, description="Optimizer and schedule.")
    trainer: TrainerConfig = Field(
        default_factory=TrainerConfig, description="Length, devices, seed."
    )
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="Saving and resuming."
    )
    sample: SampleConfig = Field(
        default_factory=SampleConfig, description="Pictures of the progress."
    )
    validation: ValidationConfig = Field(
        default_factory=ValidationConfig, description="Held-out loss."
    )
    logger: LoggerConfig = Field(default_factory=LoggerConfig, description="Logs.")
    export: ExportConfig = Field(
        default_factory=ExportConfig, description="Forms of the LoRA files that are written."
    )
    run: RunSection = Field(description="Name and folder.")

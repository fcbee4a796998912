"""The `model` section: which checkpoint, and for each component how it is stored and what of it trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from framework.schema.base import Section, unit
from framework.schema.families import FAMILIES
from framework.schema.sizes import SIZE_PATTERN

Glob = Annotated[str, StringConstraints(min_length=1)]
Precision = Literal["fp8", "bf16"]
Trainable = Literal["none", "lora", "full"]
ComputeDtype = Literal["bf16", "fp32", "fp16"]
Scaling = Literal["row", "tensor", "block", "none"]
Offload = Literal["none", "host", "disk"]
Granularity = Literal["model", "block", "layer"]
LayerKind = Literal["linear", "conv", "embedding"]


class Fp8Config(Section):
    """How a component with `precision: fp8` is stored; read only then."""

    scaling: Scaling = Field(
        "row",
        description="One dequantisation scale per output row, per tensor, per block of 128 x 128, or none (a plain cast: weights below 0.001 become 0).",
    )
    keep_high_precision: tuple[Glob, ...] | None = Field(
        None,
        description="Globs over layer names that stay in bf16, e.g. `transformer_blocks.0.*`; unset means the family's list.",
        examples=[["img_in", "norm_out*"]],
    )
    layers: tuple[LayerKind, ...] = Field(
        ("linear",),
        min_length=1,
        description="Kinds of layers stored in FP8. Norms and biases always stay in bf16.",
        examples=[["linear", "conv"]],
    )
    error_budget: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Largest relative error that FP8 may bring to the dit's output on a seeded input; the layers that cost most stay in "
        "bf16 until it holds. Measured when weights are read; unset keeps no further layers.",
        json_schema_extra=unit("relative L2 norm", examples=[0.02, 0.01]),
    )


class LoraConfig(Section):
    """A low-rank adapter (Hu et al. 2021, arXiv:2106.09685) on a frozen component; read only with `trainable: lora`."""

    rank: int = Field(
        16,
        ge=1,
        le=4096,
        description="Inner dimension of the two adapter matrices.",
        json_schema_extra=unit("columns", examples=[4, 16, 64]),
    )
    alpha: float = Field(
        16.0,
        gt=0,
        description="The adapter's output is scaled by alpha / rank (alpha / sqrt(rank) with rsLoRA).",
        examples=[32.0],
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability of dropping an adapter input while training.",
        json_schema_extra=unit("probability", examples=[0.05]),
    )
    target_modules: tuple[Glob, ...] | None = Field(
        None,
        min_length=1,
        description="Layers that get an adapter: globs or name endings, e.g. `attn.to_q`; unset means the family's list.",
        examples=[["attn.to_q", "attn.to_v"]],
    )
    use_rslora: bool = Field(
        False, description="Rank-stabilised scaling (Kalajdzievski 2023, arXiv:2312.03732)."
    )
    use_dora: bool = Field(
        False, description="Weight-decomposed adapter (Liu et al. 2024, arXiv:2402.09353)."
    )
    init_from: str | None = Field(
        None,
        description="A LoRA `.safetensors` file to start from, in any form that other programs write; rank and layers must agree.",
        examples=["outputs/pocket_lora/001/lora.safetensors"],
    )
    preset: str | None = Field(
        None,
        description="A LoRA `.safetensors` file that stays active and frozen under the one that trains (differential LoRA); never saved with it.",
        examples=["models/turbo_lora.safetensors"],
    )


class ComponentConfig(Section):
    """One component of the model."""

    precision: Precision = Field(
        "bf16",
        description="How frozen weights are stored. Computation stays in `model.compute_dtype`.",
    )
    trainable: Trainable = Field(
        "none", description="Nothing, a LoRA on frozen weights, or every weight."
    )
    offload: Offload = Field(
        "none",
        description="Where large frozen weights rest: on the device, in host memory, or in files on disk. They are fetched for use.",
    )
    granularity: Granularity = Field(
        "layer",
        description="How much of an offloaded component is fetched together: all of it, a block, or a layer.",
    )
    source: str | None = Field(
        None,
        description="Folder, hub id or single `.safetensors` file for this component alone; unset means `model.source`, which "
        "also has a single file's config.",
        examples=[
            "Qwen/Qwen-Image",
            "models/my-transformer",
            "models/qwen_image_fp8_e4m3fn.safetensors",
        ],
    )
    fp8: Fp8Config = Field(default_factory=Fp8Config, description="Details of FP8 storage.")
    lora: LoraConfig | None = Field(
        None,
        description="The adapter, where `trainable: lora`; unset means rank 16 on the family's layers.",
    )


class DitConfig(ComponentConfig):
    """The diffusion transformer."""

    gradient_checkpointing: bool = Field(
        False,
        description="Recompute each block in the backward pass: less activation memory, about a third more time.",
    )


FamilyName = Literal["qwen_image", "qwen_image_edit", "flux", "z_image", "wan2_1", "wan2_2", "sdxl"]


class ModelConfig(Section):
    """A checkpoint in its published layout, and how each of its components is stored and trained."""

    family: FamilyName = Field(
        description="Model family; decides the components and how they are called."
    )
    source: str = Field(
        min_length=1,
        description="Hub id such as `Qwen/Qwen-Image`, a folder in that layout, or the hub cache's folder of a repository.",
        examples=["Qwen/Qwen-Image", "assets/pocket"],
    )
    revision: str = Field(
        "main",
        min_length=1,
        description="Hub branch, tag or commit; the commit it stood for is written to the run folder.",
        examples=["main", "v1.0"],
    )
    variant: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_-]+$",
        description="Form of the weights to take, of checkpoints published in several: the `fp16` of "
        "`diffusion_pytorch_model.fp16.safetensors`; unset means the plain files.",
        examples=["fp16", "bf16"],
    )
    compute_dtype: ComputeDtype = Field(
        "bf16", description="Number format of the arithmetic. Parameters that train are float32."
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="`auto` takes a GPU if there is one; or cpu, cuda, cuda:N, mps.",
        examples=["auto", "cpu", "cuda:1"],
    )
    vram_limit: float | None = Field(
        None,
        gt=0,
        description="Device memory to stay below: offloaded weights stay on the device while there is room, the rest is fetched; unset keeps none there.",
        json_schema_extra=unit("GiB", examples=[11.0, 23.0]),
    )
    fit: str | None = Field(
        None,
        pattern=SIZE_PATTERN,
        description="Size of the device: storage and checkpointing that no file or override sets are chosen, the cheapest that fit, "
        "before the run starts; unset chooses nothing. `octavo plan` shows what is chosen.",
        examples=["24GiB", "11.5GiB"],
    )
    fit_host: str | None = Field(
        None,
        pattern=SIZE_PATTERN,
        description="Host memory that `fit` may use; unset means what this machine has. Read only with `fit`.",
        examples=["64GiB"],
    )
    converted_dir: str | None = Field(
        None,
        min_length=1,
        description="Where weights are kept in the form in which they rest (FP8 codes, say), so that later loads read less; "
        "unset keeps none, but for `offload: disk`, which needs them and uses `.octavo/weights`.",
        examples=[".octavo/weights", "/scratch/octavo-weights"],
    )
    dit: DitConfig = Field(
        default_factory=DitConfig, description="The denoiser: a diffusion transformer, or a UNet."
    )
    dit_2: DitConfig | None = Field(
        None,
        description="The second denoiser of families with two experts, which takes the low noise levels; unset means stored as `dit`.",
    )
    text_encoder: ComponentConfig = Field(
        default_factory=ComponentConfig, description="The text encoder, or the first of two."
    )
    text_encoder_2: ComponentConfig | None = Field(
        None,
        description="The second text encoder of families with two; unset means stored as `text_encoder`.",
    )
    vae: ComponentConfig = Field(default_factory=ComponentConfig, description="The autoencoder.")

    @property
    def components(self) -> dict[str, ComponentConfig]:
        """Component name -> its settings, of those that the family has, in the order in which a run uses them."""
        frozen = {"trainable": "none", "lora": None, "source": None}
        found: dict[str, ComponentConfig] = {}
        for name in FAMILIES[self.family].components:
            own = getattr(self, name)
            if own is None:
                # What was said of the first of two holds for both, but that it trains.
                first = self.dit if name == "dit_2" else self.text_encoder
                unused = {"gradient_checkpointing": False} if name == "dit_2" else {}
                own = first.model_copy(update=frozen | unused)
            found[name] = own
        return found

    @property
    def foreign_sections(self) -> tuple[str, ...]:
        """Sections that are set for components which the family lacks."""
        optional = ("dit_2", "text_encoder_2")
        has = FAMILIES[self.family].components
        return tuple(n for n in optional if n not in has and getattr(self, n) is not None)

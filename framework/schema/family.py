"""The form in which a model family says what is known without reading a weight or importing torch.

What each family says is `framework/schema/specs/<family>.py`; how it encodes, calls and decodes, `framework/models/<family>.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ComponentSpec:
    """Where a component's weights lie in the published layout and which of them the family uses.

    subfolder: folder of the component inside a checkpoint, e.g. "transformer".
    kind: (key, value) in its config.json that says that it is the right model.
    renames: (regular expression, replacement) pairs from a key in the file to a name in the module; the first that matches wins.
    ignored_keys: globs over file keys that the family never loads (a vision tower, an output head).
    embedding_globs: globs over module names that hold token embeddings (2-D like a linear layer, but looked up).
    keep_high_precision: globs over module names that stay in bf16 by default when the component is stored in FP8.
    lora_targets: default `target_modules` of a LoRA on this component.
    """

    subfolder: str
    kind: tuple[str, str]
    renames: tuple[tuple[str, str], ...] = ()
    ignored_keys: tuple[str, ...] = ()
    embedding_globs: tuple[str, ...] = ()
    keep_high_precision: tuple[str, ...] = ()
    lora_targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class FamilySpec:
    """One model family: its components and the sizes that its pictures may have.

    components: in the order in which a run uses them: text encoders, VAE, denoisers ("dit", which in SDXL is a UNet).
    size_divisor_px: width and height must be multiples of this (pixels per image token along one side).
    extras: what has no weights, name -> folder inside a checkpoint: tokenizers, the scheduler, ...
    media: what it makes.   frame_divisor: a clip has a multiple of this many frames, and one.
    num_controls: most control pictures that a sample may have; 0 for families that take none, otherwise each has one.
    objective: what its denoiser was trained with.
    guided: whether guidance needs a negative caption; False for models that take the scale as an input.
    """

    name: str
    components: Mapping[str, ComponentSpec]
    size_divisor_px: int
    extras: Mapping[str, str] = field(
        default_factory=lambda: {"tokenizer": "tokenizer", "scheduler": "scheduler"}
    )
    media: Literal["image", "video"] = "image"
    frame_divisor: int = 1
    num_controls: int = 0
    objective: Literal["flow_matching", "ddpm"] = "flow_matching"
    guided: bool = True

    def guides(self, scale: float) -> bool:
        """Whether classifier-free guidance of this scale calls the denoiser a second time, with a negative caption."""
        return self.guided and scale > 1

    @property
    def denoisers(self) -> tuple[str, ...]:
        """Names of the components that predict: one, or two experts for high and for low noise."""
        return tuple(name for name in self.components if name in DENOISERS)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the components that encode captions."""
        return tuple(name for name in self.components if name.startswith("text_encoder"))


DENOISERS = ("dit", "dit_2")
"""Names that a denoiser may have."""

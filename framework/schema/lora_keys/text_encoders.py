"""Layer names of the text encoders. Native are those that ComfyUI's wrapper gives them, without its own prefix."""

from __future__ import annotations

from framework.schema.lora_keys.base import ComponentNames, Naming, Rule

_ATTENTION = tuple(f"self_attn.{part}_proj" for part in ("q", "k", "v", "o"))
_GATED_MLP = tuple(f"mlp.{part}_proj" for part in ("gate", "up", "down"))
_CLIP = (*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
_T5 = (
    *(f"layer.0.SelfAttention.{part}" for part in ("q", "k", "v", "o")),
    *(f"layer.1.DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")),
)
_NO_TRAINER = "kohya's programs train no text encoder of this family"


def language_model(classes: tuple[str, ...], wrapper: str) -> ComponentNames:
    """A decoder of the Qwen kind, alone or inside its vision-language model.   wrapper: ComfyUI's name for it."""
    layers = [f"layers.#.{part}" for part in (*_ATTENTION, *_GATED_MLP)]
    return ComponentNames(
        classes=classes,
        diffusers="text_encoder",
        comfyui=Naming(f"text_encoders.{wrapper}.transformer", native=True),
        lacking=_NO_TRAINER,
        rules=(
            *(Rule(layer, f"model.{layer}") for layer in layers),
            *(Rule(f"language_model.{layer}", f"model.{layer}") for layer in layers),
        ),
        also=("pipe.text_encoder",),
    )


def clip(*, second: bool, comfyui: Naming | None = None) -> ComponentNames:
    """CLIP's text model; transformers has lost `text_model.` in the first one's names, files keep it."""
    component = "text_encoder_2" if second else "text_encoder"
    lost = "" if second else "text_model."
    names = [f"text_model.encoder.layers.#.{part}" for part in _CLIP]
    flat = "lora_te2" if second else "lora_te1"
    wrapper = "clip_g" if second else "clip_l"
    return ComponentNames(
        classes=("CLIPTextModelWithProjection",) if second else ("CLIPTextModel",),
        diffusers=component if second else f"{component}.text_model",
        kohya=Naming(flat, native=True, flat=True),
        comfyui=comfyui or Naming(flat, native=True, flat=True),
        rules=tuple(Rule(name.removeprefix(lost), name) for name in names),
        also=(
            component,
            f"text_encoders.{wrapper}.transformer",
            f"pipe.{component}",
            *(() if second else ("lora_te",)),
        ),
    )


def t5(
    classes: tuple[str, ...], *, component: str, wrapper: str, flat: str | None
) -> ComponentNames:
    """T5's encoder.   flat: kohya's prefix, None where its programs don't train it."""
    return ComponentNames(
        classes=classes,
        diffusers=component,
        kohya=None if flat is None else Naming(flat, native=True, flat=True),
        comfyui=Naming(f"text_encoders.{wrapper}.transformer", native=True),
        lacking="" if flat else _NO_TRAINER,
        rules=tuple(Rule(name, name) for name in (f"encoder.block.#.{part}" for part in _T5)),
        also=(f"pipe.{component}",),
    )


def autoencoder(*classes: str) -> ComponentNames:
    """A VAE: an adapter on it is this program's alone."""
    return ComponentNames(
        classes=classes,
        diffusers="vae",
        rules=(),
        lacking="no other program reads a LoRA on a VAE",
    )

"""One file per model family: its components, how to encode, how to call the diffusion transformer.

A family's class is imported when it is asked for, because each import of a model costs seconds.
"""

from __future__ import annotations

from framework.errors import ConfigError, Fault
from framework.models.base import Family, SampleSettings, TextConditioning

__all__ = ["Family", "SampleSettings", "TextConditioning", "get_family"]


def get_family(name: str) -> Family:
    """Return a new adapter for the family called `name`; ConfigError where there is none."""
    if name == "qwen_image":
        from framework.models.qwen_image import QwenImageFamily

        return QwenImageFamily()
    raise ConfigError(
        [Fault("model.family", f"{name!r} is no model family", nearest=("qwen_image",))]
    )

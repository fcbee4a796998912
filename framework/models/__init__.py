"""One file per model family: its components, how to encode, how to call the diffusion transformer."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from framework.errors import ConfigError, Fault
from framework.models.base import Family, SampleSettings, TextConditioning

__all__ = ["Family", "SampleSettings", "TextConditioning", "get_family"]


def get_family(name: str) -> Family:
    """Return a new adapter for the family called `name`; ConfigError where there is none."""
    build = _BUILDERS.get(name)
    if build is None:
        nearest = tuple(get_close_matches(name, _BUILDERS)) or tuple(_BUILDERS)
        raise ConfigError([Fault("model.family", f"{name!r} is no model family", nearest=nearest)])
    return build()


def _qwen_image() -> Family:
    # Imported when asked for: the classes of one model cost seconds.
    from framework.models.qwen_image import QwenImageFamily

    return QwenImageFamily()


_BUILDERS: dict[str, Callable[[], Family]] = {"qwen_image": _qwen_image}

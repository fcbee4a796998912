"""One file per model family: its components, how to encode, how to call the diffusion transformer."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from framework.errors import ConfigError, Fault
from framework.models.base import Clip, Family, Sample, SampleSettings, TextConditioning

__all__ = ["Clip", "Family", "Sample", "SampleSettings", "TextConditioning", "get_family"]


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


def _qwen_image_edit() -> Family:
    from framework.models.qwen_image_edit import QwenImageEditFamily

    return QwenImageEditFamily()


def _z_image() -> Family:
    from framework.models.z_image import ZImageFamily

    return ZImageFamily()


def _flux() -> Family:
    from framework.models.flux import FluxFamily

    return FluxFamily()


def _wan2_1() -> Family:
    from framework.models.wan2_1 import Wan21Family

    return Wan21Family()


def _wan2_2() -> Family:
    from framework.models.wan2_2 import Wan22Family

    return Wan22Family()


def _sdxl() -> Family:
    from framework.models.sdxl import SdxlFamily

    return SdxlFamily()


_BUILDERS: dict[str, Callable[[], Family]] = {
    "qwen_image": _qwen_image,
    "qwen_image_edit": _qwen_image_edit,
    "sdxl": _sdxl,
    "flux": _flux,
    "z_image": _z_image,
    "wan2_1": _wan2_1,
    "wan2_2": _wan2_2,
}

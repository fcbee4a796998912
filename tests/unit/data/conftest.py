"""Small pictures on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

WritePicture = Callable[..., Path]


@pytest.fixture
def write_picture(tmp_path: Path) -> WritePicture:
    """Writes a picture of one colour below tmp_path, with a caption beside it if one is given."""

    def write(
        name: str,
        size: tuple[int, int] = (8, 8),
        *,
        color: object = "red",
        caption: str | None = None,
    ) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, color).save(file)  # type: ignore[arg-type]
        if caption is not None:
            file.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return file

    return write

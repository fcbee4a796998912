"""What the tests of the model families share."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Let tests say which cell of the table in docs/families.md they prove; see tests/families/page.py."""
    config.addinivalue_line(
        "markers", "cell(family, column): proves a cell of the table in docs/families.md"
    )

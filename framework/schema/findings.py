"""What a rule across keys looks at, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from framework.errors import Fault
from framework.schema.paths import split_path, value_at
from framework.schema.run import RunConfig
from framework.schema.wording import yaml_text

Where = Callable[[str], str]


@dataclass(frozen=True)
class Finding:
    """What a rule found. reads: paths that the rule looked at; it is void where one of them is faulty itself."""

    fault: Fault
    reads: tuple[str, ...]


@dataclass(frozen=True)
class Judged:
    """What a rule looks at.

    config: the configuration.   values: what was really written.   where: path -> what set it.
    """

    config: RunConfig
    values: Mapping[str, Any]
    where: Where

    def value(self, path: str) -> Any:
        """The value of a dotted path, as it is judged."""
        node: Any = self.config
        for piece in path.split("."):
            node = getattr(node, piece)
        return node

    def finding(
        self,
        path: str,
        message: str,
        *,
        hint: str,
        code: str = "rule",
        reads: tuple[str, ...] = (),
        nearest: tuple[str, ...] = (),
        allowed: str = "",
    ) -> Finding:
        """A finding about the key at `path`.   reads: what the rule looked at besides."""
        pieces = split_path(path)
        found = value_at(self.config.model_dump(include={str(pieces[0])}), pieces)
        single = found is not None and not isinstance(found, Mapping)
        fault = Fault(
            path,
            message,
            self.where(path),
            nearest,
            hint,
            code=code,
            value=yaml_text(found) if single else "",
            allowed=allowed,
        )
        return Finding(fault, (path, *reads))

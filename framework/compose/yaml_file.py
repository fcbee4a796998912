"""Reads one YAML file: its values, its defaults list, and everything that is wrong with it.

What is faulty is left out, so that the rest of the file can still be composed and judged in the same report.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from framework.compose.messages import cut
from framework.compose.sources import shown_path
from framework.errors import Fault

MERGE_TAG = "tag:yaml.org,2002:merge"
_TEXT_TAG = "tag:yaml.org,2002:str"
_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")
)
_MAX_NODES = 100_000  # aliases that multiply each other would fill the memory
_LOADER = get_yaml_loader()
_HEADER = re.compile(r"\A(?:[ \t]*(?:#(?![ \t]*@package)[^\n]*)?\n)*[ \t]*#[ \t]*@package([^\n]*)")
_NUMBERS = {
    "tag:yaml.org,2002:int": _LOADER("").construct_yaml_int,
    "tag:yaml.org,2002:float": _LOADER("").construct_yaml_float,
}


@dataclass
class YamlFile:
    """What one file holds.

    shown: its path as a person would type it.   root: its keys with their positions, without `defaults`.
    defaults: the node of its defaults list; None where it has none.   package: of its `# @package` header.
    left_out: dotted paths (below the package) of what was faulty.   broken: nothing of it can be used.
    """

    file: Path
    shown: str
    root: yaml.MappingNode | None = None
    config: DictConfig = field(default_factory=lambda: OmegaConf.create({}))
    defaults: yaml.Node | None = None
    defaults_place: str = ""
    package: str | None = None
    faults: list[Fault] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    broken: bool = False

    def place(self, node: yaml.Node) -> str:
        """Where a node stands: file:line:column."""
        return f"{self.shown}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

    def refuse(self, fault: Fault) -> YamlFile:
        """Note a fault that makes the whole file useless."""
        self.faults.append(fault)
        self.broken = True
        self.root, self.defaults = None, None
        self.config = OmegaConf.create({})
        return self


def read_yaml_file(file: Path) -> YamlFile:
    """Read and check one file. Raises nothing for what a person wrote."""
    found = YamlFile(file, shown_path(file))
    try:
        raw = file.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        hint = "Check the path and its permissions."
        message = f"can't be read: {error.strerror or error}"
        return found.refuse(Fault("", message, found.shown, hint=hint, code="file"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
        message = f"isn't UTF-8 text: byte {raw[error.start]:#04x} can't stand here"
        hint = "Save the file as UTF-8."
        place = f"{found.shown}:{line}:{column}"
        return found.refuse(Fault("", message, place, hint=hint, code="yaml-syntax"))
    _read_header(found, text)
    try:
        root = yaml.compose(text, Loader=_LOADER)
        return found if root is None else _read_root(found, root)
    except yaml.YAMLError as error:
        return found.refuse(yaml_fault(error, found.shown, text))
    except OmegaConfBaseException as error:
        message = f"can't be read: {str(error).splitlines()[0]}"
        hint = "Correct the value that this names."
        return found.refuse(Fault("", message, found.shown, hint=hint, code="yaml-syntax"))
    except RecursionError:
        message = "can't be read: it is nested too deeply"
        hint = "Sections of a configuration are at most a few levels deep."
        return found.refuse(Fault("", message, found.shown, hint=hint, code="yaml-syntax"))
    except ValueError as error:
        message = f"can't be read: {str(error).splitlines()[0]}"
        hint = "Put texts in quotes."
        return found.refuse(Fault("", message, found.shown, hint=hint, code="yaml-syntax"))


def _read_header(found: YamlFile, text: str) -> None:
    header = _HEADER.match(text)
    if header is None:
        return
    names = header[1].split()
    if len(names) == 1:
        found.package = names[0]
        return
    line = header[0].count("\n") + 1
    message = "the header `# @package` takes one dotted path"
    hint = (
        "Write `# @package _global_`, or remove the line: a recipe's keys start at the top anyway."
    )
    fault = Fault("", message, f"{found.shown}:{line}:1", hint=hint, code="yaml-syntax")
    found.faults.append(fault)


def _read_root(found: YamlFile, root: yaml.Node) -> YamlFile:
    if isinstance(root, yaml.ScalarNode) and root.tag == "tag:yaml.org,2002:null":
        return found
    if not isinstance(root, yaml.MappingNode):
        message = f"a configuration file must be a mapping of keys, not {_kind(root)}"
        hint = "Write keys with colons, e.g. `optim: {lr: 1e-4}`."
        fault = Fault("", message, found.place(root), hint=hint, code="yaml-syntax")
        return found.refuse(fault)
    cleaner = _Cleaner(found)
    cleaner.clean_mapping(root, "", ())
    if cleaner.num_nodes > _MAX_NODES:
        message = f"can't be read: its aliases stand for more than {_MAX_NODES:,} values"
        hint = "Write the values out, or use fewer aliases."
        return found.refuse(Fault("", message, found.shown, hint=hint, code="yaml-syntax"))
    for key, value in root.value:
        if key.value == "defaults":
            found.defaults, found.defaults_place = value, found.place(key)
    root.value = [pair for pair in root.value if pair[0].value != "defaults"]
    loader = _LOADER("")
    try:
        values = loader.construct_document(root)
    finally:
        loader.dispose()
    found.root = root
    found.config = OmegaConf.create(values)
    return found


class _Cleaner:
    """Walks a file's nodes, notes faults with their places and takes what is faulty out. Changes the nodes."""

    def __init__(self, found: YamlFile) -> None:
        self._found = found
        self.num_nodes = 0

    def clean_mapping(
        self, node: yaml.MappingNode, path: str, around: tuple[yaml.Node, ...]
    ) -> None:
        """Check keys and what is below them. around: the nodes that this one lies in."""
        kept: list[tuple[yaml.Node, yaml.Node]] = []
        first: dict[str, yaml.Node] = {}
        for key, value in node.value:
            below = f"{path}.{key.value}" if path else str(key.value)
            if not self._key_is_fine(key, below, first):
                continue
            if not path and key.value == "defaults" and isinstance(value, yaml.Node):
                kept.append((key, value))  # judged as a defaults list, not as values
                continue
            place = path if key.tag == MERGE_TAG else below
            if self._value_is_fine(value, place, (*around, node), merged=key.tag == MERGE_TAG):
                kept.append((key, value))
            else:
                self._found.left_out.append(place)
        node.value = kept

    def _key_is_fine(self, key: yaml.Node, path: str, first: dict[str, yaml.Node]) -> bool:
        if key.tag == MERGE_TAG:
            return True
        if not isinstance(key, yaml.ScalarNode):
            self._note("", f"a key must be a word, not {_kind(key)}", key, "Write KEY: VALUE.")
            return False
        key.tag = _TEXT_TAG  # so that `on: 1` is the key `on`, not `True`
        name = str(key.value)
        if name in first:
            line = first[name].start_mark.line + 1
            hint = f"Keep one of the two; the other stands in line {line}."
            self._note(path, f"duplicate key {name}", key, hint)
            return False
        first[name] = key
        if re.fullmatch(r"\w+(\.\w+)+", name):
            nested = "{" + ": {".join(name.split(".")[1:]) + ": ..." + "}" * name.count(".")
            hint = f"Write it nested: `{name.split('.')[0]}: {nested}`."
            message = "a dotted key isn't split in a file"
            self._found.faults.append(
                Fault(path, message, self._found.place(key), hint=hint, code="unknown-key")
            )
            return False
        return True

    def _value_is_fine(
        self, node: yaml.Node, path: str, around: tuple[yaml.Node, ...], *, merged: bool = False
    ) -> bool:
        self.num_nodes += 1
        if self.num_nodes > _MAX_NODES:
            return False
        if node in around:
            self._note(path, "an alias stands inside what it names", node, "Write the value out.")
            return False
        if isinstance(node, yaml.MappingNode):
            if node.tag != "tag:yaml.org,2002:map":
                return self._refuse_tag(node, path)
            self.clean_mapping(node, path, around)
            return True
        if isinstance(node, yaml.SequenceNode):
            if node.tag != "tag:yaml.org,2002:seq":
                return self._refuse_tag(node, path)
            fine = [
                self._value_is_fine(item, path if merged else f"{path}[{index}]", (*around, node))
                for index, item in enumerate(node.value)
            ]
            return all(fine)
        return self._scalar_is_fine(node, path)

    def _scalar_is_fine(self, node: yaml.Node, path: str) -> bool:
        if node.tag not in _PLAIN_TAGS:
            return self._refuse_tag(node, path)
        if node.tag in _NUMBERS:
            try:
                _NUMBERS[node.tag](node)
            except (ValueError, IndexError):
                hint = "Put a text in quotes."
                self._note(path, f"{node.value} looks like a number but is none", node, hint)
                return False
        if node.tag == _TEXT_TAG and "${" in node.value:
            problem = interpolation_syntax(node.value)
            if problem:
                message, hint = problem
                fault = Fault(
                    path, message, self._found.place(node), hint=hint, code="interpolation"
                )
                self._found.faults.append(fault)
                return False
        return True

    def _refuse_tag(self, node: yaml.Node, path: str) -> bool:
        tag = str(node.tag).replace("tag:yaml.org,2002:", "!!")
        hint = "A configuration is plain data: remove the tag."
        self._note(path, f"the tag {tag} can't be used", node, hint)
        return False

    def _note(self, path: str, message: str, node: yaml.Node, hint: str) -> None:
        place = self._found.place(node)
        self._found.faults.append(Fault(path, message, place, hint=hint, code="yaml-syntax"))


def interpolation_syntax(text: str) -> tuple[str, str] | None:
    """What is wrong with the form of an interpolation, and the way out; None if it can be read."""
    try:
        OmegaConf.create({"value": text})
    except OmegaConfBaseException:
        shown = cut(text)
        opened = text.count("${") > text.count("}")
        problem = "its brace isn't closed" if opened else "what stands in the braces can't be read"
        hint = "An interpolation is written ${optim.lr} or ${oc.env:NAME,default}."
        return f"'{shown}' can't be filled in: {problem}", hint
    return None


def yaml_fault(error: yaml.YAMLError, shown: str, text: str) -> Fault:
    """Describe a YAML syntax error with file, line, column and the line itself."""
    line, column, problem, started = _located(error, text)
    lines = text.splitlines()
    written = lines[line - 1] if 0 < line <= len(lines) else ""
    hint = "Check indentation, colons and quotes there."
    if "'\\t'" in problem or (written[: column + 1].lstrip(" ").startswith("\t")):
        problem, hint = (
            "a tab stands where spaces belong",
            "Indent with spaces; YAML takes no tabs.",
        )
    elif "mapping values are not allowed" in problem:
        problem = "a colon stands where none is expected"
        hint = "Put a text that holds `: ` in quotes, and indent the keys of one section alike."
    elif "another document" in problem:
        problem, hint = "a second document starts here", "Remove the line `---`; a file is one run."
    elif "unexpected end of stream" in problem:
        problem, hint = "a quote isn't closed", f"It is opened in line {started}."
    elif "special characters" in problem:
        hint = "Remove the character; it can't be seen in most editors."
    elif started and started != line:
        hint = f"What isn't closed or indented well starts in line {started}."
    message = f"not valid YAML: {problem}"
    if written.strip():
        message += f", in `{cut(written.strip())}`"
    place = f"{shown}:{line}:{column}" if line else shown
    return Fault("", message, place, hint=hint, code="yaml-syntax", value=written.strip())


def _located(error: yaml.YAMLError, text: str) -> tuple[int, int, str, int]:
    """Line, column and words of an error, and the line where what it is about starts; 0 where unknown."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        started = error.context_mark.line + 1 if error.context_mark else 0
        problem = str(error.problem or error.context or "it can't be read")
        if mark is not None:
            return mark.line + 1, mark.column + 1, problem, started
        return 0, 0, problem, started
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: int(error.position)]
        column = len(before) - (before.rfind("\n") + 1) + 1
        return before.count("\n") + 1, column, str(error.reason), 0
    return 0, 0, str(error).splitlines()[0], 0


def _kind(node: yaml.Node) -> str:
    return {
        yaml.MappingNode: "a mapping",
        yaml.SequenceNode: "a list",
        yaml.ScalarNode: "a single value",
    }[type(node)]


def plain(node: yaml.Node) -> Any:
    """The value of a node as Python data."""
    loader = _LOADER("")
    try:
        return loader.construct_document(node)
    finally:
        loader.dispose()

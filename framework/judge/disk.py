"""Holds a configuration against the files that it names: checkpoint, data, run to resume from, LoRA to start from.

Only names, times and headers are read, and only on this disk; nothing is fetched. What isn't here is a fault for a run
(`need`) and a warning otherwise, since a configuration is often checked on another machine than it runs on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from framework.errors import Fault, SourceError
from framework.judge.layers import check_layers, lora_file_ranks
from framework.judge.places import Findings, nearest_entries, source_fault
from framework.judge.resume import RESUME_READS, check_resume
from framework.schema.families import FAMILIES
from framework.schema.model import LoraConfig
from framework.schema.paths import overlaps
from framework.schema.run import RunConfig
from framework.schema.validate import Use

_TABLES = (".csv", ".jsonl", ".parquet")
_DATA_ALLOWED = "a folder of pictures, or a .csv, .jsonl or .parquet file"


@dataclass(frozen=True)
class FileCheck:
    """What the disk says.

    checked_layers: whether patterns of layer names were held against the checkpoint; False where it isn't on this disk.
    """

    faults: tuple[Fault, ...] = ()
    warnings: tuple[Fault, ...] = ()
    checked_layers: bool = False


def check_files(
    config: RunConfig,
    where: Callable[[str], str],
    *,
    use: Use,
    need: bool,
    stand_ins: Collection[str] = (),
) -> FileCheck:
    """Judge what a configuration names on this disk. Raises nothing for what a person wrote, and asks no network.

    where: path -> what set it.   use: planning and generating read no data and resume nothing.
    need: True where the run is about to start, so that what is missing stops it.
    stand_ins: paths of `config` whose value isn't what a person wrote, so that nothing is said of them.
    """
    findings = Findings(where, need)
    checked = check_layers(config, findings, use=use)
    _check_init_from(config, findings, use)
    if use == "train":
        _check_data(config, findings)
        if not any(overlaps(path, read) for path in stand_ins for read in RESUME_READS):
            check_resume(config, findings)

    def known(faults: list[Fault]) -> tuple[Fault, ...]:
        return tuple(f for f in faults if not any(overlaps(f.path, path) for path in stand_ins))

    return FileCheck(known(findings.faults), known(findings.warnings), checked)


def _check_data(config: RunConfig, findings: Findings) -> None:
    typed = config.data.path
    path = Path(typed).expanduser()
    if not path.exists():
        findings.missing(
            "data.path",
            f'"{typed}" does not exist',
            hint="Correct it; a relative path starts at the folder in which the command runs.",
            value=typed,
            nearest=nearest_entries(typed, (Path.cwd(),)),
            allowed=_DATA_ALLOWED,
        )
    elif path.is_file() and path.suffix.lower() not in _TABLES:
        findings.refuse(
            "data.path",
            f'"{typed}" is neither a folder nor a .csv, .jsonl or .parquet file',
            hint="Give the folder of the pictures, or a file that lists them.",
            value=typed,
        )
    elif path.is_dir() and not any(True for _ in path.iterdir()):
        findings.missing(
            "data.path",
            f'the folder "{typed}" is empty',
            hint="Put pictures with .txt captions or a metadata file there, or give another folder.",
            value=typed,
            allowed=_DATA_ALLOWED,
        )
    elif path.is_dir() and _lies_in(config.run.output_dir, path):
        findings.warn(
            "run.output_dir",
            f'"{config.run.output_dir}" lies inside data.path, so that the samples of a run become training pictures',
            hint="Write runs elsewhere, e.g. run.output_dir=outputs.",
        )


def _lies_in(inner: str, folder: Path) -> bool:
    path = Path(inner).expanduser().absolute().resolve()
    return path.is_relative_to(folder.absolute().resolve())


def _check_init_from(config: RunConfig, findings: Findings, use: Use) -> None:
    """The LoRA files that components start from: there, readable, and of the rank that the configuration says."""
    for name, component in config.model.components.items():
        lora = component.lora or LoraConfig()
        if component.trainable != "lora" or lora.init_from is None:
            continue
        key = f"model.{name}.lora.init_from"
        path = Path(lora.init_from).expanduser()
        if not path.is_file():
            what = "is a folder, not a LoRA file" if path.is_dir() else "does not exist"
            findings.missing(
                key,
                f'"{lora.init_from}" {what}',
                hint=f"Give a LoRA `.safetensors` file, or {key}=null to start from nothing.",
                value=lora.init_from,
                nearest=_lora_files(lora.init_from, path),
                allowed="a LoRA .safetensors file, or null",
            )
            continue
        try:
            ranks = lora_file_ranks(path.absolute(), path.stat().st_mtime_ns)
        except SourceError as error:
            findings.faults.append(source_fault(key, error, findings.where, lora.init_from))
            continue
        held = ranks.get(FAMILIES[config.model.family].components[name].subfolder)
        if held is not None and held != lora.rank and use != "plan":
            rank = f"model.{name}.lora.rank"
            findings.refuse(
                key,
                f"the adapter in {lora.init_from} has rank {held}, but {rank}={lora.rank}",
                hint=f"Set {rank}={held}, or start from another file.",
                code="rule",
                value=lora.init_from,
            )


def _lora_files(typed: str, path: Path) -> tuple[str, ...]:
    """LoRA files that were probably meant: those inside a folder that was given, else those of a close name."""
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.safetensors"))
        return tuple(f"{typed.rstrip('/')}/{name}" for name in inside[:3])
    return nearest_entries(typed, (Path.cwd(),))

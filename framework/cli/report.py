"""Writes errors and warnings for a person: to stderr, in colour only on a terminal, never wrapped inside a path."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from framework.errors import ConfigError, Fault, OctavoError

_FILE_COLUMNS = 240


def error_console() -> Console:
    """A console on stderr; made anew so that it follows a redirected stream."""
    return Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def output_console() -> Console:
    """A console on stdout; tables keep their full width where it isn't a terminal, so that no name is broken."""
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _FILE_COLUMNS
    return console


def print_error(error: OctavoError) -> None:
    """Report an error on stderr: what is wrong, where, what was found, what to do next."""
    if isinstance(error, ConfigError):
        print_faults(f"Error: {error.message}", error.faults, "bold red")
        return
    lines = [("Where", error.where), ("Found", error.found), ("Next", error.hint)]
    console = error_console()
    console.print(_headline("Error: ", error.message, "bold red"))
    _print_details(console, lines)


def print_warnings(faults: Sequence[Fault]) -> None:
    """Report on stderr what is allowed but surely not meant."""
    if faults:
        count = len(faults)
        title = f"{count} warning{'s' if count != 1 else ''} about the configuration"
        print_faults(title, faults, "bold yellow")


def print_usage_error(message: str, hint: str) -> None:
    """Report a command line that can't be understood."""
    console = error_console()
    console.print(_headline("Error: ", message, "bold red"))
    _print_details(console, [("Next", hint)])


def print_faults(
    title: str, faults: Sequence[Fault], style: str, *, concerns: Sequence[str] = ()
) -> None:
    """Write a headline and each fault below it.   concerns: for each fault, which of many configurations have it."""
    console = error_console()
    console.print(Text(title, style=style))
    for fault, concerned in zip(faults, concerns or [""] * len(faults), strict=True):
        console.print(
            Text.assemble("  ", (fault.path, "bold"), ": " if fault.path else "", fault.message)
        )
        lines = [
            ("Set by", fault.where),
            ("Nearest", ", ".join(fault.nearest)),
            ("Next", fault.hint),
            ("In", concerned),
        ]
        _print_details(console, lines)


def _print_details(console: Console, lines: Sequence[tuple[str, str]]) -> None:
    for name, text in lines:
        if text:
            console.print(Text.assemble("      ", (f"{name}: ", "dim"), text))


def _headline(start: str, message: str, style: str) -> Text:
    return Text.assemble((start, style), message)

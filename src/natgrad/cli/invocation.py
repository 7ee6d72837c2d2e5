"""What commands share: options, the folder of data, the console, and the end by Ctrl-C."""

from __future__ import annotations

import inspect
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

__all__ = [
    "DataFolderOption",
    "DeviceOption",
    "Interrupted",
    "JsonOption",
    "OutputOption",
    "command_line",
    "configured",
    "data_folder",
    "make_console",
]

Options = TypeVar("Options")

DataFolderOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder with the original files of built-in data, or train.npz and test.npz "
        "[default: $NATGRAD_DATA; digits need none]."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
OutputOption = Annotated[Path, typer.Option(help="Folder for results.json, plots and report.html.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


class Interrupted(Exception):
    """Ctrl-C ended a command that has told what it found; the message says where that is."""


def make_console(stderr: bool = False) -> Console:
    """Return a console, wide enough for tables where no terminal sets the width."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 120)


def data_folder(given: Path | None, read: bool = True) -> Path | None:
    """Return the folder of built-in data: the environment's, if files are read, by default."""
    folder = os.environ.get("NATGRAD_DATA")
    return Path(folder) if given is None and read and folder else given


def configured(kind: Callable[..., Options], given: Mapping[str, Any], **changed: Any) -> Options:
    """Return a configuration, a dataclass, made of a command's arguments of the same names.

    Args:
        kind: The dataclass.
        given: The arguments by name, as ``locals()`` of the command gives them.
        **changed: Options that are not as they were given.
    """
    names = inspect.signature(kind).parameters
    return kind(**{**{name: given[name] for name in names if name in given}, **changed})


def command_line() -> str:
    """Return the command as it was typed, for the report."""
    return shlex.join(["natgrad", *sys.argv[1:]])

"""What commands share: options, the folder of data, the console, and the end by Ctrl-C."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

import typer
from rich.console import Console

Options = TypeVar("Options")

DATA_FOLDER = (
    "Folder with the original files of built-in data, or train.npz and test.npz "
    "[default: $NATGRAD_DATA; digits need none]."
)
DEVICE = "auto, cpu, cuda or cuda:N."
DeviceOption = Annotated[str, typer.Option(help=DEVICE)]
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


class Given(NamedTuple):
    """An option that is given in another form than the configuration has it."""

    kind: Any
    about: Any
    default: Any = inspect.Parameter.empty


def options_of(kind: type, **about: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Let a command take options of a configuration, in front of its own, as ``**options``.

    Args:
        kind: The configuration, a dataclass, which says what type and default they have.
        **about: The options in their order, and what help says of them: text, an option or
            argument of typer's, or :class:`Given`.
    """
    kinds, defaults = get_type_hints(kind), {f.name: f.default for f in dataclasses.fields(kind)}

    def parameter(name: str, what: Any) -> inspect.Parameter:
        given = what if isinstance(what, Given) else Given(kinds[name], what, defaults[name])
        info = typer.Option(help=given.about) if isinstance(given.about, str) else given.about
        return inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=given.default,
            annotation=Annotated[given.kind, info],
        )

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        *own, _ = inspect.signature(command, eval_str=True).parameters.values()

        @functools.wraps(command)
        def called(**options: Any) -> int:
            return command(**options)

        parameters = [parameter(*one) for one in about.items()] + own
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {one.name: one.annotation for one in parameters}
        return called

    return decorate


def configured(kind: Callable[..., Options], given: Mapping[str, Any], **changed: Any) -> Options:
    """Return a configuration made of options of its names, some of them changed."""
    names = inspect.signature(kind).parameters
    return kind(**{**{name: given[name] for name in names if name in given}, **changed})


def command_line() -> str:
    """Return the command as it was typed, for the report."""
    return shlex.join(["natgrad", *sys.argv[1:]])

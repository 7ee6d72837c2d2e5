"""The program: its commands, its exit codes and its one line about what went wrong."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from natgrad.cli.claims import claims
from natgrad.cli.compare import compare
from natgrad.cli.inspect import inspect
from natgrad.cli.invocation import Interrupted
from natgrad.cli.plan import plan
from natgrad.cli.theory import theory
from natgrad.experiments.config import ConfigError
from natgrad.experiments.factories import FactoryError
from natgrad.experiments.formats import DataError
from natgrad.experiments.inspection import InspectionError
from natgrad.experiments.objectives import ObjectiveError
from natgrad.experiments.plan import PlanError
from natgrad.version import __version__

app: typer.Typer = typer.Typer(
    name="natgrad",
    help="Natural gradient descent for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Else "[default: ...]" is taken for markup and left out.
)
for _command in (compare, theory, claims, inspect, plan):
    app.command()(_command)

# Typer's usage errors derive from a class that it does not export under a name of its own.
_UsageError: Any = typer.BadParameter.__mro__[1]

#: Errors whose message is all that users need to know.
_REFUSALS = (ConfigError, DataError, FactoryError, InspectionError, ObjectiveError, PlanError)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments after the program's name; those of the process by default.

    Returns:
        The exit code: 0 on success, 2 for wrong input, 130 after Ctrl-C.
    """
    try:
        status = app(args=arguments, standalone_mode=False)
    except typer.Exit as leaving:
        return leaving.exit_code
    except Interrupted as stop:
        return _tell(f"interrupted; {stop}.", 130)
    except (typer.Abort, KeyboardInterrupt):
        status = 130
    except _UsageError as error:
        return _tell(error.format_message())
    except _REFUSALS as error:
        return _tell(str(error))
    if status == 130:
        return _tell("interrupted; nothing was written.", 130)
    return status if isinstance(status, int) else 0


def _tell(sentence: str, status: int = 2) -> int:
    """Print one line to standard error, and return an exit code."""
    print("natgrad: " + " ".join(sentence.split()), file=sys.stderr)
    return status


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"natgrad {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Natural gradient descent for PyTorch."""

"""``natgrad theory``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from natgrad.cli.invocation import (
    DataFolderOption,
    DeviceOption,
    Interrupted,
    JsonOption,
    OutputOption,
    command_line,
    configured,
    data_folder,
    make_console,
)
from natgrad.experiments.config import ConfigError
from natgrad.experiments.console import PartBars, print_findings
from natgrad.experiments.data import DATASETS, FILE_DATASETS
from natgrad.experiments.pages import check_output
from natgrad.experiments.theory.config import SECTIONS, TheoryConfig
from natgrad.experiments.theory.report import write_theory_report
from natgrad.experiments.theory.run import run_theory
from natgrad.ntk import ACTIVATIONS

__all__ = ["theory"]

_defaults = TheoryConfig()


def theory(
    sections: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SECTION]...", help=f"Sections, of {', '.join(SECTIONS)} [default: all]."
        ),
    ] = None,
    data: Annotated[str, typer.Option(help=f"Data set: {', '.join(DATASETS)}.")] = _defaults.data,
    data_dir: DataFolderOption = None,
    classes: Annotated[
        str, typer.Option(help="Labels to keep, separated by commas; two give targets ±½.")
    ] = "0,1",
    train_samples: Annotated[
        int | None,
        typer.Option(help="Training samples N [default: 40 for digits, else 100]."),
    ] = None,
    test_samples: Annotated[
        int, typer.Option(help="Test samples, at most.")
    ] = _defaults.test_samples,
    width: Annotated[
        int, typer.Option(help="Units of the hidden layers; the largest where it varies.")
    ] = _defaults.width,
    depth: Annotated[int, typer.Option(help="Number of weight layers.")] = _defaults.depth,
    activation: Annotated[
        str, typer.Option(help=f"Activation: {', '.join(ACTIVATIONS)}.")
    ] = _defaults.activation,
    seed: Annotated[int, typer.Option(help="Seed of weights and subset.")] = 0,
    device: DeviceOption = _defaults.device,
    output: OutputOption = Path("results/theory"),
    as_json: JsonOption = False,
) -> int:
    """Put the theory of wide networks beside what networks do."""
    config = configured(
        TheoryConfig,
        locals(),
        sections=tuple(sections or SECTIONS),
        data_dir=data_folder(data_dir, read=data in FILE_DATASETS),
        classes=_classes(classes),
    )
    check_output(output)
    console = make_console()
    with PartBars(make_console(stderr=True) if as_json else console) as bars:
        results = run_theory(config, bars, command=command_line())
    files = write_theory_report(results, output)
    if as_json:
        print(results.to_json(), end="")
    else:
        print_findings(console, results)
        console.print(f"Report: {files[0]}", highlight=False)
    if results.interrupted:
        raise Interrupted(f"{output} holds what was found")
    return 0


def _classes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(label) for label in text.split(","))
    except ValueError:
        raise ConfigError(
            f"The classes are numbers separated by commas, for example 0,1, not {text!r}."
        ) from None

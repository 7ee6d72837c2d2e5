"""``natgrad theory``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from natgrad.cli.invocation import (
    DATA_FOLDER,
    DEVICE,
    Given,
    Interrupted,
    JsonOption,
    OutputOption,
    command_line,
    configured,
    data_folder,
    make_console,
    options_of,
)
from natgrad.experiments.config import ConfigError
from natgrad.experiments.console import PartBars, print_findings
from natgrad.experiments.data import DATASETS, FILE_DATASETS
from natgrad.experiments.pages import check_output
from natgrad.experiments.theory.config import SECTIONS, TheoryConfig
from natgrad.experiments.theory.report import write_theory_report
from natgrad.experiments.theory.run import run_theory
from natgrad.ntk import ACTIVATIONS


@options_of(
    TheoryConfig,
    sections=Given(
        list[str] | None,
        typer.Argument(
            metavar="[SECTION]...", help=f"Sections, of {', '.join(SECTIONS)} [default: all]."
        ),
        None,
    ),
    data=f"Data set: {', '.join(DATASETS)}.",
    data_dir=DATA_FOLDER,
    classes=Given(str, "Labels to keep, separated by commas; two give targets ±½.", "0,1"),
    train_samples="Training samples N [default: 40 for digits, else 100].",
    test_samples="Test samples, at most.",
    width="Units of the hidden layers; the largest where it varies.",
    depth="Number of weight layers.",
    activation=f"Activation: {', '.join(ACTIVATIONS)}.",
    seed="Seed of weights and subset.",
    device=DEVICE,
)
def theory(
    output: OutputOption = Path("results/theory"), as_json: JsonOption = False, **options: Any
) -> int:
    """Put the theory of wide networks beside what networks do."""
    config = configured(
        TheoryConfig,
        options,
        sections=tuple(options["sections"] or SECTIONS),
        data_dir=data_folder(options["data_dir"], read=options["data"] in FILE_DATASETS),
        classes=_classes(options["classes"]),
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

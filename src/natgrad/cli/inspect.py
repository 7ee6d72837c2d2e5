"""``natgrad inspect``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from natgrad.cli.invocation import JsonOption, make_console
from natgrad.curvature import STRUCTURES
from natgrad.experiments.config import EVAL_SAMPLES
from natgrad.experiments.console import print_spectrum, print_summary
from natgrad.experiments.factories import load_model
from natgrad.experiments.inspection import (
    InspectionError,
    example_input,
    example_of,
    fisher_spectrum,
    inspect_model,
    likelihood_behind,
    shared_positions,
    summary_values,
)


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="PACKAGE.MODULE:FACTORY",
            help="A function that returns a model, or a model and its loss or an example input.",
        ),
    ],
    structure: Annotated[
        str, typer.Option(help=f"Structure of the Fisher matrix: {', '.join(STRUCTURES)}.")
    ] = "kfac",
    likelihood: Annotated[
        str | None,
        typer.Option(
            help="categorical, gaussian, bernoulli or poisson [default: that of the loss which the "
            "factory returns, else categorical]."
        ),
    ] = None,
    fisher: Annotated[
        str, typer.Option(help="Fisher type: exact, mc, empirical, improved.")
    ] = "mc",
    samples: Annotated[int, typer.Option(help="Batch size that costs are stated for.")] = 128,
    input_shape: Annotated[
        str | None,
        typer.Option(
            help="Shape of one input, such as 3,32,32: needed, unless the factory returns an "
            "example or there is --data, to count the positions that share weights."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="package.module:loader, a function that returns an iterable of batches: with it "
            "the spectrum of the Fisher matrix of your model on them is shown, too (largest "
            "eigenvalues and their layers, how many there are per decade, effective dimension)."
        ),
    ] = None,
    data_samples: Annotated[
        int, typer.Option(help="Samples of your data, the first ones, that the spectrum is of.")
    ] = EVAL_SAMPLES,
    as_json: JsonOption = False,
) -> int:
    """Show what is preconditioned in a model, its cost and spectrum."""
    for number in (samples, data_samples):
        if number < 1:
            raise InspectionError(f"The number of samples must be at least 1, not {number}.")
    network, criterion, example = load_model(model)
    if input_shape is not None:
        example = example_input(input_shape)
    elif example is None and data is not None:
        example = example_of(data)
    behind = likelihood or likelihood_behind(criterion)
    positions = None if example is None else shared_positions(network, example)
    structure = structure.replace("-", "_")
    summary = inspect_model(network, structure, behind, fisher, samples, positions)
    spectrum = None
    if data is not None:
        spectrum = fisher_spectrum(network, data, structure, behind, fisher, samples=data_samples)
    if as_json:
        values = summary_values(summary, positions)
        if spectrum is not None:
            values["spectrum"] = asdict(spectrum)
        print(json.dumps(values, indent=2, ensure_ascii=False))
        return 0
    console = make_console()
    print_summary(console, summary, positions)
    if spectrum is not None:
        print_spectrum(console, spectrum)
    return 0

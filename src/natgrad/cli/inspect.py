"""``natgrad inspect``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from natgrad.cli.invocation import JsonOption, make_console
from natgrad.curvature import STRUCTURES
from natgrad.experiments.console import print_summary
from natgrad.experiments.factories import load_model
from natgrad.experiments.inspection import (
    InspectionError,
    example_input,
    inspect_model,
    shared_positions,
    summary_values,
)

__all__ = ["inspect"]


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="PACKAGE.MODULE:FACTORY",
            help="A function that returns a model, or a model and an example input.",
        ),
    ],
    structure: Annotated[
        str, typer.Option(help=f"Structure of the Fisher matrix: {', '.join(STRUCTURES)}.")
    ] = "kfac",
    likelihood: Annotated[
        str, typer.Option(help="categorical, gaussian, bernoulli or poisson.")
    ] = "categorical",
    fisher: Annotated[
        str, typer.Option(help="Fisher type: exact, mc, empirical, improved.")
    ] = "mc",
    samples: Annotated[int, typer.Option(help="Batch size that costs are stated for.")] = 128,
    input_shape: Annotated[
        str | None,
        typer.Option(
            help="Shape of one input, such as 3,32,32: needed, unless the factory returns an "
            "example, to count the positions that share weights."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Show what would be preconditioned in a model, and its cost."""
    if samples < 1:
        raise InspectionError(f"The number of samples must be at least 1, not {samples}.")
    network, _, example = load_model(model)
    if input_shape is not None:
        example = example_input(input_shape)
    positions = None if example is None else shared_positions(network, example)
    structure = structure.replace("-", "_")
    summary = inspect_model(network, structure, likelihood, fisher, samples, positions)
    if as_json:
        print(json.dumps(summary_values(summary, positions), indent=2, ensure_ascii=False))
    else:
        print_summary(make_console(), summary, positions)
    return 0

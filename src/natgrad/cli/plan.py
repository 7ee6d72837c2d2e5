"""``natgrad plan``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from natgrad.cli.invocation import JsonOption, configured, make_console
from natgrad.experiments.methods import method_name
from natgrad.experiments.plan import METHODS, Options, parse_ranks, plan_factory, to_dict
from natgrad.experiments.plan_tables import print_plan

__all__ = ["plan"]

_defaults = Options()


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="PACKAGE.MODULE:FACTORY",
            help="A function that returns a model, or a model and an example input.",
        ),
    ],
    ranks: Annotated[
        str, typer.Option(help="Numbers of processes, separated by commas.")
    ] = ",".join(map(str, _defaults.ranks)),
    method: Annotated[str, typer.Option(help=f"Method: {', '.join(METHODS)}.")] = _defaults.method,
    samples: Annotated[int, typer.Option(help="Samples per process and step.")] = _defaults.samples,
    positions: Annotated[
        int, typer.Option(help="Positions of a sample that share weights: tokens, pixels.")
    ] = _defaults.positions,
    factors: Annotated[
        int | None,
        typer.Option(help="Steps between updates of the curvature [default: the method's own]."),
    ] = None,
    inverses: Annotated[
        int | None,
        typer.Option(help="Steps between factorisations [default: the method's own]."),
    ] = None,
    bandwidth: Annotated[
        float, typer.Option(help="Of each process's link, in GB/s.")
    ] = _defaults.bandwidth,
    throughput: Annotated[
        float, typer.Option(help="Of each process's arithmetic, in TFLOP/s.")
    ] = _defaults.throughput,
    memory: Annotated[
        float | None,
        typer.Option(help="GiB that factors and inverses may take in a process [default: any]."),
    ] = None,
    shards: Annotated[
        bool, typer.Option("--shards", help="Parameters are in shards of fully_shard (FSDP2).")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Predict what curvature shared by processes keeps and sends."""
    options = configured(Options, locals(), method=method_name(method), ranks=parse_ranks(ranks))
    found = plan_factory(model, options)
    if as_json:
        print(json.dumps(to_dict(found), indent=2))
    else:
        print_plan(make_console(), found)
    return 0

"""``natgrad plan``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from natgrad.cli.invocation import Given, JsonOption, configured, make_console, options_of
from natgrad.experiments.console import print_plan
from natgrad.experiments.methods import method_name
from natgrad.experiments.plan import METHODS, Options, parse_ranks, plan_factory, to_dict

MeshOption = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        metavar="REPLICASxSHARDS",
        help="In place of --ranks, --shards and --replicas: for example 8x128.",
    ),
]


@options_of(
    Options,
    model=Given(
        str,
        typer.Argument(
            metavar="PACKAGE.MODULE:FACTORY",
            help="A function that returns a model, or a model and an example input.",
        ),
    ),
    ranks=Given(
        str, "Numbers of processes, separated by commas.", ",".join(map(str, Options().ranks))
    ),
    method=f"Method: {', '.join(METHODS)}.",
    samples="Samples per process and step.",
    positions="Positions of a sample that share weights: tokens, pixels.",
    factors="Steps between updates of the curvature [default: the method's own].",
    inverses="Steps between factorisations [default: the method's own].",
    bandwidth="Of each process's link, in GB/s.",
    throughput="Of each process's arithmetic, in TFLOP/s.",
    memory="GiB that factors and inverses may take in a process [default: any].",
    shards=typer.Option("--shards", help="Parameters are in shards of fully_shard (FSDP2)."),
    replicas="Replicas of the shards (HSDP), with --shards.",
)
def plan(mesh: MeshOption = None, as_json: JsonOption = False, **options: Any) -> int:
    """Predict what curvature shared by processes keeps and sends."""
    if mesh is not None:
        options |= Options.of_mesh(mesh)
    method, ranks = method_name(options["method"]), parse_ranks(options["ranks"])
    found = plan_factory(options["model"], configured(Options, options, method=method, ranks=ranks))
    if as_json:
        print(json.dumps(to_dict(found), indent=2))
    else:
        print_plan(make_console(), found)
    return 0

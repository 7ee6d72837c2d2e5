"""``natgrad claims``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from natgrad.cli.invocation import DeviceOption, Interrupted, JsonOption, data_folder, make_console
from natgrad.experiments.claims.claim import Setting
from natgrad.experiments.claims.page import as_values, print_claims, render_page
from natgrad.experiments.claims.registry import SOURCES, choose
from natgrad.experiments.claims.run import read_result, result_path, run_claims
from natgrad.experiments.console import PartBars
from natgrad.experiments.pages import check_output, write_whole


def claims(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Claims, or whole sources [default: all]."),
    ] = None,
    listing: Annotated[
        bool, typer.Option("--list", help="List the claims and their verdicts; measure nothing.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Measure at the published sizes: hours, or a GPU.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure what is kept, too.")] = False,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the files of the data sets [default: $NATGRAD_DATA; without it the "
            "digits stand in for them]."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: DeviceOption = "auto",
    output: Annotated[
        Path, typer.Option(help="Folder of the results; the page is FOLDER.md beside it.")
    ] = Path("results/claims"),
    as_json: JsonOption = False,
) -> int:
    """Put what natgrad's sources claim to the test."""
    chosen = choose(names or ())
    console, interrupted = make_console(), False
    if not listing:
        check_output(output)
        setting = Setting(full, seed, data_dir=data_folder(data_dir), device=device)
        with PartBars(make_console(stderr=True) if as_json else console) as bars:
            _, interrupted = run_claims(chosen, output, setting, again=again, observer=bars)
        write_whole(output.with_suffix(".md"), render_page(SOURCES, output).encode())
    found = [(claim, read_result(result_path(output, claim, full))) for claim in chosen]
    if as_json:
        print(json.dumps([as_values(*pair) for pair in found], indent=2, ensure_ascii=False))
    else:
        print_claims(console, found)
    if not listing and not as_json:
        console.print(f"Page: {output.with_suffix('.md')}", highlight=False)
    if interrupted:
        raise Interrupted(f"{output} holds what was measured, the same command goes on from it")
    return 0

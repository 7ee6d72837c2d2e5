"""What `natgrad claims` shows: the table of verdicts, and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from natgrad.experiments.claims.claim import Claim
from natgrad.experiments.claims.results import Result


def print_claims(console: Console, found: Sequence[tuple[Claim, Result | None]]) -> None:
    """Print the claims and their verdicts, a dash for what is not measured."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("claim", "verdict", "says"):
        table.add_column(heading, no_wrap=heading != "says")
    for claim, result in found:
        verdict = result.verdict(claim) if result is not None and result.is_final else "–"
        table.add_row(claim.name, verdict, escape(claim.says))
    console.print(table)
    for claim, result in found:
        if result is not None and result.error:
            console.print(f"{claim.name} failed: {escape(result.error)}", highlight=False)


def as_values(claim: Claim, result: Result | None) -> dict[str, Any]:
    """Return a claim, its rule, and what is known of it, as JSON values."""
    measured = result is not None and result.is_final
    return {
        "name": claim.name,
        "where": claim.where,
        "says": claim.says,
        "measured": claim.about,
        "rule": [f"{expect.figure} {expect}" for expect in claim.expects],
        "verdict": result.verdict(claim) if result is not None and measured else None,
        "result": json.loads(result.to_json()) if result is not None and measured else None,
    }

"""What `natgrad claims` shows: progress, the table of verdicts, and JSON."""

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
from natgrad.experiments.claims.run import ClaimsObserver
from natgrad.experiments.console import SectionBars
from natgrad.experiments.pages import format_seconds

__all__ = ["ClaimBars", "as_values", "print_claims"]


class ClaimBars(ClaimsObserver):
    """One bar per claim that is measured; where there is no terminal, a line when it has ended."""

    def __init__(self, console: Console) -> None:
        self._bars = SectionBars(console)
        self._began: str | None = None

    def __enter__(self) -> ClaimBars:
        self._bars.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bars.__exit__(*exception)

    def begin(self, claim: Claim) -> None:
        """Show a new bar."""
        self._began = claim.name
        self._bars.begin(claim.name)

    def progress(self, share: float) -> None:
        """Move the bar."""
        self._bars.progress(share)

    def end(self, claim: Claim, result: Result) -> None:
        """Fill the bar, and say what follows where bars are not shown."""
        if self._began == claim.name:
            self._bars.progress(1.0)
        if not self._bars.console.is_terminal:
            spent = "kept" if self._began != claim.name else format_seconds(result.seconds)
            why = f", as it failed: {result.error}" if result.error else ""
            line = f"{claim.name}: {result.verdict(claim)}{why} ({spent})"
            self._bars.console.print(line, highlight=False)


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

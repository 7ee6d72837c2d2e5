"""What is known of the claims, in the terminal, as JSON, and on a page of all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from natgrad.experiments.claims.claim import Claim, Draws, Expect, Source, mean_and_error
from natgrad.experiments.claims.run import Result, read_result, result_path


def print_claims(console: Console, found: Sequence[tuple[Claim, Result | None]]) -> None:
    """Print the claims and their verdicts, a dash for what is not measured."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("claim", "verdict", "says"):
        table.add_column(heading, no_wrap=heading != "says")
    for claim, result in found:
        table.add_row(claim.name, _verdict(claim, result), escape(claim.says))
    console.print(table)
    for claim, result in found:
        if result is not None and result.error:
            console.print(f"{claim.name} failed: {escape(result.error)}", highlight=False)


def as_values(claim: Claim, result: Result | None) -> dict[str, Any]:
    """Return a claim, its rule, and what is known of it, as JSON values."""
    final = result if result is not None and result.is_final else None
    return {
        "name": claim.name,
        "where": claim.where,
        "says": claim.says,
        "measured": claim.about,
        "rule": [f"{expect.figure} {expect}" for expect in claim.expects],
        "verdict": final and final.verdict(claim),
        "result": final and json.loads(final.to_json()),
    }


_INTRODUCTION = """\
# The claims of the sources, measured

What the papers behind natgrad claim, each claim with a measurement, a rule for its outcome, and
the verdict of the rule: *reproduced*, *refuted*, or *cannot be told*. Figures with several draws of
what is random must clear their bounds by two standard errors, which follow ±, the number of draws
in parentheses. Every figure has the command that repeats it; this page is written by the command.

The rules were written, and committed, before the claims were measured. Only those of
Karakida & Osawa were settled after a first run had been seen: bounds became exponents of the width
where the theory is asymptotic, `divergence` and `gradient-descent` came to start near a solution,
and what that left out became the claims `best-rate` and `divergence-from-start`. Their figures
here are of a second run, with other images and draws (seed 1), before which nothing changed but
that more draws are taken and exponents are fitted to every draw, so that they have errors too.
Where else a measurement was changed after a first one, the rule stayed, and a remark says so.

    natgrad claims --list            # the claims, and what is known of them
    natgrad claims NAME ...          # measure some, claims or whole sources, in minutes on a core
    natgrad claims --full --data-dir DIR  # at the published sizes; resumes where it was stopped
"""


def render_page(sources: Sequence[Source], folder: Path) -> str:
    """Return the page, in Markdown, of the results in a folder."""
    lines = [_INTRODUCTION, "| claim | verdict | at the published size |", "|---|---|---|"]
    sections: list[str] = []
    for source in sources:
        sections += [f"\n## {source.reference}"]
        for claim in source.claims:
            small, full = (read_result(result_path(folder, claim, size)) for size in (False, True))
            anchor = claim.name.replace(".", "")
            verdicts = f"{_verdict(claim, small)} | {_verdict(claim, full)}"
            lines.append(f"| [{claim.name}](#{anchor}) | {verdicts} |")
            sections.append(f"\n### {claim.name}\n\n{claim.says} ({_capital(claim.where)})\n")
            sections.append(f"*Measured:* {claim.about}")
            for result in (small, full):
                if result is not None and result.is_final:
                    sections += _section(claim, result)
            if small is None and full is None:
                sections += ["\nNot measured yet. The rule:\n"]
                sections += [f"- {_rule(expect)}" for expect in claim.expects]
            if claim.remark:
                sections.append(f"\n{claim.remark}")
    return "\n".join(lines + sections) + "\n"


def _section(claim: Claim, result: Result) -> list[str]:
    size = "published size" if result.full else "size for one core"
    verdict = result.verdict(claim)
    if result.error:
        return [f"\n**{_capital(verdict)}** at the {size}: the measurement failed, {result.error}"]
    lines = [f"\n**{_capital(verdict)}** at the {size}.\n"]
    lines += ["| figure | measured | rule | |", "|---|---|---|---|"]
    for name, draws in result.figures.items():
        expect = claim.expectation(name)
        rule, judged = ("", "") if expect is None else (str(expect), expect.judge(draws))
        lines.append(f"| {name.replace('|', '¦')} | {format_draws(draws)} | {rule} | {judged} |")
    lines.append(f"\nThe rule: {'; '.join(map(_rule, claim.expects))}.")
    where = result.environment
    lines.append(
        f"\n`{result.command}`; {result.data}, seed {result.seed}; {result.seconds:.0f} s on "
        f"{where['device']}, {where['threads']} of {where['cores']} cores, torch {where['torch']}, "
        f"{result.created[:10]}."
    )
    return lines


def format_draws(draws: Draws) -> str:
    """Return the mean with three digits and, of several draws, two standard errors and number."""
    mean, error = mean_and_error(draws)
    text = f"{mean:.3g}" if math.isfinite(mean) else {math.inf: "∞"}.get(mean, str(mean))
    return f"{text} ± {error:.2g} ({len(draws)})" if isinstance(draws, list) else text


def _verdict(claim: Claim, result: Result | None) -> str:
    return result.verdict(claim) if result is not None and result.is_final else "–"


def _rule(expect: Expect) -> str:
    reason = f" ({expect.because})" if expect.because else ""
    return f"{expect.figure.rstrip(', ')} {expect}{reason}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

"""A plan as tables in the console."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from rich.console import Console

from natgrad.experiments.console import make_table
from natgrad.experiments.plan import Plan, SharedWork, advice, best
from natgrad.optim.summary import format_bytes

__all__ = ["print_plan"]

_Columns = dict[str, Callable[[SharedWork], str]]

_BYTES: _Columns = {
    "kept": lambda work: format_bytes(work.memory),
    "statistics": lambda work: _size(sum(message.per_step for message in work.messages[:4])),
    "inverses": lambda work: _size(work.inverses.per_step),
    "natural\ngradients": lambda work: _size(work.natural_gradients.per_step),
    "parameters": lambda work: _size(work.parameters.per_step),
    "moved\nin all": lambda work: _size(work.moved),
    "beside it,\ngradients": lambda work: _size(work.gradients.per_step),
}

#: Of parameters in shards, where no process sends all of them to the others.
_BYTES_OF_SHARDS: _Columns = {
    "curvature": _BYTES["kept"],
    "model": lambda work: format_bytes(work.model),
    "owned": lambda work: format_bytes(work.owned),
    "statistics": _BYTES["statistics"],
    "inverses": _BYTES["inverses"],
    "gradients": lambda work: _size(work.whole_gradients.per_step),
    "natural\ngradients": _BYTES["natural\ngradients"],
    "moved\nin all": _BYTES["moved\nin all"],
}

_WORK: _Columns = {
    "factorisation,\nGFLOP": lambda work: _number(work.factorisation / 1e9),
    "statistics,\nGFLOP": lambda work: _number(work.statistics / 1e9),
    "preconditioning,\nGFLOP": lambda work: _number(work.preconditioning / 1e9),
    "computing,\nms": lambda work: _number(1e3 * work.computation),
    "sending,\nms": lambda work: _number(1e3 * work.communication),
    "both,\nms": lambda work: _number(1e3 * work.seconds),
}


def print_plan(console: Console, plan: Plan) -> None:
    """Print what every sharing mode takes, per process, and which one to take.

    Bytes and floating-point operations are means per step; the mode to take is marked ``*``.
    """
    options = plan.options
    console.print(
        f"{options.method} for {plan.covered:,} of {plan.parameters:,} parameters in {plan.parts} "
        f"parts; per process {options.samples} samples of {options.positions} positions; an update "
        f"every {options.factors} steps, a factorisation every {options.inverses}.",
        highlight=False,
    )
    sizes = _BYTES_OF_SHARDS if options.shards else _BYTES
    _print(console, plan, "Kept, and sent per step, by each process", sizes)
    _print(
        console,
        plan,
        f"Work per step of each process, at {options.bandwidth:g} GB/s and {options.throughput:g} "
        "TFLOP/s",
        _WORK,
    )
    console.print(advice(plan), highlight=False)


def _print(console: Console, plan: Plan, title: str, columns: _Columns) -> None:
    rows = []
    for work in plan.works:
        mark = " *" if work == best(plan, work.ranks) else ""
        sharing = work.sharing if isinstance(work.sharing, str) else str(Fraction(work.sharing))
        rows.append([f"{work.ranks:,}", sharing + mark, *(of(work) for of in columns.values())])
    options = {"title": title, "title_justify": "left"}
    table = make_table(["ranks", "sharing", *columns], rows, ["sharing"], no_wrap=True, **options)
    console.print(table, highlight=False)


def _size(size: float) -> str:
    return format_bytes(size) if size else "-"


def _number(value: float) -> str:
    """Return three digits, of large numbers all before the point."""
    if not value:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

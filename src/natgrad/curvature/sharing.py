"""How processes share one curvature: its statistics, its factorisations, its memory.

A batch of which each process has a share makes one estimate. Statistics are added up, or rows
gathered, before they join the average. Then, with Kronecker factors, each factorisation is made by
one process, its *owner*. Processes form columns: those of a layer's column hold its statistics and
inverse, which the owner sends them, and send natural gradients to the others, each along its row.
One column of all stands for sharing the inverses, columns of one process for sharing the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from natgrad.distributed.exchange import Sum
from natgrad.distributed.shards import at_owners, from_owners
from natgrad.operators import GradientSource
from natgrad.operators.block_diagonal import damping_of
from natgrad.records import Record
from natgrad.statistics import RowStatistics, Statistics

if TYPE_CHECKING:
    from natgrad.curvature.curvature import Curvature, Damping, Estimate
    from natgrad.curvature.structure import Part

__all__ = [
    "Sharing",
    "agree",
    "begin_sums",
    "holders_of",
    "natural_shards",
    "of_all",
    "take_inverses",
    "unite",
]

Sharing = Literal["inverses", "memory", "nothing"]


def holders_of(sharing: Sharing | float, number: int) -> int:
    """Return how many processes keep what is known of a layer.

    Args:
        sharing: What processes share.
        number: How many there are.

    Raises:
        ValueError: If a fraction of them is no whole number that divides theirs.
    """
    if isinstance(sharing, str):
        return 1 if sharing == "memory" else number
    count = round(sharing * number)
    if count < 1 or abs(count - sharing * number) > 0.05 or number % count:
        possible = ", ".join(f"{d}/{number}" for d in range(1, number + 1) if number % d == 0)
        raise ValueError(
            f"Refresh(sharing={sharing:g}) would keep each layer with {sharing * number:g} of "
            f"{number} processes, and a whole number that divides theirs is needed: take one of "
            f"{possible}"
        )
    return count


def begin_sums(curvature: Curvature) -> list[Sum]:
    """Begin to add up the statistics of the present step, for the processes that keep them."""
    grid, device = curvature.grid, curvature.layout.device
    held = {name: one.batch for name, one in curvature.estimates.items()}
    own = {n: None if batch is None else batch.sums() for n, batch in held.items()}
    return [
        grid.sum({name: own[name] for name in names}, device, column)
        for column, names in enumerate(curvature.by_column())
    ]


def unite(curvature: Curvature) -> None:
    """Make the statistics of the present step those of all processes.

    They come together where they are kept.
    """
    grid, device = curvature.grid, curvature.layout.device
    begun, curvature.begun = curvature.begun or begin_sums(curvature), []
    held = {name: one.batch for name, one in curvature.estimates.items()}
    for column, names in enumerate(curvature.by_column()):
        own = {n: held[n] for n in names}
        own_rows = {
            n: None if batch is None else _rows(curvature, batch) for n, batch in own.items()
        }
        sums = begun.pop(0).result()
        rows = grid.gathered(own_rows, device, column)
        for name in names:
            present, part = curvature.estimates[name], curvature.parts[name]
            draws = present.draws + (present.batch is None)  # As where there were rows.
            if not curvature.owns(name):
                present = replace(present, batch=None, average=None, inverse=None, draws=draws)
                curvature.estimates[name] = present
            elif sums[name] is not None and not present.rejected:
                batch = _united(curvature, part, sums[name], [one[name] for one in rows])
                curvature.estimates[name] = replace(present, batch=batch, draws=draws)


def _rows(curvature: Curvature, batch: Statistics) -> Any:
    """Return what is sent of a batch's rows: all, or what to know of those that stay."""
    if curvature.rows_stay:
        assert isinstance(batch, RowStatistics)
        return batch.outlined_rows()
    return batch.rows()


def _united(curvature: Curvature, part: Part, sums: Any, rows: Sequence[Any]) -> Statistics:
    """Return the statistics of all processes of sums and of what :func:`_rows` returned in each."""
    present, structure = curvature.estimates[part.name], curvature.structure
    if not curvature.rows_stay:
        return structure.united(part, sums, rows, present.average)
    own, total = present.batch, structure.united(part, sums, [], present.average)
    assert isinstance(total, RowStatistics) and (own is None or isinstance(own, RowStatistics))
    return total.with_shares(own, rows, curvature.replicas, part)


def agree(curvature: Curvature, missed: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    """Leave out what one process has left out; return the counts that parts missed in all.

    Args:
        curvature: The curvature.
        missed: Those of this process, by part.
    """
    device, parts = curvature.layout.device, curvature.estimates
    counts = [torch.as_tensor(missed[name], device=device).double() for name in parts]
    rejected = [torch.tensor(float(one.rejected), device=device).double() for one in parts.values()]
    total = curvature.replicas.summed(torch.stack([*counts, *rejected]), device)
    for name, flag in zip(list(parts), total[len(parts) :].tolist(), strict=True):
        if flag:
            parts[name] = replace(parts[name], batch=None, rejected=True)
    return dict(zip(parts, total[: len(parts)], strict=True))


def take_inverses(curvature: Curvature, made: Sequence[str], damping: Damping) -> None:
    """Take the inverses that the processes of this column have made.

    One's own, too: lying in memory in another order they would round otherwise.

    Args:
        curvature: The curvature.
        made: Parts that this process has just inverted.
        damping: λ, one value or one per block name.
    """
    own = {name: _handed_out(curvature, curvature.estimates[name]) for name in made}
    for found in curvature.grid.column.gathered(own, curvature.layout.device):
        for name, entry in found.items():
            value = damping_of(name, damping)
            part = curvature.parts[name]
            curvature.estimates[name] = _with_inverse(curvature, part, entry, value)


def _handed_out(curvature: Curvature, estimate: Estimate) -> dict[str, Any]:
    """Return what other processes need of an estimate that was just inverted."""
    average, inverse = estimate.average, estimate.inverse
    assert average is not None and inverse is not None
    follows = curvature.structure.follows_updates  # Then it is made of the average alone.
    return {
        "renewal": average.renewal(),
        "inverse": None if follows else inverse.state_dict(),
    }


def _with_inverse(
    curvature: Curvature, part: Part, entry: Mapping[str, Any], damping: float
) -> Estimate:
    """Return the estimate of a part with an inverse that some process has made."""
    present, structure = curvature.estimates[part.name], curvature.structure
    average = present.average
    assert average is not None
    if entry["renewal"] is not None:
        average = average.with_renewal(entry["renewal"])
    if entry["inverse"] is None:
        read = curvature.read(part.name, average)
        inverse = read.inverse(structure.inverse_damping(damping))
    else:
        layout = structure.vector_layout(part)
        inverse = Record.from_state(entry["inverse"], curvature.layout.device, layout)
    return replace(present, average=average, inverse=inverse, damping=damping)


def of_all(curvature: Curvature, own: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of all columns, in which all processes take part.

    Args:
        curvature: The curvature.
        own: Those of the parts of this process, natural gradients or their state.
    """
    result: dict[str, Any] = {}
    for found in curvature.grid.row.gathered(own, curvature.layout.device):
        result.update(found)
    return result


def natural_shards(
    curvature: Curvature,
    gradients: Mapping[str, Tensor],
    natural_gradient: Callable[[Sequence[str], GradientSource], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Return natural gradients in shards, each layer's made of its whole gradient by its owner.

    Args:
        curvature: The curvature.
        gradients: Parameter name → gradient in shards.
        natural_gradient: Makes those of some parts of whole gradients.
    """
    owners, parts, replicas = curvature.owners, curvature.parts, curvature.replicas
    by_parameter = {n: owners[name] for name in owners for n in parts[name].layout.offsets}
    shards = {name: gradients[name] for name in by_parameter}
    wholes = at_owners(shards, by_parameter, replicas.group)
    own = [name for name in parts if owners[name] == replicas.rank]
    found = natural_gradient(own, GradientSource(wholes))
    del wholes
    return from_owners(found, shards, by_parameter, replicas.group)

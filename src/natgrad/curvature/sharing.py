"""How processes share one curvature: its statistics, its factorisations, its memory.

A batch of which each process has a share makes one estimate. Statistics are added up, or rows
gathered, before they join the average. Then, with Kronecker factors, each factorisation is made by
one process, its *owner*. Processes form columns: those of a layer's column hold its statistics and
inverse, which the owner sends them, and send natural gradients to the others, each along its row.
One column of all stands for sharing the inverses, columns of one process for sharing the memory.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from natgrad.distributed import Replicas
from natgrad.distributed.exchange import BUCKET_ELEMENTS, Sum
from natgrad.distributed.grid import Grid
from natgrad.distributed.shards import at_owners, from_owners, is_sharded
from natgrad.jacobians import Draw, Jacobians, LayerJacobian
from natgrad.layouts import BlockLayout
from natgrad.operators import GradientSource
from natgrad.operators.block_diagonal import damping_of
from natgrad.records import Record
from natgrad.statistics import RowStatistics, Statistics

if TYPE_CHECKING:
    from natgrad.curvature.curvature import Curvature, Damping, Estimate
    from natgrad.curvature.structure import Part

Sharing = Literal["inverses", "auto", "memory", "nothing"]

#: How many processes keep each layer at most with ``"auto"``: those of one machine, mostly.
HOLDERS = 8

OfParts = Callable[[Sequence[str], GradientSource], dict[str, Tensor]]


def holders_of(sharing: Sharing | float, number: int) -> int:
    """Return how many of some processes keep what is known of a layer.

    A fraction of them must be a whole number that divides theirs.
    """
    if sharing == "auto":
        return max(d for d in range(1, min(number, HOLDERS) + 1) if number % d == 0)
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


@dataclass(frozen=True, eq=False)
class SummedRows:
    """Rows of a pass that sum those of all samples of a process, of whom others have samples, too.

    One row stands for the batch, right on average, so that of a batch of several processes is the
    sum of theirs, and not one for each.

    Attributes:
        rows: The rows of a part.
        weight: Event weights of this process's samples.
        number: Which pass of the step they are of.
        chunk: Which chunk of it.
        draw: Which random subset of them is taken.
        continued: Whether they are a further chunk of samples that have been counted.
    """

    rows: Jacobians
    weight: Tensor
    number: int
    chunk: int
    draw: Draw
    continued: bool

    @property
    def block(self) -> LayerJacobian:
        """The only block of the rows."""
        (block,) = self.rows.values()
        return block

    @cached_property
    def key(self) -> str:
        """What rows of different processes have in common that are parts of one sum."""
        found = self.block.over_samples()
        inputs = None if found is None else found[1]
        if inputs is None:
            return f"{self.number} {self.chunk}"
        values = inputs.detach().contiguous().cpu().view(torch.uint8).numpy()
        told = hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()
        return f"{self.number} {self.chunk} {told}"

    def sums(self) -> Tensor:
        """Return what is added up of them."""
        found = self.block.over_samples()
        assert found is not None
        return found[0]

    def with_sums(self, sums: Tensor) -> Jacobians:
        """Return the rows with sums over the samples of all processes."""
        ((name, block),) = self.rows.items()
        made = {name: block.with_sums(sums)}
        return Jacobians(self.rows.layout, made, self.rows.samples, self.rows.directions)


def rounds_of(
    shares: Sequence[Sequence[str]], parts: Mapping[str, Part]
) -> Iterator[list[list[str]]]:
    """Yield the parts whose inverses are sent together, of every process some."""
    rest = [list(names) for names in shares]
    while any(rest):
        taken: list[list[str]] = []
        for names in rest:
            totals = accumulate(_entries(parts[name].block) for name in names)
            number = max(1, sum(total <= BUCKET_ELEMENTS for total in totals))
            taken.append(names[:number])
            del names[:number]
        yield taken


class SharedWork:
    """What each of several processes keeps and makes of the curvature that is theirs together.

    Args:
        curvature: The share of this process.
        replicas: The processes, more than one.

    Attributes:
        begun: Sums over processes of the statistics of the present step that are under way.
        outdated: Whether they lack rows that further backward passes have changed here.
        sums_rows: Whether some process has ever had rows that are sums over samples.
        own_reading: Parts whose inputs are data, as this process has found.
        reading_data: Those that are so as some process has found; None before they have met.

    Raises:
        ValueError: If a fraction of them is to keep each layer, and that is no whole number.
    """

    def __init__(self, curvature: Curvature, replicas: Replicas) -> None:
        self.curvature = curvature
        self.replicas: Replicas = replicas
        self.begun: list[Sum] = []
        self.outdated: bool = False
        self.sums_rows: bool = False
        self._apart: set[str] = set()  # Parts whose inputs differ from process to process.
        self._batches: dict[str, Statistics | None] = {}
        self.own_reading: Collection[str] = ()
        self.reading_data: set[str] | None = None
        self._grid: Grid | None = None
        self._owners: dict[str, int] = {}
        self._columns: dict[str, int] = {}  # Of parts that there were, too.
        self._owned: dict[str, Part] | None = None  # Of which parts these are the owners.
        self._directions: list[dict[str, Tensor]] = []  # Natural gradients of columns, on meta.
        #: Whether each factorisation is made by one process, for all of them.
        self.is_divided: bool = curvature.sharing != "nothing" and curvature.structure.shareable
        #: How many processes keep what is known of a part, those of a column of the grid.
        self.holders: int = replicas.number
        if self.is_divided and curvature.structure.companion is None:
            self.holders = holders_of(curvature.sharing, replicas.number)
        #: Whether no process keeps all statistics and inverses.
        self.is_spread: bool = self.holders < replicas.number

    @property
    def grid(self) -> Grid:
        """The processes by what they keep; all must ask for it together the first time."""
        if self._grid is None:
            self._grid = Grid.of(self.replicas, self.holders)
        return self._grid

    @property
    def owners(self) -> dict[str, int]:
        """Part → rank of the process that makes its natural gradient where one is to."""
        parts, balanced = self.curvature.parts, self.curvature.balanced
        if self._owned is not parts:
            # What is known of parts that stay, or come back, stays where it is.
            kept = {n: c for n, c in self._columns.items() if n in parts and self.is_spread}
            number = self.replicas.number // self.holders
            held = [[name for name in kept if kept[name] == column] for column in range(number)]
            columns = balanced([name for name in parts if name not in kept], number, held)
            lists = [own for names in columns for own in balanced(names, self.holders)]
            self._owners = {name: rank for rank, names in enumerate(lists) for name in names}
            self._columns |= {name: rank // self.holders for name, rank in self._owners.items()}
            self._directions = [_directions([parts[n] for n in names]) for names in columns]
            self._owned = parts
        return self._owners

    def owns(self, name: str) -> bool:
        """Return whether this process keeps what is known of a part."""
        seat = self.replicas.rank // self.holders
        return not self.is_spread or self.owners[name] // self.holders == seat

    def own_parts(self) -> list[str]:
        """Return the parts that this process keeps."""
        return [name for name in self.curvature.parts if self.owns(name)]

    def by_column(self) -> dict[int, list[str]]:
        """Return column → the parts that its processes keep, for columns that keep some."""
        names = list(self.curvature.parts)
        if not self.is_spread:
            return {0: names}
        seats = {name: self.owners[name] // self.holders for name in names}
        columns = sorted(set(seats.values()))
        return {column: [n for n in names if seats[n] == column] for column in columns}

    # Statistics.

    def begin_sums(self) -> None:
        """Begin to add up the statistics of the present step, for the processes that keep them."""
        curvature = self.curvature
        held = {name: one.batch for name, one in curvature.estimates.items()}
        if self.sums_rows:
            held.update(self._of_sums())
        self._batches = held
        own = {n: None if batch is None else self._added(batch) for n, batch in held.items()}
        self.begun = [
            self.grid.sum({name: own[name] for name in names}, curvature.layout.device, column)
            for column, names in self.by_column().items()
        ]

    def are_summed(self, name: str, rows: Jacobians) -> bool:
        """Return whether rows of a part are sums over samples that others have a share of."""
        if not self.sums_rows or name in self._apart or len(rows) > 1:
            return False
        (block,) = rows.values()
        return block.summed and block.over_samples() is not None

    def _of_sums(self) -> dict[str, Statistics]:
        """Return the statistics of parts with rows that are sums over the samples of all.

        They are made by the first process that has a share of them.
        """
        estimates, rank = self.curvature.estimates, self.replicas.rank
        device = self.curvature.layout.device
        own: dict[str, dict[str, Any]] = {}
        for name, estimate in estimates.items():
            for one in estimate.summed:
                had = torch.zeros(self.replicas.number, dtype=torch.float64, device=device)
                had[rank] = 1.0
                entry = {"sums": one.sums(), "weight": one.weight, "had": had}
                own.setdefault(name, {})[one.key] = entry
        total = self.replicas.summed(own, device)
        first: dict[tuple[str, str], int] = {}
        places = [(name, key) for name, found in total.items() for key in found]
        if places:
            each = torch.stack([total[name][key]["had"] for name, key in places]).tolist()
            first = {place: had.index(1.0) for place, had in zip(places, each, strict=True)}
        numbers = Counter((name, *key.split()[:2]) for name, key in places)
        several = {name for (name, *_), number in numbers.items() if number > 1}
        self._apart |= {n for n in several if not self.curvature.parts[n].block.one_hot}
        result: dict[str, Statistics] = {}
        for name, estimate in estimates.items():
            for one in estimate.summed:
                if first[name, one.key] == rank:
                    entry = total[name][one.key]
                    rows = one.with_sums(entry["sums"])
                    found = self.curvature.statistics(
                        name, rows, entry["weight"], one.draw, one.continued
                    )
                    before = result.get(name, estimate.batch)
                    result[name] = found if before is None else before.joined(found)
        return result

    @staticmethod
    def _added(batch: Statistics) -> dict[str, Any]:
        """Return what is added up of a batch, which tells all whether there are rows to gather."""
        return {"sums": batch.sums(), "has_rows": type(batch).rows is not Statistics.rows}

    def drop_sums(self) -> None:
        """Forget sums that are under way, as those of some passes of a step."""
        for one in self.begun:
            one.wait()
        self.begun, self.outdated, self._batches = [], False, {}

    def unite(self) -> None:
        """Make the statistics of the present step those of all processes.

        They come together where they are kept.
        """
        curvature, device = self.curvature, self.curvature.layout.device
        if not self.begun:
            self.begin_sums()
        begun, self.begun = self.begun, []
        held, self._batches = self._batches, {}
        for column, names in self.by_column().items():
            found = begun.pop(0).result()
            sums = {n: one["sums"] for n, one in found.items() if one is not None}
            own = {n: held[n] for n in names if n in sums and found[n]["has_rows"]}
            own_rows = {n: None if batch is None else self._rows(batch) for n, batch in own.items()}
            rows = self.grid.gathered(own_rows, device, column) if own_rows else []
            for name in names:
                present, part = curvature.estimates[name], curvature.parts[name]
                absent = present.batch is None and not present.summed
                draws = present.draws + absent  # As where there were rows.
                if not self.owns(name):
                    present = replace(present, batch=None, average=None, inverse=None, draws=draws)
                    curvature.estimates[name] = present
                elif name in sums and not present.rejected:
                    batch = self._united(part, sums[name], [one.get(name) for one in rows])
                    curvature.estimates[name] = replace(present, batch=batch, draws=draws)

    def _rows(self, batch: Statistics) -> Any:
        """Return what is sent of a batch's rows: all, or what to know of those that stay."""
        if self.curvature.rows_stay:
            assert isinstance(batch, RowStatistics)
            return batch.outlined_rows()
        return batch.rows()

    def _united(self, part: Part, sums: Any, rows: Sequence[Any]) -> Statistics:
        """Return the statistics of all of sums and of what :meth:`_rows` returned in each."""
        curvature, structure = self.curvature, self.curvature.structure
        present = curvature.estimates[part.name]
        if not curvature.rows_stay:
            return structure.united(part, sums, rows, present.average)
        own, total = present.batch, structure.united(part, sums, [], present.average)
        assert isinstance(total, RowStatistics) and (own is None or isinstance(own, RowStatistics))
        return total.with_shares(own, rows, self.replicas, part)

    def agree(self) -> tuple[dict[str, Tensor | float], dict[str, Tensor | float]]:
        """Leave out what one process has left out; return what parts missed, and had, in all.

        Sums that are on their way begin anew in all where one has other rows by now.

        Returns:
            Counts that parts missed, and how many positions they had rows of; those of a process
            in which nothing counts are as many for each sample as in the others.
        """
        device, parts = self.curvature.layout.device, self.curvature.estimates
        each = list(parts.values())
        missed = [torch.as_tensor(one.missed, device=device).double() for one in each]
        numbers = [one.positions for one in each] + [one.samples for one in each]
        numbers += [one.silent for one in each] + [one.rejected for one in each]
        numbers += [name in self.own_reading for name in parts]
        told = torch.tensor([*numbers, self.outdated], dtype=torch.float64, device=device)
        total = self.replicas.summed(torch.cat([torch.stack(missed), told]), device)
        lost, positions, samples, silent, *flags = total[:-1].view(6, len(parts))
        *found, had_rows, outdated = torch.cat([*flags, samples.sum()[None], total[-1:]]).tolist()
        if outdated:
            self.drop_sums()
        rejected, reading = found[: len(parts)], found[len(parts) :]
        if had_rows:
            self.reading_data = {name for name, one in zip(parts, reading, strict=True) if one}
        for name, flag in zip(list(parts), rejected, strict=True):
            if flag:
                parts[name] = replace(parts[name], batch=None, rejected=True)
        had = positions * (1.0 + silent / samples.clamp(min=1.0))
        return dict(zip(parts, lost, strict=True)), dict(zip(parts, had, strict=True))

    # Inverses.

    @property
    def seat(self) -> int:
        """Which of those that invert for each other this process is."""
        return self.replicas.rank % self.holders if self.is_divided else 0

    def shares_of(self, wanted: Sequence[str]) -> list[list[str]]:
        """Return which of some parts every process of this column inverts, for the others, too."""
        if not self.is_divided or self.holders == 1:
            return [list(wanted)]
        return self.curvature.balanced(wanted, self.holders)

    def take_inverses(
        self, shares: Sequence[Sequence[str]], made: Collection[str], damping: Damping
    ) -> None:
        """Take the inverses that processes of this column have made, of what each was to invert.

        One's own, too: lying in memory in another order they would round otherwise. Large ones come
        in several rounds, so that no process has all of its own twice.
        """
        curvature = self.curvature
        if len(shares) == 1:
            return
        for names in rounds_of(shares, curvature.parts):
            handed_out = [name for name in names[self.seat] if name in made]
            own = {name: self._handed_out(curvature.estimates[name]) for name in handed_out}
            for found in self.grid.column.gathered(own, curvature.layout.device):
                for name, entry in found.items():
                    value, part = damping_of(name, damping), curvature.parts[name]
                    curvature.estimates[name] = self._with_inverse(part, entry, value)

    def _handed_out(self, estimate: Estimate) -> dict[str, Any]:
        """Return what other processes need of an estimate that was just inverted."""
        average, inverse = estimate.average, estimate.inverse
        assert average is not None and inverse is not None
        follows = self.curvature.structure.follows_updates  # Then it is made of the average alone.
        return {
            "renewal": average.renewal(),
            "inverse": None if follows else inverse.state_dict(),
        }

    def _with_inverse(self, part: Part, entry: Mapping[str, Any], damping: float) -> Estimate:
        """Return the estimate of a part with an inverse that some process has made."""
        curvature, structure = self.curvature, self.curvature.structure
        present = curvature.estimates[part.name]
        average = present.average
        assert average is not None
        if entry["renewal"] is not None:
            average = average.with_renewal(entry["renewal"])
        if entry["inverse"] is None:
            read = curvature.to_invert(part.name, average)
            inverse = read.inverse(structure.inverse_damping(damping))
        else:
            layout = structure.vector_layout(part)
            inverse = Record.from_state(entry["inverse"], curvature.layout.device, layout)
        return replace(present, average=average, inverse=inverse, damping=damping)

    # What is made of them.

    def of_all(self, own: dict[str, Any], like: Sequence[Any] | None = None) -> dict[str, Any]:
        """Return the entries of all columns, in which all processes take part.

        Where all know them, those of every column are told as tensors on the meta device
        (``like``).
        """
        if not self.is_spread:
            return own
        result: dict[str, Any] = {}
        for found in self.grid.row.gathered(own, self.curvature.layout.device, like=like):
            result.update(found)
        return result

    def natural_gradient(self, source: GradientSource, of_parts: OfParts) -> dict[str, Tensor]:
        """Return natural gradients, perhaps in shards, each made where its inverse is."""
        if any(is_sharded(gradient) for gradient in source.gradients.values()):
            return self._natural_shards(source.gradients, of_parts)
        found = of_parts(self.own_parts(), source)
        if not self.is_spread:
            return found
        like = self._directions[self.replicas.rank // self.holders]
        return self.of_all({n: found[n].to(one.dtype) for n, one in like.items()}, self._directions)

    def _natural_shards(
        self, gradients: Mapping[str, Tensor], of_parts: OfParts
    ) -> dict[str, Tensor]:
        """Return natural gradients in shards, made by each layer's owner of its whole gradient."""
        owners, parts, group = self.owners, self.curvature.parts, self.replicas.group
        by_parameter = {n: owners[name] for name in owners for n in parts[name].layout.offsets}
        shards = {name: gradients[name] for name in by_parameter}
        wholes = at_owners(shards, by_parameter, group)
        own = [name for name in parts if owners[name] == self.replicas.rank]
        found = of_parts(own, GradientSource(wholes))
        del wholes
        return from_owners(found, shards, by_parameter, group)


def _entries(block: BlockLayout) -> int:
    """Return how many entries two factors of a block have."""
    return block.groups * (block.d_augmented**2 + block.d_out**2)


def _directions(parts: Sequence[Part]) -> dict[str, Tensor]:
    """Return natural gradients of parts in their types, on the meta device."""
    return {
        name: torch.empty(shape, dtype=part.dtype, device="meta")
        for part in parts
        for name, shape in part.layout.shapes.items()
    }

"""Whether rows are what they are taken for: the sum of a gradient's parts, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from natgrad.capture.generic import GenericKind
from natgrad.capture.graph import graph_hash
from natgrad.capture.row_sources import COUPLED, UNCALLED, Place, RecordedCall
from natgrad.capture.rows import (
    SPLIT_ELEMENTS,
    RowBuilder,
    RowsUnavailable,
    flat_rows,
    joined,
)
from natgrad.capture.samples import (
    SampleAxis,
    at_samples,
    find_axis,
    is_ragged,
    probe_samples,
    probe_vector,
    random_halves,
)
from natgrad.distributed.shards import whole

#: Difference between a gradient and the sum of its rows that counts as rounding, relative to its
#: norm and to the product of the norms of inputs and output gradients, by the dtype of the latter.
ROUNDING = {
    torch.float64: (1e-7, 1e-13),
    torch.float32: (2e-3, 1e-5),
    torch.float16: (0.05, 2e-3),
    torch.bfloat16: (0.1, 1e-2),
}


@dataclass(frozen=True, eq=False)
class Probed:
    """What vectors that are zero at some samples show.

    Attributes:
        axes: Where samples lie, call by call; None where they are coupled.
        mixed: Calls of matrices ``(T, d)`` of which some position belongs to several samples.
        truth: The gradients at parameters, where they were asked for.
    """

    axes: dict[Place, SampleAxis | None]
    mixed: set[Place]
    truth: dict[str, Tensor | None]


class RowCheck:
    """Finds out where rows come from, and that they are right.

    Rows must explain the gradient, ``∇L = Jᵀu`` for every parameter, and belong to their samples.
    Both are checked on the first pass, whenever a layer is called as never before, and again after
    :meth:`natgrad.capture.row_sources.RowSources.forget`, by a few vectors that are zero at some
    samples. What the check finds decides how the rows of a block are taken. Whether it still holds
    is looked at now and then, by two vectors.

    Args:
        rows: What makes rows.
    """

    def __init__(self, rows: RowBuilder) -> None:
        self.rows: RowBuilder = rows
        self.sources = rows.sources
        self._turned = False
        self._moved: set[Place] = set()  # Whose samples have lain elsewhere before.

    def check(
        self,
        recorded: Sequence[RecordedCall],
        output: Tensor,
        turned: Callable[[], Tensor | None] | None,
        likely: bool = False,
    ) -> None:
        """Find out where samples lie and whether rows explain the gradient, if it is not known.

        Args:
            recorded: The calls of a pass.
            output: Its output, ``(N, ...)``, with its graph, which is kept.
            turned: Returns it with another dimension first, where samples may lie, too; None if
                they cannot.
            likely: Whether they lie there if nothing speaks against it.
        """
        sources, calls = self.sources, self.sources.available(recorded)
        if not (len(output) and output.requires_grad):
            return
        sources.look_at_modes()
        if self._turned:  # Coupled were samples along another dimension.
            sources.axes.clear()
            sources.mixed.clear()
            sources.inseparable = dict(sources.direct)
            sources.most_samples = 0
            self._turned = False
        looks, sources.look_due = sources.look_due, False
        if sources.checked and all(one.place in sources.axes for one in calls):
            if not looks or self._still_holds(calls, output):
                return
        sources.checks, sources.passes = sources.checks + 1, 0
        sources.most_samples = max(sources.most_samples, len(output))
        # Vectors that are zero at some samples, whose rows must be zero there, and one at all of
        # them, whose rows must sum to the gradient.
        sources.constant |= {one.call.module for one in calls if not one.call.inputs}
        try:
            found = self._probe(calls, output, self._sets(calls, output))
        except RowsUnavailable:
            self._give_up(calls, output)
            calls = sources.available(recorded)
            found = self._probe(calls, output, self._sets(calls, output))
        if found is None:
            return  # Something overflowed: what is zero cannot be told.
        axes, truth = found.axes, found.truth
        sources.mixed |= found.mixed
        mixing = len(sources.mixing(axes))
        later = None
        if turned is not None and not sources.time_first and (mixing or likely):
            later = turned()
        if later is not None:
            moved = self._probe(calls, later, self._sets(calls, later), compares=False)
            # Rows of an output laid out as it is are still right, but several times as dear.
            # Some layers may mix samples in both, as experts do to which tokens are routed.
            fewer = moved is not None and len(sources.mixing(moved.axes)) < mixing + likely
            sources.time_first = self._turned = fewer
        self._note_moves(axes, output)
        coupled = {place for place, axis in sources.axes.items() if axis is None}
        sources.axes.update({p: axis for p, axis in axes.items() if p not in coupled})
        for one in calls:
            one.axis = sources.axis(one, len(output))
        with self.rows.forming(calls):
            self._find_products(calls, truth)
        calls = sources.used(calls)
        of_block, explained = sources.by_block(calls), sources.explained()
        names = {n: [truth[p] for p in sources.blocks[n].layout.names] for n in explained}
        zero = [n for n, of in names.items() if not any(_any(g) for g in of)]
        sources.silent = {one.place for n in zero for one in of_block.get(n, [])}
        for name, samples, problem in self._unexplained(calls, truth, len(output)):
            self._mend(name, of_block.get(name, []), samples, problem)
        sources.checked = not self._turned
        if sources.checked:
            used = {one.place for one in calls}
            self._tell({p: axis for p, axis in axes.items() if p in used}, of_block, len(output))

    def _note_moves(self, axes: dict[Place, SampleAxis | None], output: Tensor) -> None:
        """Take samples that lie elsewhere time and again, as two views may, for coupled."""
        sources = self.sources
        known = {p: sources.axes[p] for p in axes if sources.axes.get(p) is not None}
        moved = {p for p, axis in known.items() if axes[p] != axis}
        if moved:  # Whatever passes of other graphs were found to be was with them elsewhere.
            sources.graphs = {graph_hash(output)}
        axes.update(dict.fromkeys(moved & self._moved))
        self._moved |= moved

    def _tell(
        self,
        axes: Mapping[Place, SampleAxis | None],
        of_block: Mapping[str, Sequence[RecordedCall]],
        samples: int,
    ) -> None:
        """Say what was found."""
        sources = self.sources
        sources.tell_coupled(axes)
        for sentence in sources.costly(products=True):
            sources.on_finding(sentence)
        sources.tell_uncalled()
        sources.inseparable.update(sources.direct)
        for name, of in of_block.items():
            if any(sources.axis(one, samples) is None for one in of):
                sources.inseparable[name] = COUPLED

    def _still_holds(self, calls: Sequence[RecordedCall], output: Tensor) -> bool:
        """Return whether samples lie where they did, and rows explain the gradient as before.

        Two vectors that are zero at a half of the samples each show where samples lie; where rows
        are compared, too, there is one for both. The halves are other ones every time.
        """
        sources, samples = self.sources, len(output)
        compares = sources.compare_due
        halves = random_halves(samples, 1, sources.checks + sources.passes)
        try:
            found = self._probe(calls, output, halves[:1] if compares else halves, compares)
        except RowsUnavailable:
            return False
        if found is None:
            return True  # Something overflowed: what is zero cannot be told.
        sources.mixed |= found.mixed
        if any(sources.axes[place] not in (axis, None) for place, axis in found.axes.items()):
            return False
        for one in calls:
            one.axis = sources.axis(one, samples)
        return not (compares and any(self._unexplained(calls, found.truth, samples)))

    def _sets(self, calls: Sequence[RecordedCall], output: Tensor) -> Tensor:
        """Return sets of samples, ``(P, N)``, that part any two if it is not too dear; last all."""
        elements = sum(prod(shape) for one in calls for shape in one.shapes)
        sets = probe_samples(len(output), elements, self.sources.checks, SPLIT_ELEMENTS)
        return torch.cat([sets, torch.ones_like(sets[:1])])

    def _probe(
        self,
        calls: Sequence[RecordedCall],
        output: Tensor,
        chosen: Tensor,
        compares: bool = True,
    ) -> Probed | None:
        """Pull vectors that are zero but at chosen samples ``(P, N)`` back to the outputs of calls.

        With ``compares`` the last one goes to parameters, too, and the gradients that it leaves at
        the calls are kept. None if a gradient is not finite.
        """
        sources, last = self.sources, len(chosen) - 1
        tried = {name for name, _ in sources.tried(calls)}
        blocks = dict.fromkeys([*sources.explained(), *(n for n in sources.blocks if n in tried)])
        names = [n for block in blocks for n in sources.blocks[block].layout.names]
        edges = [edge for one in calls for edge in one.edges]
        random = probe_vector(output, sources.checks + sources.passes)
        reached: dict[RecordedCall, list[Tensor | None]] = {one: [] for one in calls}
        truth: dict[str, Tensor | None] = {}
        for number, samples in enumerate(chosen):
            at_all = compares and number == last
            held = [sources.parameter(n) for n in names] if at_all else []
            vector = at_samples(random, samples)
            found = self.rows.pull(output, [*edges, *held], vector, False, True)
            sums = [t.detach().float().abs().sum().cpu() for t in found if t is not None]
            if sums and not bool(torch.isfinite(torch.stack(sums)).all()):
                return None
            remaining = iter(found)
            for one in calls:
                own = one.spread([next(remaining) for _ in one.edges])
                first = next((g for g in own if g is not None), None)
                reached[one].append(None if first is None else first != 0)
                if at_all:
                    one.gradients = one.apart = own
            truth = dict(zip(names, remaining, strict=True)) if at_all else {}
        sources.unreached = {one.place for one, of in reached.items() if all(g is None for g in of)}
        axes: dict[Place, SampleAxis | None] = {}
        mixed: set[Place] = set()
        for one, of in reached.items():
            at, known = joined(of), sources.axes.get(one.place)
            if len(output) == 1:
                axes[one.place] = known or SampleAxis()
                continue
            axis = axes[one.place] = _axis_of(one, at, chosen, known)
            if (axis is None or axis.dim) and _is_mixed(one, at, chosen):
                mixed.add(one.place)
        return Probed(axes, mixed, truth)

    def _give_up(self, calls: Sequence[RecordedCall], output: Tensor) -> None:
        """Find out which blocks no vector can be pulled back to."""
        sources = self.sources
        own, vector = sources.by_block(calls), probe_vector(output, sources.checks)
        for name, block in sources.blocks.items():
            edges = [edge for one in own.get(name, []) for edge in one.edges]
            held = [sources.parameter(n) for n in block.layout.names]
            try:
                self.rows.pull(output, [*edges, *held], vector, False, True)
            except RowsUnavailable as error:
                sources.unavailable[name] = str(error)
                sources.direct.pop(name, None)

    def _find_products(
        self, calls: Sequence[RecordedCall], truth: Mapping[str, Tensor | None]
    ) -> None:
        """Take products as rows where they, with the calls of layers, explain the gradient."""
        sources = self.sources
        for name, of in sources.tried(calls):
            before = sources.uses[name]
            layers = tuple(use for use in before if not isinstance(use.kind, GenericKind))
            own = [one for one in calls if any(one.is_of(use) for use in layers)]
            sources.uses[name] = layers + sources.products[name]
            sources.by_products.add(name)
            known = any(truth[n] is not None for n in sources.blocks[name].layout.names)
            if known and self._explains(name, own + of, truth, 1) is True:
                sources.direct.pop(name, None)
                sources.inseparable.pop(name, None)
            else:
                sources.uses[name] = before
                sources.by_products.discard(name)
        sources.index_uses()

    def _unexplained(
        self, calls: Sequence[RecordedCall], truth: Mapping[str, Tensor | None], samples: int
    ) -> Iterator[tuple[str, int, bool | Exception]]:
        """Yield blocks whose rows do not sum to their gradients, their samples, and the problem."""
        sources = self.sources
        of_block = sources.by_block(calls)
        with self.rows.forming(calls):
            for name in sources.explained():
                of = of_block.get(name, [])
                problem = self._explains(name, of, truth, 1)
                if problem is not True:
                    yield name, 1, problem
                split = all(one.axis is not None for one in of) and not self._turned
                if name in sources.rerun and split and name not in sources.direct:
                    problem = self._explains(name, of, truth, samples)
                    if problem is not True:
                        yield name, samples, problem

    def _mend(
        self, name: str, calls: Sequence[RecordedCall], samples: int, problem: bool | Exception
    ) -> None:
        """Take other rows of a block than those that do not sum to its gradient."""
        sources = self.sources
        modules = {one.call.module for one in calls}
        if samples > 1 and name in sources.rerun:
            sources.whole |= modules  # Its samples are coupled inside.
            sources.tell_coupled({one.place: None for one in calls})
        elif isinstance(problem, Exception):
            sources.distrust(name, problem)
        elif not calls:
            sources.take_directly(name, UNCALLED)
        else:
            sources.take_directly(name, "is used outside the calls of its module, too")

    def _explains(
        self,
        name: str,
        calls: Sequence[RecordedCall],
        truth: Mapping[str, Tensor | None],
        samples: int,
    ) -> bool | Exception:
        """Return whether a block's rows sum to its gradient, or why they cannot be made."""
        layout = self.sources.blocks[name].layout
        true = [truth[n] for n in layout.names]
        if all(gradient is None for gradient in true):
            return True  # Nothing depends on it, or a backward pass of its own hides it.
        given = [g for one in calls for g in one.gradients if g is not None]
        if any(g.is_complex() for g in given):  # As after a hook on a layer's output.
            return TypeError("its output is complex")
        dtypes = [g.dtype for g in (*given, *true) if g is not None]
        relative, floor = max(ROUNDING.get(dtype, (0.1, 1e-2)) for dtype in dtypes)
        try:
            rows = self.rows.block_rows(name, calls, samples, None)
            if rows is None:  # Its gradient may be zero now, but something leads to it.
                return False
            wanted = flat_rows(layout, true)
            assert wanted is not None
            ones = torch.ones(rows.rows, 1, dtype=rows.dtype, device=rows.device)
            total = rows.rmatvec(ones).T
            error = (total - wanted).norm()
            return bool(error <= relative * wanted.norm() + floor * _magnitude(calls))
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:
            return failure


def _axis_of(
    one: RecordedCall, reached: Tensor | None, chosen: Tensor, known: SampleAxis | None
) -> SampleAxis | None:
    """Return where the samples of a call lie, from where vectors at chosen samples reach it.

    Where they were before, if they can be there.
    """
    kind = one.kind
    if reached is None:
        return known or SampleAxis()
    if not kind.own_layout or isinstance(kind, GenericKind):
        return find_axis(reached, chosen, kind.sample_dims(reached.dim() - 1), known)
    laid_out = kind.samples_first(one.call, reached)
    return SampleAxis() if laid_out is None else find_axis(laid_out, chosen, (0,), known)


def _is_mixed(one: RecordedCall, reached: Tensor | None, chosen: Tensor) -> bool:
    """Return whether vectors at several samples reach a position of a call on a matrix."""
    if reached is None or reached.dim() != 3 or one.kind.own_layout:
        return False
    return not is_ragged(reached, chosen, SPLIT_ELEMENTS)


def _magnitude(calls: Sequence[RecordedCall]) -> Tensor | float:
    """Return the size of the terms a gradient sums, which may cancel."""
    total: Tensor | float = 0.0
    for one in calls:
        first = one.call.inputs[0] if one.call.inputs else None
        size: Tensor | float = 1.0
        if isinstance(first, Tensor) and first.is_floating_point():
            size = whole(first.norm())
        for gradient in one.gradients:
            if gradient is not None:
                total = total + gradient.norm().float() * size
    return total


def _any(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())

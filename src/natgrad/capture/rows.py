"""From gradients at layers' outputs to rows of samples, and the checks that they are that."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from natgrad.capture.batched_backward import RowsUnavailable, batched_gradients
from natgrad.capture.blocks import Block, Use
from natgrad.capture.generic import DENSE_LIMIT, GenericKind
from natgrad.capture.kinds import BlockRecord, CallGradients, LayerCall, LayerKind
from natgrad.capture.product_kinds import WatchedParameter, is_product
from natgrad.capture.samples import SampleAxis, find_axis, probe_samples, probe_vectors
from natgrad.jacobians import DenseJacobian, Jacobians, LayerJacobian, SumJacobian
from natgrad.layouts import BlockLayout, ParameterLayout

__all__ = ["RecordedCall", "RowBuilder"]

#: Entries of output gradients that are had at once where rows are taken sample by sample, and that
#: a check may take to part every pair of samples (2^22 float32 = 16 MiB).
SPLIT_ELEMENTS = 2**22

#: Difference between a gradient and the sum of its rows that counts as rounding, relative to its
#: norm and to the product of the norms of inputs and output gradients, by the dtype of the latter.
ROUNDING = {
    torch.float64: (1e-7, 1e-13),
    torch.float32: (2e-3, 1e-5),
    torch.float16: (0.05, 2e-3),
    torch.bfloat16: (0.1, 1e-2),
}

#: Passes after the first whose samples are looked for again, as routing may have put one of each
#: sample in its place by chance.
CONFIRMATIONS = 2

# A layer, the part of it that was called, which call of the pass, and dimensions of the output.
_Place = tuple[nn.Module, str, int, int]
_Gradients = list[Tensor | None]


@dataclass(eq=False)
class RecordedCall:
    """A layer call, its outputs' shapes, and the places their gradients can be had from."""

    call: LayerCall
    kind: LayerKind
    shapes: list[torch.Size]
    edges: list[GradientEdge | None] = field(default_factory=list)
    user_gradients: _Gradients = field(default_factory=list)


@dataclass(eq=False)
class _Call:
    """A recorded call with the gradients of its outputs.

    Attributes:
        recorded: The call.
        place: What tells it from the other calls of a pass.
        axis: Where its samples lie; None if they are coupled.
        gradients: ``(K, *output.shape)`` of every output.
        apart: ``(N·K, *output.shape)``, every sample's vectors pulled back alone, where the block
            needs it; else ``gradients``.
    """

    recorded: RecordedCall
    place: _Place
    axis: SampleAxis | None = SampleAxis()  # noqa: RUF009, frozen
    gradients: _Gradients = field(default_factory=list)
    apart: _Gradients = field(default_factory=list)

    @property
    def call(self) -> LayerCall:
        return self.recorded.call

    @property
    def kind(self) -> LayerKind:
        return self.recorded.kind

    @property
    def edges(self) -> list[GradientEdge]:
        return [edge for edge in self.recorded.edges if edge is not None]

    def spread(self, found: Sequence[Tensor | None]) -> _Gradients:
        """Return gradients of the edges as gradients of the outputs."""
        remaining = iter(found)
        return [None if edge is None else next(remaining) for edge in self.recorded.edges]


class RowBuilder:
    """Turns gradients at the outputs of layers into rows of samples.

    Rows must explain the gradient, ``∇L = Jᵀu`` for every parameter, and belong to their samples.
    Both are checked on the first pass, whenever a layer is called as never before, and again after
    :meth:`forget_checks`, by a few vectors that are zero at some samples. What the check finds
    decides how the rows of a block are taken:

    * Samples that lie in another dimension than the first, or interleaved, are brought to it.
    * Layers that couple samples (graph convolutions, routing between experts, a batch norm of
      one's own), or that feed such a layer, get rows per output: every sample's vectors are pulled
      back alone. Where vectors of different samples are independent with mean zero, the sum of
      their rows serves as one row, which is right on average and costs nothing.
    * Products with parameters outside the calls of layers (``F.linear(h, table.weight)``, stacked
      experts, lists of parameters) count as calls of layers where they explain the gradient.
    * Other uses of parameters outside the calls of their modules (``layer.forward(x)``, powers of
      a matrix) get rows from the gradient at the parameter.

    Args:
        model: The model.
        blocks: Its blocks.
        watched: Parameters whose products may be recorded.
        layout: Order of all trainable parameters.
        unrecorded: Context in which layers run without being recorded.
        on_finding: Called with one sentence about whatever a user should know.

    Attributes:
        direct: Block name → why its rows are taken at the parameters.
        by_products: Blocks whose products are, or are among, their rows.
        checks: How often rows were checked.
        checked: Whether those of the last pass are known to be right.
        inseparable: Block name → why the user's own backward pass leaves no rows of single samples.
        unavailable: Block name → why it has no rows at all.
        time_first: Whether the samples turned out to lie in the output's second dimension.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, Block],
        watched: Sequence[WatchedParameter],
        layout: ParameterLayout,
        unrecorded: Callable[[], AbstractContextManager[Any]],
        on_finding: Callable[[str], None],
    ) -> None:
        self.blocks: Mapping[str, Block] = blocks
        self.layout: ParameterLayout = layout
        self.unrecorded: Callable[[], AbstractContextManager[Any]] = unrecorded
        self.names: dict[nn.Module, str] = {m: name for name, m in model.named_modules()}
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        reasons = {name: _only_at_parameters(block) for name, block in blocks.items()}
        self.direct: dict[str, str] = {name: why for name, why in reasons.items() if why}
        self.inseparable: dict[str, str] = dict(self.direct)
        self.unavailable: dict[str, str] = {}
        self.time_first: bool = False
        self.on_finding = on_finding
        self.by_products: set[str] = set()
        self._products: dict[str, tuple[Use, ...]] = {one.block: one.uses for one in watched}
        self._uses: dict[str, tuple[Use, ...]] = {name: b.uses for name, b in blocks.items()}
        self._users: dict[nn.Module, list[tuple[str, Use]]] = {}
        self._index_uses()
        self._axes: dict[_Place, SampleAxis | None] = {}
        self._unreached: set[_Place] = set()
        self._constant: set[nn.Module] = set()  # Modules whose output depends on no input.
        self._whole: set[nn.Module] = set()  # Modules that are run again on the whole batch.
        self.checks: int = 0
        self.checked: bool = False
        self._turned = False
        self._elements = 0  # Entries that a vector meets on its way through the last pass.
        self._passes = 0  # Since the first that was checked.
        self._last: Callable[[], Tensor | None] = lambda: None
        self._unverified: set[str] = set()  # Blocks whose gradients have all been zero.

    def are_of_layers(self, name: str) -> bool:
        """Return whether a block's rows come from calls of its layers alone."""
        return name not in self.direct and name not in self.by_products

    def forget_products(self) -> None:
        """Make rows without products from now on, as of a model that has been compiled."""
        for name in self.by_products:
            self._uses[name] = self.blocks[name].uses
            reason = _only_at_parameters(self.blocks[name])
            if reason is not None:
                self.direct[name] = self.inseparable[name] = reason
        self.by_products.clear()
        self._index_uses()
        self.forget_checks()

    def _index_uses(self) -> None:
        self._users.clear()
        for name, uses in self._uses.items():
            for use in uses:
                self._users.setdefault(use.module, []).append((name, use))

    def costly(self, products: bool) -> Iterator[str]:
        """Say which rows have no factored form although they are large.

        Args:
            products: Whether to speak of blocks whose products may be their rows, or of others.
        """
        for name, block in self.blocks.items():
            size, asked = block.layout.numel, (name in self._products) == products
            if asked and size > DENSE_LIMIT and self._reruns(name) and name not in self.direct:
                yield (
                    f"{name!r} ({block.kind}) is of a kind without a formula: rows of its {size} "
                    f"parameters take {size * 4 * 128 / 2**20:.0f} MiB per vector at a batch of "
                    "128, and a backward pass per sample; natgrad.register_layer takes a formula"
                )

    def forget_checks(self) -> None:
        """Check again at the next pass. What was coupled once is taken to be so."""
        self.checked, self._passes = False, 0
        self._axes = {place: axis for place, axis in self._axes.items() if axis is None}

    # Rows.

    def pull_back(
        self,
        recorded: Sequence[RecordedCall],
        output: Tensor,
        vectors: Tensor,
        *,
        retain_graph: bool,
        skip_silent: bool,
        independent: bool,
    ) -> Jacobians:
        """Return the rows of every block the output depends on.

        See :meth:`natgrad.capture.Capture.pull_back`.
        """
        samples, directions = int(output.shape[0]), int(vectors.shape[0])
        if samples == 0 or not output.requires_grad:
            return Jacobians(self.layout, {}, samples, directions)
        self.check(recorded, output)
        calls = self._available(recorded)
        layers = sum(prod(shape) for one in recorded for shape in one.shapes)
        self._elements = max(layers, output.numel())
        for one in calls:
            one.axis = self._axis(one, samples)
        own = self._by_block(calls)
        coupled = {name for name, of in own.items() if any(one.axis is None for one in of)}
        mixed = list(dict.fromkeys(one for name in coupled for one in own[name]))
        alone = samples > 1 and not independent
        # Rows that a module fails to make are had at its parameters, through the same graph.
        again = bool(self.direct) or any(map(self._reruns, own))
        keep = retain_graph or again or (alone and bool(mixed))
        self._fill(calls, output, vectors, False, keep)
        if alone:
            self._fill(mixed, output, vectors, True, retain_graph or again)
        rows: dict[str, LayerJacobian | None] = dict.fromkeys(own)
        with self._forming(calls):
            for name, of in own.items():
                if name in self.direct:
                    continue
                try:
                    if name not in coupled:
                        rows[name] = self._block_rows(name, of, samples, skip_silent)
                        continue
                    whole = self._block_rows(name, of, 1, skip_silent)
                    if whole is not None:
                        rows[name] = whole.parted(samples) if alone else whole.summed_up()
                except Exception as error:
                    self._distrust(name, error)
        rows.update(self._rows_of_parameters(output, vectors, alone))
        present = {name: found for name, found in rows.items() if found is not None}
        return Jacobians(self.layout, present, samples, directions)

    def _fill(
        self,
        calls: Sequence[_Call],
        output: Tensor,
        vectors: Tensor,
        alone: bool,
        retain_graph: bool,
    ) -> None:
        """Pull vectors back to the outputs of calls."""
        edges = [edge for one in calls for edge in one.edges]
        found = iter(self._pull(output, edges, vectors, alone, retain_graph))
        for one in calls:
            one.apart = one.spread([next(found) for _ in one.edges])
            if not alone:
                one.gradients = one.apart
                if one.place in self._unreached and any(g is not None for g in one.apart):
                    self.forget_checks()  # Where its samples lie can be found out now.

    def _rows_of_parameters(
        self, output: Tensor, vectors: Tensor, alone: bool
    ) -> dict[str, LayerJacobian | None]:
        """Return the rows of blocks that are had at the parameters."""
        layouts = {name: self.blocks[name].layout for name in self.direct}
        held = [self.parameters[n] for layout in layouts.values() for n in layout.names]
        found = iter(self._pull(output, held, vectors, alone, True))
        samples = len(output) if alone else 1
        result: dict[str, LayerJacobian | None] = {}
        for name, layout in layouts.items():
            rows = _flat_rows(layout, [next(found) for _ in layout.names])
            if rows is None:
                result[name] = None
                continue
            jacobian = DenseJacobian(layout, rows.unflatten(0, (samples, -1)))
            result[name] = jacobian if alone or len(output) == 1 else jacobian.summed_up()
        return result

    def user_rows(
        self,
        recorded: Sequence[RecordedCall],
        samples: int,
        scale: float | Tensor,
        skip_silent: bool,
        separate: bool,
    ) -> Jacobians:
        """Return rows (``K = 1``) from the gradients the user's own backward pass left.

        Blocks whose samples are coupled are left out if they must be ``separate``: that pass has
        summed their rows. Otherwise the sum is their only row.
        """
        self._look_at_modes()
        calls = []
        for one in _numbered(recorded):
            given = one.recorded.user_gradients
            if any(g is not None for g in given):
                one.axis = self._axis(one, samples)
                one.gradients = [None if g is None else _scaled(g, scale)[None] for g in given]
                one.apart = one.gradients
                calls.append(one)
        found: dict[str, LayerJacobian] = {}
        with self._forming(calls):
            for name, of in self._by_block(calls).items():
                coupled = any(one.axis is None for one in of)
                if name in self.direct or (coupled and separate):
                    continue
                rows = self._block_rows(name, of, 1 if coupled else samples, skip_silent)
                if rows is not None:
                    found[name] = rows
        return Jacobians(self.layout, found, samples, 1)

    def _pull(
        self,
        output: Tensor,
        targets: Sequence[GradientEdge | Tensor],
        vectors: Tensor,
        alone: bool,
        retain_graph: bool,
    ) -> _Gradients:
        """Return the gradients at some targets, ``(K, ...)``; if ``alone``, ``(N·K, ...)``."""
        if not targets:
            return []
        if not alone:
            return batched_gradients(output, targets, vectors, retain_graph)
        directions, samples = vectors.shape[:2]
        elements = directions * (self._elements + sum(_size(one) for one in targets))
        step = max(1, min(samples, SPLIT_ELEMENTS // max(1, elements)))
        pieces = []
        for start in range(0, samples, step):
            numbers = torch.arange(start, min(start + step, samples), device=output.device)
            single = vectors.new_zeros(len(numbers), *vectors.shape)
            chosen = vectors[:, numbers].transpose(0, 1)
            single[torch.arange(len(numbers), device=output.device), :, numbers] = chosen
            keep = retain_graph or start + step < samples
            pieces.append(batched_gradients(output, targets, single.flatten(0, 1), keep))
        return [_joined(column) for column in zip(*pieces, strict=True)]

    @contextmanager
    def _forming(self, calls: Sequence[_Call]) -> Iterator[None]:
        """Let kinds make rows: nothing is recorded, and in the dtype of what they are given."""
        given = (g.device.type for one in calls for g in one.gradients if g is not None)
        with (
            self.unrecorded(),
            torch.no_grad(),
            torch.autocast(next(given, "cpu"), enabled=False),
        ):
            yield

    def _by_block(self, calls: Sequence[_Call]) -> dict[str, list[_Call]]:
        """Return the calls of every block, in order of their layers' first call."""
        found: dict[str, list[_Call]] = {}
        first: dict[nn.Module, int] = {}
        for one in calls:
            first.setdefault(one.call.module, len(first))
            for name, use in self._users.get(one.call.module, ()):
                if _belongs(one.call, use) and one not in found.setdefault(name, []):
                    found[name].append(one)
        order = {
            name: min(first[one.call.module] for one in found[name])
            for name in self.blocks
            if name in found
        }
        return {name: found[name] for name in sorted(order, key=order.__getitem__)}

    def _axis(self, one: _Call, samples: int) -> SampleAxis | None:
        """Return where the samples of a call lie; None if they are coupled."""
        if one.call.module in self._whole:
            return None
        axis, kind = self._axes.get(one.place, SampleAxis()), one.kind
        shape = one.recorded.shapes[0]
        if axis is None or samples == 1:
            return axis
        if kind.own_layout and not isinstance(kind, GenericKind):
            laid_out = kind.samples_first(one.call, torch.empty(1, *shape, device="meta"))
            return axis if laid_out is None or laid_out.shape[1] % samples == 0 else None
        return axis if len(shape) > axis.dim and shape[axis.dim] % samples == 0 else None

    def _block_rows(
        self, name: str, calls: Sequence[_Call], samples: int, skip_silent: bool
    ) -> LayerJacobian | None:
        """Return the rows of a block; with 1 as ``samples`` the batch counts as one sample."""
        block = self.blocks[name]
        records: dict[tuple[LayerKind, BlockLayout], BlockRecord] = {}
        uses = self._uses[name]
        for use in uses:
            own = [
                _laid_out(one, use.kind, samples)
                for one in calls
                if _belongs(one.call, use) and any(g is not None for g in one.gradients)
            ]
            if own:
                # Layers of one kind that share a parameter are calls of one layer.
                empty = BlockRecord(use.layout, use.names, [], samples, skip_silent)
                records.setdefault((use.kind, use.layout), empty).calls.extend(own)
        parts = [kind.jacobian(record) for (kind, _), record in records.items()]
        if not parts:
            return None
        if name in self.by_products and block.layout.is_dense:
            flat = [part.layout.flat(part.per_sample_gradients()) for part in parts]
            return DenseJacobian(block.layout, functools.reduce(Tensor.add, flat))
        if len(parts) == 1 and (len(uses) == 1 or _same_form(parts[0].layout, block.layout)):
            return parts[0]
        return SumJacobian(parts, block.layout)

    # Checks.

    def check(self, recorded: Sequence[RecordedCall], output: Tensor) -> None:
        """Find out where samples lie and whether rows explain the gradient, if it is not known.

        Args:
            recorded: The calls of a pass.
            output: Its output, ``(N, ...)``, with its graph, which is kept.
        """
        calls = self._available(recorded)
        if not (len(output) and output.requires_grad):
            return
        self._look_at_modes()
        if self._turned:  # Coupled were samples along another dimension.
            self._axes.clear()
            self._turned = False
        if self.checked and all(one.place in self._axes for one in calls):
            if self._last() is output or not self._looks_again(calls, output):
                return
        self._last = weakref.ref(output)
        self.checks += 1
        # One vector at all samples, whose rows must sum to the gradient,
        self._constant |= {one.call.module for one in calls if not one.call.inputs}
        everywhere = torch.ones(1, len(output), dtype=torch.bool)
        vector = probe_vectors(output, everywhere, self.checks)
        try:
            truth = self._truth(calls, output, vector)
        except RowsUnavailable:
            self._give_up(calls, output, vector)
            calls = self._available(recorded)
            truth = self._truth(calls, output, vector)
        # and some that are zero at some samples, whose rows must be zero there.
        axes = self._find_axes(calls, output)
        if axes is None or not _finite(truth.values()):
            return  # Something overflowed: what is zero cannot be told.
        with torch.enable_grad():
            later = output.transpose(0, 1) if output.dim() > 2 and output.shape[1] > 1 else None
        if later is not None and not self.time_first and self._mixing(axes):
            moved = self._find_axes(calls, later)
            # Rows of an output laid out as it is are still right, but several times as dear.
            self.time_first = self._turned = moved is not None and not self._mixing(moved)
        coupled = {place for place, axis in self._axes.items() if axis is None}
        self._axes.update({p: axis for p, axis in axes.items() if p not in coupled})
        for one in calls:
            one.axis = self._axis(one, len(output))
        with self._forming(calls):
            self._find_products(calls, truth)
        calls = self._used(calls)
        of_block, explained = self._by_block(calls), self._explained()
        names = {n: [truth[p] for p in self.blocks[n].layout.names] for n in explained}
        self._unverified = {n for n, of in names.items() if not any(_any(g) for g in of)}
        with self._forming(calls):
            for name in explained:
                of = of_block.get(name, [])
                self._compare(name, of, truth, 1)
                split = all(one.axis is not None for one in of)
                if self._reruns(name) and split and name not in self.direct:
                    self._compare(name, of, truth, len(output))
        self.checked = not self._turned
        if self.checked:
            used = {one.place for one in calls}
            self._tell_coupled({place: axis for place, axis in axes.items() if place in used})
            for sentence in self.costly(products=True):
                self.on_finding(sentence)
            self.inseparable.update(self.direct)
            for name, of in of_block.items():
                if any(self._axis(one, len(output)) is None for one in of):
                    self.inseparable[name] = "the samples of a batch are coupled in it or after it"

    def _look_at_modes(self) -> None:
        """Run no module again that has become random or coupled since, as in training mode."""
        for name, block in self.blocks.items():
            if self._reruns(name) and name not in self.direct:
                reason = _only_at_parameters(block)
                if reason is not None:
                    self.direct[name] = self.inseparable[name] = reason

    def _looks_again(self, calls: Sequence[_Call], output: Tensor) -> bool:
        """Return whether another pass than the first is to be checked in full.

        The second and third are if their samples lie elsewhere, or if some gradients have all been
        zero; because of those, ever fewer of the later ones, too.
        """
        self._last = weakref.ref(output)
        self._passes += 1
        if self._passes <= CONFIRMATIONS:
            axes = self._find_axes(calls, output)
            known = {} if axes is None else axes
            if any(self._axes[place] not in (axis, None) for place, axis in known.items()):
                return True
        power_of_two = self._passes & (self._passes - 1) == 0
        return bool(self._unverified) and (self._passes <= CONFIRMATIONS or power_of_two)

    def _explained(self) -> list[str]:
        """Return the blocks whose rows are compared with gradients."""
        return [n for n in self.blocks if n not in self.direct and n not in self.unavailable]

    def _reruns(self, name: str) -> bool:
        return any(isinstance(use.kind, GenericKind) for use in self._uses[name])

    def _available(self, recorded: Sequence[RecordedCall]) -> list[_Call]:
        """Return the calls of layers, and products, whose outputs' gradients can be had.

        Products that no block's rows are known to be made of are among them until rows are checked.
        """
        calls = [one for one in _numbered(recorded) if one.edges]
        used = self._used(calls)
        if self.checked:
            return used
        kept = set(map(id, used))
        return [one for one in calls if id(one) in kept or is_product(one.kind)]

    def _used(self, calls: Sequence[_Call]) -> list[_Call]:
        """Return those calls that rows of some block are made of."""
        own = {n: of for n, of in self._by_block(calls).items() if n not in self.unavailable}
        wanted = {id(one) for of in own.values() for one in of}
        return [one for one in calls if id(one) in wanted]

    def _truth(
        self, calls: Sequence[_Call], output: Tensor, vector: Tensor
    ) -> dict[str, Tensor | None]:
        """Pull a vector back to the outputs of calls, and return the gradients at parameters."""
        tried = {name for name, _ in self._tried(calls)}
        blocks = dict.fromkeys([*self._explained(), *(n for n in self.blocks if n in tried)])
        names = [n for block in blocks for n in self.blocks[block].layout.names]
        edges = [edge for one in calls for edge in one.edges]
        held = [self.parameters[n] for n in names]
        found = iter(self._pull(output, [*edges, *held], vector, False, True))
        for one in calls:
            one.gradients = one.apart = one.spread([next(found) for _ in one.edges])
        return dict(zip(names, found, strict=True))

    def _give_up(self, calls: Sequence[_Call], output: Tensor, vector: Tensor) -> None:
        """Find out which blocks no vector can be pulled back to."""
        own = self._by_block(calls)
        for name, block in self.blocks.items():
            edges = [edge for one in own.get(name, []) for edge in one.edges]
            held = [self.parameters[n] for n in block.layout.names]
            try:
                self._pull(output, [*edges, *held], vector, False, True)
            except RowsUnavailable as error:
                self.unavailable[name] = str(error)
                self.direct.pop(name, None)

    def _find_axes(
        self, calls: Sequence[_Call], output: Tensor
    ) -> dict[_Place, SampleAxis | None] | None:
        """Return where samples lie, call by call, for samples in the output's first dimension.

        None if a gradient is not finite.
        """
        samples = len(output)
        if samples == 1:
            return {one.place: SampleAxis() for one in calls}
        elements = sum(prod(shape) for one in calls for shape in one.recorded.shapes)
        chosen = probe_samples(samples, elements, self.checks, SPLIT_ELEMENTS)
        edges = [edge for one in calls for edge in one.edges]
        reached: dict[_Call, list[Tensor | None]] = {one: [] for one in calls}
        for one_by_one in chosen.split(1):
            vector = probe_vectors(output, one_by_one, self.checks)
            found = self._pull(output, edges, vector, False, True)
            if not _finite(found):
                return None
            remaining = iter(found)
            for one in calls:
                own = [next(remaining) for _ in one.edges]
                first = next((g for g in own if g is not None), None)
                reached[one].append(None if first is None else first != 0)
        self._unreached = {one.place for one, of in reached.items() if all(g is None for g in of)}
        return {one.place: _axis_of(one, _joined(of), chosen) for one, of in reached.items()}

    def _tried(self, calls: Sequence[_Call]) -> list[tuple[str, list[_Call]]]:
        """Return blocks that have products which are not known to be rows of theirs, and these."""
        found: dict[str, list[_Call]] = {}
        for name, uses in self._products.items():
            if name not in self.by_products and name not in self.unavailable:
                of = [one for one in calls if any(_belongs(one.call, use) for use in uses)]
                if of:
                    found[name] = of
        return list(found.items())

    def _find_products(self, calls: Sequence[_Call], truth: Mapping[str, Tensor | None]) -> None:
        """Take products as rows where they, with the calls of layers, explain the gradient."""
        for name, of in self._tried(calls):
            before = self._uses[name]
            layers = tuple(use for use in before if not isinstance(use.kind, GenericKind))
            own = [one for one in calls if any(_belongs(one.call, use) for use in layers)]
            self._uses[name] = layers + self._products[name]
            self.by_products.add(name)
            known = any(truth[n] is not None for n in self.blocks[name].layout.names)
            if known and self._explains(name, own + of, truth, 1) is True:
                self.direct.pop(name, None)
                self.inseparable.pop(name, None)
            else:
                self._uses[name] = before
                self.by_products.discard(name)
        self._index_uses()

    def _compare(
        self,
        name: str,
        calls: Sequence[_Call],
        truth: Mapping[str, Tensor | None],
        samples: int,
    ) -> None:
        """Compare the sum of a block's rows with its gradient; take other rows if they differ."""
        problem = self._explains(name, calls, truth, samples)
        if problem is True:
            return
        modules = {one.call.module for one in calls}
        if samples > 1 and self._reruns(name):
            self._whole |= modules  # Its samples are coupled inside.
            self._tell_coupled({one.place: None for one in calls})
        elif isinstance(problem, Exception):
            self._distrust(name, problem)
        elif not calls:
            self._take_directly(name, "is used without a call of its module")
        else:
            self._take_directly(name, "is used outside the calls of its module, too")

    def _explains(
        self,
        name: str,
        calls: Sequence[_Call],
        truth: Mapping[str, Tensor | None],
        samples: int,
    ) -> bool | Exception:
        """Return whether a block's rows sum to its gradient, or why they cannot be made."""
        layout = self.blocks[name].layout
        true = [truth[n] for n in layout.names]
        if all(gradient is None for gradient in true):
            return True  # Nothing depends on it, or a backward pass of its own hides it.
        given = [g for one in calls for g in one.gradients if g is not None]
        dtypes = [g.dtype for g in (*given, *true) if g is not None]
        relative, floor = max(ROUNDING.get(dtype, (0.1, 1e-2)) for dtype in dtypes)
        try:
            rows = self._block_rows(name, calls, samples, False)
            wanted = _flat_rows(layout, true)
            assert wanted is not None
            total = (
                torch.zeros_like(wanted)
                if rows is None
                else rows.rmatvec(torch.ones(rows.rows, 1, dtype=rows.dtype, device=rows.device)).T
            )
            error = (total - wanted).norm()
            return bool(error <= relative * wanted.norm() + floor * _magnitude(calls))
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:
            return failure

    def _distrust(self, name: str, error: Exception) -> None:
        """Take the rows of a block at the parameters, as its kind cannot make them."""
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        self._take_directly(name, f"has no rows by its module ({type(error).__name__}: {error})")

    def _take_directly(self, name: str, reason: str) -> None:
        self.direct[name] = reason
        block = self.blocks[name]
        names = " and ".join(repr(n) for n in block.layout.names)
        self.on_finding(
            f"{names} ({block.kind}) {reason}: rows are taken from the gradient at the parameter, "
            "exactly, but with a backward pass per sample where the Fisher type is not 'mc'"
        )

    def _mixing(self, axes: Mapping[_Place, SampleAxis | None]) -> list[nn.Module]:
        """Return modules whose samples are coupled although their output serves not all of them."""
        uses = [use for block in self.blocks.values() for use in block.uses]
        shared = {use.module for use in uses if use.kind.may_be_shared} | self._constant
        return [place[0] for place, axis in axes.items() if axis is None and place[0] not in shared]

    def _tell_coupled(self, axes: Mapping[_Place, SampleAxis | None]) -> None:
        modules = dict.fromkeys(self._mixing(axes))
        if modules:
            named = ", ".join(f"{self.names.get(m, '')!r} ({type(m).__name__})" for m in modules)
            self.on_finding(
                f"the samples of a batch are coupled in or after {named}: rows are taken output by "
                "output, which costs a backward pass per sample where the Fisher type is not 'mc'"
            )


def _numbered(recorded: Sequence[RecordedCall]) -> list[_Call]:
    """Tell the calls of a pass apart."""
    seen: Counter[tuple[nn.Module, str]] = Counter()
    calls = []
    for one in recorded:
        key = one.call.module, one.call.key
        calls.append(_Call(one, (*key, seen[key], len(one.shapes[0]))))
        seen[key] += 1
    return calls


def _belongs(call: LayerCall, use: Use) -> bool:
    return call.module is use.module and call.key in use.keys


def _laid_out(one: _Call, kind: LayerKind, samples: int) -> CallGradients:
    """Return a call as its kind takes it; the whole batch as one sample if ``samples`` is 1."""
    call, axis = one.call, one.axis
    if samples == 1:
        return replace(call, axis=SampleAxis()), one.apart
    assert axis is not None
    if kind.own_layout or axis == SampleAxis():
        return replace(call, axis=axis), one.gradients
    inputs = axis.samples_first(call.inputs[0], samples)
    gradients = [None if g is None else axis.samples_first(g, samples, 1) for g in one.gradients]
    return replace(call, inputs=(inputs, *call.inputs[1:]), axis=axis), gradients


def _axis_of(one: _Call, reached: Tensor | None, chosen: Tensor) -> SampleAxis | None:
    """Return where the samples of a call lie, from where vectors at chosen samples reach it."""
    kind = one.kind
    if reached is None:
        return SampleAxis()
    if not kind.own_layout or isinstance(kind, GenericKind):
        return find_axis(reached, chosen, kind.sample_dims(reached.dim() - 1))
    laid_out = kind.samples_first(one.call, reached)
    return SampleAxis() if laid_out is None else find_axis(laid_out, chosen, (0,))


def _only_at_parameters(block: Block) -> str | None:
    """Return why the rows of a block are had at its parameters only, or None."""
    if not block.uses:
        return "belongs to no layer of a known kind"
    for use in block.uses:
        if isinstance(use.kind, GenericKind):
            reason = use.kind.cannot_rerun(use.module)
            if reason is not None:
                return reason
    return None


def _flat_rows(layout: BlockLayout, gradients: Sequence[Tensor | None]) -> Tensor | None:
    """Return ``(R, *shape)`` at every parameter of a block as ``(R, P_l)``; zeros for None."""
    known = next((g for g in gradients if g is not None), None)
    if known is None:
        return None
    filled = [
        known.new_zeros(len(known), prod(shape)) if g is None else g.to_dense().reshape(len(g), -1)
        for g, shape in zip(gradients, layout.shapes, strict=True)
    ]
    return torch.cat(filled, 1)


def _magnitude(calls: Sequence[_Call]) -> Tensor | float:
    """Return the size of the terms a gradient sums, which may cancel."""
    total: Tensor | float = 0.0
    for one in calls:
        first = one.call.inputs[0] if one.call.inputs else None
        size = first.norm() if isinstance(first, Tensor) and first.is_floating_point() else 1.0
        for gradient in one.gradients:
            if gradient is not None:
                total = total + gradient.norm().float() * size
    return total


def _same_form(left: BlockLayout, right: BlockLayout) -> bool:
    """Return whether two layouts of one parameter have matrices of the same form."""
    forms = [(item.groups, item.d_out, item.d_augmented, item.transposed) for item in (left, right)]
    return forms[0] == forms[1]


def _joined(pieces: Sequence[Tensor | None]) -> Tensor | None:
    present = [piece for piece in pieces if piece is not None]
    return torch.cat(present) if present else None


def _size(target: GradientEdge | Tensor) -> int:
    return target.numel() if isinstance(target, Tensor) else 0


def _any(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def _finite(tensors: Iterable[Tensor | None]) -> bool:
    sums = [t.detach().float().abs().sum() for t in tensors if t is not None]
    return not sums or bool(torch.isfinite(torch.stack([s.cpu() for s in sums])).all())


def _scaled(gradient: Tensor, scale: float | Tensor) -> Tensor:
    return gradient if isinstance(scale, float) and scale == 1.0 else gradient * scale

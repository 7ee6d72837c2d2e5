"""From gradients at layers' outputs to rows of samples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from math import prod
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from natgrad.capture.hooks import own_backward, without_hooks
from natgrad.capture.kinds import BlockRecord, CallGradients, LayerCall, LayerKind
from natgrad.capture.row_sources import Gradients, RecordedCall, RowSources
from natgrad.capture.samples import SampleAxis
from natgrad.distributed.shards import is_sharded, whole
from natgrad.jacobians import DenseJacobian, Jacobians, LayerJacobian, SumJacobian
from natgrad.layouts import BlockLayout, ParameterLayout

#: Entries of output gradients that are had at once where rows are taken sample by sample, and that
#: a check may take to part every pair of samples (2^22 float32 = 16 MiB).
SPLIT_ELEMENTS = 2**22


class RowBuilder:
    """Turns gradients at the outputs of layers into rows of samples.

    Args:
        sources: What the rows of every block are made of.
        layout: Order of all trainable parameters.
        unrecorded: Context in which layers run without being recorded.
        shards: Whether gradients may be in shards, as in tensor parallelism.
    """

    def __init__(
        self,
        sources: RowSources,
        layout: ParameterLayout,
        unrecorded: Callable[[], AbstractContextManager[Any]],
        shards: bool = False,
    ) -> None:
        self.sources: RowSources = sources
        self.layout: ParameterLayout = layout
        self.unrecorded: Callable[[], AbstractContextManager[Any]] = unrecorded
        self.shards: bool = shards
        self._elements = 0  # Entries that a vector meets on its way through the last pass.

    def pull_back(
        self,
        recorded: Sequence[RecordedCall],
        output: Tensor,
        vectors: Tensor,
        *,
        retain_graph: bool,
        partial: Tensor | None,
        independent: bool,
    ) -> Jacobians:
        """Return the rows of every block the output depends on.

        See :meth:`natgrad.capture.Capture.pull_back`.
        """
        samples, directions = int(output.shape[0]), int(vectors.shape[0])
        self.sources.note_inputs(recorded)
        if samples == 0 or not output.requires_grad:
            return Jacobians(self.layout, {}, samples, directions)
        own = self.sources.by_block([one for one in recorded if one.edges])
        own = {name: of for name, of in own.items() if name not in self.sources.unavailable}
        calls = list(dict.fromkeys(one for of in own.values() for one in of))
        layers = sum(prod(shape) for one in recorded for shape in one.shapes)
        self._elements = max(layers, output.numel())
        self.sources.find_axes(calls, samples)
        coupled = {name for name, of in own.items() if any(one.axis is None for one in of)}
        mixed = list(dict.fromkeys(one for name in coupled for one in own[name]))
        alone = samples > 1 and not independent
        # Rows that a module fails to make are had at its parameters, through the same graph.
        direct = [] if alone else list(self.sources.direct)
        rerun = not own.keys().isdisjoint(self.sources.rerun)
        again = len(self.sources.direct) > len(direct) or rerun
        keep = retain_graph or again or (alone and bool(mixed))
        at_parameters = self._fill(calls, output, vectors, False, keep, self._held(direct))
        if alone:
            self._fill(mixed, output, vectors, True, retain_graph or again)
        rows: dict[str, LayerJacobian | None] = dict.fromkeys(own)
        with self.forming(calls):
            for name, of in own.items():
                if name in self.sources.direct:
                    continue
                try:
                    if name not in coupled:
                        rows[name] = self.block_rows(name, of, samples, partial)
                        continue
                    joint = self._joint_rows(name, of, partial, alone)
                    if joint is not None and alone:
                        rows[name] = joint.parted(samples)
                    elif joint is not None:  # The sum of one sample is its own row.
                        own_row = samples == 1 and not independent
                        rows[name] = joint if own_row else joint.summed_up()
                except Exception as error:
                    self.sources.distrust(name, error)
        rows.update(self._rows_of_parameters(direct, at_parameters, len(output), alone))
        late = [name for name in self.sources.direct if name not in direct]
        if late:
            at_parameters = self.pull(output, self._held(late), vectors, alone, True)
            rows.update(self._rows_of_parameters(late, at_parameters, len(output), alone))
        release(calls)
        present = {name: found for name, found in rows.items() if found is not None}
        return Jacobians(self.layout, present, samples, directions)

    def _fill(
        self,
        calls: Sequence[RecordedCall],
        output: Tensor,
        vectors: Tensor,
        alone: bool,
        retain_graph: bool,
        parameters: Sequence[Tensor] = (),
    ) -> Gradients:
        """Pull vectors back to the outputs of calls; return what arrives at some parameters."""
        targets: list[GradientEdge | Tensor] = [edge for one in calls for edge in one.edges]
        targets += parameters
        found = iter(self.pull(output, targets, vectors, alone, retain_graph))
        sources = self.sources
        for one in calls:
            one.apart = one.spread(found)
            one.gradients = one.gradients if alone else one.apart
        there = [(one.place, g) for one in calls for g in one.apart if g is not None]
        silent = [g.any() for place, g in there if place in sources.silent]
        reached = any(place in sources.unreached for place, _ in there)
        if not alone and (reached or (silent and bool(torch.stack(silent).any()))):
            sources.checked = False  # What their rows are can be found out now.
        return list(found)

    def _held(self, blocks: Iterable[str]) -> list[Tensor]:
        """Return the parameters of some blocks."""
        of = self.sources.blocks
        return [self.sources.parameter(n) for name in blocks for n in of[name].layout.names]

    def _rows_of_parameters(
        self, blocks: Iterable[str], gradients: Gradients, batch: int, alone: bool
    ) -> dict[str, LayerJacobian | None]:
        """Return the rows of blocks from the gradients at their parameters, :meth:`_held`."""
        found, samples = iter(gradients), batch if alone else 1
        result: dict[str, LayerJacobian | None] = {}
        for name in blocks:
            layout = self.sources.blocks[name].layout
            rows = flat_rows(layout, [next(found) for _ in layout.names])
            if rows is None:
                result[name] = None
                continue
            jacobian = DenseJacobian(layout, rows.unflatten(0, (samples, -1)))
            result[name] = jacobian if alone or batch == 1 else jacobian.summed_up()
        return result

    def user_rows(
        self,
        recorded: Sequence[RecordedCall],
        samples: int,
        scale: float | Tensor,
        partial: Tensor | None,
        separate: bool,
    ) -> Jacobians:
        """Return rows (``K = 1``) from the gradients the user's own backward pass left.

        Blocks whose samples are coupled are left out if they must be ``separate``: that pass has
        summed their rows. Otherwise the sum is their only row.
        """
        self.sources.look_at_modes()
        self.sources.note_inputs(recorded)
        unscaled = isinstance(scale, float) and scale == 1.0
        calls = []
        for one in recorded:
            given = one.user_gradients
            if any(g is not None for g in given):
                own = [g if g is None or unscaled else g * scale for g in given]
                one.gradients = [None if g is None else whole(g)[None] for g in own]
                one.apart = one.gradients
                calls.append(one)
        self.sources.find_axes(calls, samples)
        found: dict[str, LayerJacobian] = {}
        with self.forming(calls):
            for name, of in self.sources.by_block(calls).items():
                coupled = any(one.axis is None for one in of)
                if name in self.sources.direct or (coupled and separate):
                    continue
                if coupled:
                    rows = self._joint_rows(name, of, partial)
                else:
                    rows = self.block_rows(name, of, samples, partial)
                if rows is not None:
                    found[name] = rows
        release(calls)
        return Jacobians(self.layout, found, samples, 1)

    def pull(
        self,
        output: Tensor,
        targets: Sequence[GradientEdge | Tensor],
        vectors: Tensor,
        alone: bool,
        retain_graph: bool,
    ) -> Gradients:
        """Return the gradients at some targets, ``(K, ...)``; if ``alone``, ``(N·K, ...)``."""
        if not targets:
            return []
        if not alone:
            found = batched_gradients(output, targets, vectors, retain_graph)
            return self._whole(found) if self.shards else found
        directions, samples = vectors.shape[:2]
        entries = self._elements + sum(t.numel() for t in targets if isinstance(t, Tensor))
        step = max(1, min(samples, SPLIT_ELEMENTS // max(1, directions * entries)))
        pieces = []
        for start in range(0, samples, step):
            numbers = torch.arange(start, min(start + step, samples), device=output.device)
            single = vectors.new_zeros(len(numbers), *vectors.shape)
            chosen = vectors[:, numbers].transpose(0, 1)
            single[torch.arange(len(numbers), device=output.device), :, numbers] = chosen
            keep = retain_graph or start + step < samples
            found = batched_gradients(output, targets, single.flatten(0, 1), keep)
            pieces.append(self._whole(found) if self.shards else found)
        return [joined(column) for column in zip(*pieces, strict=True)]

    def _whole(self, gradients: Gradients) -> Gradients:
        return [None if g is None else whole(g) for g in gradients]

    def _call(self, one: RecordedCall) -> LayerCall:
        """Return a call with whole inputs, which in tensor parallelism were in pieces."""
        values = one.call.inputs, one.call.options
        if self.shards and any(map(is_sharded, torch.utils._pytree.tree_leaves(values))):
            inputs, options = torch.utils._pytree.tree_map_only(Tensor, whole, values)
            one.call = replace(one.call, inputs=inputs, options=options)
        return one.call

    @contextmanager
    def forming(self, calls: Sequence[RecordedCall]) -> Iterator[None]:
        """Let kinds make rows: nothing is recorded, and in the dtype of what they are given."""
        given = (g.device.type for one in calls for g in one.gradients if g is not None)
        with (
            self.unrecorded(),
            torch.no_grad(),
            torch.autocast(next(given, "cpu"), enabled=False),
        ):
            yield

    def _joint_rows(
        self, name: str, calls: Sequence[RecordedCall], partial: Tensor | None, alone: bool = False
    ) -> LayerJacobian | None:
        """Return the rows of a block whose samples are coupled, the batch as one sample.

        That one is partial if there are such samples, unless rows pulled back ``alone`` are to be
        parted.
        """
        if partial is not None and not alone:
            partial = partial.new_ones(1)
        rows = self.block_rows(name, calls, 1, partial)
        return rows.of_ragged() if rows is not None and self.sources.are_ragged(calls) else rows

    def block_rows(
        self, name: str, calls: Sequence[RecordedCall], samples: int, partial: Tensor | None
    ) -> LayerJacobian | None:
        """Return the rows of a block; with 1 as ``samples`` the batch counts as one sample."""
        block = self.sources.blocks[name]
        records: dict[tuple[LayerKind, BlockLayout], BlockRecord] = {}
        uses = self.sources.uses[name]
        for use in uses:
            own = [
                _laid_out(one, self._call(one), use.kind, samples)
                for one in calls
                if one.is_of(use) and any(g is not None for g in one.gradients)
            ]
            if own:
                # Layers of one kind that share a parameter are calls of one layer.
                empty = BlockRecord(use.layout, use.names, [], samples, partial)
                records.setdefault((use.kind, use.layout), empty).calls.extend(own)
        parts = [kind.jacobian(record) for (kind, _), record in records.items()]
        if not parts:
            return None
        if name in self.sources.by_products and block.layout.is_dense:
            flat = [part.layout.flat(part.per_sample_gradients()) for part in parts]
            return DenseJacobian(block.layout, functools.reduce(Tensor.add, flat))
        if len(parts) == 1 and (len(uses) == 1 or _same_form(parts[0].layout, block.layout)):
            return parts[0]
        return SumJacobian(parts, block.layout)


def release(calls: Sequence[RecordedCall]) -> None:
    """Let go of the gradients that rows were made of."""
    for one in calls:
        one.gradients, one.apart = [], []


def _laid_out(one: RecordedCall, call: LayerCall, kind: LayerKind, samples: int) -> CallGradients:
    """Return a call as its kind takes it; the whole batch as one sample if ``samples`` is 1."""
    axis = one.axis
    if samples == 1:
        return replace(call, axis=SampleAxis()), one.apart
    assert axis is not None
    if kind.own_layout or axis == SampleAxis():
        return replace(call, axis=axis), one.gradients
    inputs = axis.samples_first(call.inputs[0], samples)
    gradients = [None if g is None else axis.samples_first(g, samples, 1) for g in one.gradients]
    return replace(call, inputs=(inputs, *call.inputs[1:]), axis=axis), gradients


def flat_rows(layout: BlockLayout, gradients: Sequence[Tensor | None]) -> Tensor | None:
    """Return ``(R, *shape)`` at every parameter of a block as ``(R, P_l)``; zeros for None."""
    known = next((g for g in gradients if g is not None), None)
    if known is None:
        return None
    filled = [
        known.new_zeros(len(known), prod(shape)) if g is None else g.to_dense().reshape(len(g), -1)
        for g, shape in zip(gradients, layout.shapes, strict=True)
    ]
    return torch.cat(filled, 1)


def _same_form(left: BlockLayout, right: BlockLayout) -> bool:
    """Return whether two layouts of one parameter have matrices of the same form."""
    forms = [(item.groups, item.d_out, item.d_augmented, item.transposed) for item in (left, right)]
    return forms[0] == forms[1]


def joined(pieces: Sequence[Tensor | None]) -> Tensor | None:
    """Return those of the pieces that are there as one; None if none is."""
    present = [piece for piece in pieces if piece is not None]
    return torch.cat(present) if present else None


class RowsUnavailable(RuntimeError):
    """Vectors cannot be pulled back through a pass; the message says why and what to do."""


def batched_gradients(
    output: Tensor,
    targets: Sequence[GradientEdge | Tensor],
    vectors: Tensor,
    retain_graph: bool,
    *,
    fixed_statistics: bool = True,
) -> list[Tensor | None]:
    """Return the gradient at every edge or tensor for every vector, stacked over vectors.

    Args:
        output: What vectors are pulled back from.
        targets: Where the gradients are wanted.
        vectors: ``(K, *output.shape)``.
        retain_graph: Keep the graph for a later backward pass.
        fixed_statistics: Whether batch norms take their statistics for constants.

    Raises:
        RowsUnavailable: If the graph allows the loss's own backward pass only.
    """

    def backward(cotangent: Tensor, batched: bool, keep: bool) -> tuple[Tensor | None, ...]:
        try:
            with (
                without_hooks(targets),
                own_backward(output, fixed_statistics=fixed_statistics) as root,
                torch.enable_grad(),
            ):
                # As a factor where it is alone: torch loads sympy to check the shape of a vector.
                return torch.autograd.grad(
                    [root if batched else (root * cotangent).sum()],
                    cast("Sequence[Tensor]", targets),
                    [cotangent if batched else None],
                    retain_graph=keep,
                    allow_unused=True,
                    is_grads_batched=batched,
                )
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise RowsUnavailable(
                "gradient checkpointing with use_reentrant=True lets no vectors through but the "
                "loss's own: use torch.utils.checkpoint with use_reentrant=False"
            ) from error

    if vectors.shape[0] == 1:
        single = backward(vectors[0], False, retain_graph)
        return [None if g is None else g.unsqueeze(0) for g in single]
    try:
        # The graph is kept, as one function that cannot be batched may come after others.
        return list(backward(vectors, True, True))
    except RuntimeError as error:
        said = str(error).lower()
        if not any(one in said for one in ("vmap", "batching rule", "have storage", "sparse")):
            raise
    # Some backward functions cannot be batched: one vector at a time.
    last = vectors.shape[0] - 1
    each = [backward(v, False, retain_graph or i < last) for i, v in enumerate(vectors)]
    return [
        None if column[0] is None else torch.stack(cast("list[Tensor]", list(column)))
        for column in zip(*each, strict=True)
    ]

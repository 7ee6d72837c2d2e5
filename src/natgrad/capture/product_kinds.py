"""Products of inputs with bare parameters, as kinds of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from natgrad.capture.blocks import Block, Use
from natgrad.capture.convolution import ConvolutionKind
from natgrad.capture.embedding import EmbeddingKind
from natgrad.capture.generic import GenericKind, free_layout
from natgrad.capture.kinds import (
    BlockRecord,
    LayerCall,
    LayerKind,
    fold_gradients,
    fold_inputs,
    parameter_shapes,
)
from natgrad.capture.linear import LinearKind, TransposedLinearKind
from natgrad.jacobians import DenseJacobian, LayerJacobian, StackedJacobian
from natgrad.layouts import BlockLayout

#: Kinds of layers whose parameters are also looked for outside the calls of their modules.
_WATCHED_KINDS = (
    LinearKind, TransposedLinearKind, ConvolutionKind, EmbeddingKind, GenericKind,
)  # fmt: skip


@dataclass(frozen=True)
class ProductKind(LayerKind):
    """``y = x Wᵀ + b`` of a matrix, of a part of one, or of one of a stack of matrices.

    Attributes:
        turned: It is ``y = x W + b``.
        biased: Whether the bias of the block is added.
        over: What is multiplied at once: ``"matrix"``, one matrix; ``"folded"``, a parameter of
            three dimensions as the matrix of its first by the others; ``"stack"``, every matrix of
            a stack with its own inputs; ``"routed"``, every matrix with as many of the inputs as it
            is told.
        apart: Dimensions of the output, counted from its end, that hold features or the stack.
    """

    turned: bool = False
    biased: bool = False
    over: str = "matrix"
    apart: tuple[int, ...] = field(default=(-1,), compare=False)

    def sample_dims(self, dims: int) -> Sequence[int]:
        """Return all but those apart; where samples are routed none."""
        return [d for d in range(dims) if d - dims not in self.apart and self.over != "routed"]

    def key_of(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return what marks such products with a parameter."""
        return (f"{names[0]}: {self.turned}, {self.biased}, {self.over}",)

    def layout(
        self, module: nn.Module, names: tuple[str, ...], qualified: tuple[str, ...]
    ) -> BlockLayout:
        """Return one group per matrix of the stack."""
        shapes = parameter_shapes(module, names)
        *stack, rows, columns = shapes[0]
        if self.over == "folded":
            stack, rows, columns = [], shapes[0][0], prod(shapes[0][1:])
        d_out, d_in = (columns, rows) if self.turned else (rows, columns)
        has_bias = len(names) > 1
        return BlockLayout(qualified, shapes, prod(stack), d_out, d_in, True, has_bias, self.turned)

    def jacobian(self, block: BlockRecord) -> LayerJacobian:
        """Form rows; products with a part of a matrix are padded with zeros."""
        pieces: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for call, delta in block.single_outputs():
            for group, inputs, gradients in self._by_matrix(call, delta, block.samples):
                a = fold_inputs(inputs, block.samples, inputs.shape[-1])
                d = fold_gradients(gradients, block.samples, gradients.shape[-1])
                row, column = call.options["corner"]
                before_a, before_d = (row, column) if self.turned else (column, row)
                a = _padded(a, before_a, block.layout.d_in)
                d = _padded(d, before_d, block.layout.d_out)
                pieces.setdefault(group, []).append((a, d))
        bias_value = float(self.biased)
        if block.layout.groups == 1:
            return block.linear(
                [(a.unsqueeze(2), d.unsqueeze(3)) for a, d in pieces[0]], bias_value
            )
        return StackedJacobian.of_matrices(block.layout, pieces, partial=block.partial)

    def _by_matrix(
        self, call: LayerCall, delta: Tensor, samples: int
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield which matrix of the stack was multiplied, its inputs and output gradients."""
        inputs, delta = call.inputs[0], delta.flatten(-call.options["outputs"])
        if self.over == "routed":
            ends = call.options["ends"].tolist()
            for group, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
                if end > start:
                    yield group, inputs[start:end], delta[:, start:end]
            return
        # Features last, and the stack before them, wherever bringing samples to the front put them.
        moved = call.axis.dim if samples > 1 else 0
        places = [inputs.dim() + place for place in call.options["apart"]]
        places = [place + (place < moved) for place in places]
        last = tuple(range(-len(places), 0))
        inputs = inputs.movedim(tuple(places), last)
        delta = delta.movedim(tuple(place + 1 for place in places), last)
        if self.over == "stack":
            for group in range(inputs.shape[-2]):
                yield group, inputs[..., group, :], delta[..., group, :]
        else:
            yield call.options["group"], inputs, delta


@dataclass(frozen=True)
class AddedKind(LayerKind):
    """``y = … + b``, the bias of a product or of whatever else; rows are dense."""

    def sample_dims(self, dims: int) -> range:
        """Return all but the last."""
        return range(dims - 1)

    def key_of(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return what marks additions of a parameter."""
        return (f"{names[0]}: added",)

    def layout(
        self, module: nn.Module, names: tuple[str, ...], qualified: tuple[str, ...]
    ) -> BlockLayout:
        """Return that of a parameter whose use is not known."""
        return free_layout(qualified, parameter_shapes(module, names))

    def jacobian(self, block: BlockRecord) -> LayerJacobian:
        """Sum output gradients over positions."""
        total: Tensor | None = None
        for call, delta in block.single_outputs():
            d = fold_gradients(delta, block.samples, delta.shape[-1]).sum(2)
            d = _padded(d, call.options["start"], block.layout.numel)
            total = d if total is None else total + d
        assert total is not None
        return DenseJacobian(block.layout, total)


@dataclass(frozen=True)
class PickedKind(EmbeddingKind):
    """Rows of a matrix picked by numbers, as of a table of embeddings."""

    def padding(self, module: nn.Module) -> int | None:
        """Return None: every row counts."""
        return None

    def key_of(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return what marks rows picked of a parameter."""
        return (f"{names[0]}: picked",)

    def layout(
        self, module: nn.Module, names: tuple[str, ...], qualified: tuple[str, ...]
    ) -> BlockLayout:
        """Return ``d × V``, stored transposed."""
        shapes = parameter_shapes(module, names)
        return BlockLayout(
            qualified, shapes, 1, shapes[0][1], shapes[0][0], True, False, True, True
        )


@dataclass(frozen=True)
class ConvolvedKind(ConvolutionKind):
    """A convolution with the kernels of a layer, outside of its calls."""

    def key_of(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return what marks convolutions with a parameter."""
        return (f"{names[0]}: convolved",)


_PRODUCTS = [
    ProductKind(turned, biased, over)
    for over in ("matrix", "folded", "stack", "routed")
    for turned in (False, True)
    for biased in (False, True)
]


def is_product(kind: LayerKind) -> bool:
    """Return whether a kind is one of those of this file."""
    return isinstance(kind, (ProductKind, AddedKind, PickedKind, ConvolvedKind))


@dataclass(frozen=True, eq=False)
class WatchedParameter:
    """A parameter whose products are looked for.

    Attributes:
        block: Its block's name.
        module: The module that holds it.
        names: The block's parameters, by their names within the module, this one first.
        uses: All products it may take part in.
        free: Whether it stands in no formula of a layer.
    """

    block: str
    module: nn.Module
    names: tuple[str, ...]
    uses: tuple[Use, ...]
    free: bool

    @property
    def parameter(self) -> Tensor:
        """The parameter as it is now: in shards, or whole as a pass has it."""
        found: Tensor = getattr(self.module, self.names[0])
        return found

    @property
    def bias(self) -> Tensor | None:
        """The bias of the same block, if there is one, likewise."""
        return getattr(self.module, self.names[1]) if len(self.names) > 1 else None


def watched_parameters(model: nn.Module, blocks: Mapping[str, Block]) -> list[WatchedParameter]:
    """Return the parameters whose products would be rows of their blocks.

    Those are weights of linear layers, convolutions and embeddings, which may be used elsewhere,
    too, and parameters of modules of unknown kind.
    """
    holders = {
        p: (module, local)
        for module in reversed(list(model.modules()))
        for local, p in module._parameters.items()
        if p is not None
    }
    named = dict(model.named_parameters())
    found = []
    for name, block in blocks.items():
        layout = block.layout
        if not all(isinstance(use.kind, _WATCHED_KINDS) for use in block.uses):
            continue
        known = not all(isinstance(use.kind, GenericKind) for use in block.uses)
        weight = named[layout.names[0]]
        held = [holders[named[n]] for n in layout.names]
        module, names = held[0][0], tuple(local for _, local in held)
        if any(holder is not module for holder, _ in held) or not weight.is_contiguous():
            continue
        if isinstance(module, torch.jit.ScriptModule):  # Nothing inside is seen.
            continue
        kinds: list[LayerKind] = []
        shapes = layout.shapes
        if layout.has_weight and {type(use.kind) for use in block.uses} == {ConvolutionKind}:
            kinds.append(ConvolvedKind())
        joint = len(shapes) == 2 and len(shapes[0]) == 2 and shapes[1] == shapes[0][:1]
        if joint:  # A bias is a column of the matrix, which is not used the other way round.
            kinds += [k for k in _PRODUCTS if k.over == "matrix" and not k.turned]
        elif known and layout.has_weight and len(shapes[0]) == 2:
            kinds += [k for k in _PRODUCTS if k.over == "matrix" and not k.biased]
            kinds += [PickedKind()]
        elif not known and len(names) == 1:
            kinds += [AddedKind()] if weight.dim() <= 2 else []
            if 2 <= weight.dim() <= 3:
                flat = layout.groups == 1 and not layout.is_dense
                overs = ("folded",) if flat else ("matrix", "folded", "stack", "routed")
                overs = ("matrix",) if weight.dim() == 2 else overs
                kinds += [k for k in _PRODUCTS if k.over in overs and not k.biased]
                kinds += [PickedKind()] if weight.dim() == 2 else []
        uses = tuple(
            Use(module, k, names, k.key_of(names), k.layout(module, names, layout.names))
            for k in kinds
        )
        if uses:
            found.append(WatchedParameter(name, module, names, uses, not known))
    return found


def _padded(tensor: Tensor, before: int, size: int) -> Tensor:
    """Return a tensor with zeros around its last dimension."""
    missing = size - before - tensor.shape[-1]
    return functional.pad(tensor, (before, missing)) if before or missing else tensor

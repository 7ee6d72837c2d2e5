"""Products of inputs with bare parameters, which no hook of a layer sees.

``x @ self.weight``, ``F.linear(h, table.weight)`` and experts whose matrices are stacked in one
parameter are linear maps like any other. While a pass runs, a function mode finds them: an operand
that shares its memory with a parameter is the parameter, a part of it, or its transpose, and where
it begins and its strides say which.
"""

from __future__ import annotations

import string
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from natgrad.capture.convolution import convolution_like
from natgrad.capture.kinds import LayerCall, LayerKind, dense, is_data, is_parameter, sparsity
from natgrad.capture.product_kinds import (
    AddedKind,
    ConvolvedKind,
    PickedKind,
    ProductKind,
    WatchedParameter,
)
from natgrad.distributed.shards import is_sharded

#: How many nodes of the graph are looked at behind an operand.
MOST_NODES = 24

#: Parts of the names of nodes behind which entries are mixed.
_MIXING = ("mm", "Mm", "Linear", "Convolution", "Embedding", "Index", "Gather", "Sum", "Norm",
           "Mean", "View", "T0", "Transpose", "Permute", "Mv", "Einsum", "Softmax")  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """Which part of a parameter an operand is: of which matrix of its stack, from where on."""

    watched: WatchedParameter
    transposed: bool
    group: int
    row: int
    column: int
    whole: bool  # The whole stack.


class RecordProducts(TorchFunctionMode):
    """Record products with parameters while it is entered.

    Args:
        watched: The parameters.
        record: Receives a kind and a call per product.

    Attributes:
        watched: Where in memory a parameter begins → the parameter.
        sharded: Parameters that have no place yet, whole only while their layers run.
    """

    def __init__(
        self, watched: Iterable[WatchedParameter], record: Callable[[LayerKind, LayerCall], None]
    ) -> None:
        super().__init__()
        self.record = record
        found = [(_address(one.parameter), one) for one in watched]
        # Parameters in one piece of memory cannot be told apart.
        number = Counter(address for address, _ in found)
        self.watched: dict[int, WatchedParameter] = {
            address: one
            for address, one in found
            if address and number[address] == 1 and not is_sharded(one.parameter)
        }
        self.sharded: list[WatchedParameter] = [
            one for _, one in found if is_sharded(one.parameter)
        ]
        self._free_shapes: set[torch.Size] = {
            one.parameter.shape for one in [*self.watched.values(), *self.sharded] if one.free
        }

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function, and record what it multiplied."""
        if torch.compiler.is_compiling():  # Code compiled on its own stays as it is.
            return func(*args, **(kwargs or {}))
        output = func(*args, **(kwargs or {}))
        found = _LOOKS.get(getattr(func, "__name__", ""))
        if found is None or not isinstance(output, Tensor) or output.is_nested:
            return output
        if output.requires_grad and not output.is_complex():  # Of complex ones no row is formed.
            found.look(self, output, found.given(args, kwargs or {}))
        return output

    def _multiplied(
        self,
        output: Tensor,
        inputs: Any,
        weight: Any,
        bias: Any,
        by_rows: bool,
        *,
        ends: Tensor | None = None,
        features: int = -1,
    ) -> bool:
        """Look at ``x wᵀ + b`` (``by_rows``) or ``x w + b``, and return whether w is a parameter.

        Inputs of every matrix of a stack end at ``ends``; ``features`` is -1 or, of ``w x``, -2.
        """
        place, added = self._place(weight), False
        if place is not None and isinstance(inputs, Tensor) and inputs.dim() >= -features:
            added = bias is not None and bias is place.watched.bias
            over = "routed" if ends is not None else "stack" if place.whole else "matrix"
            if over == "stack":
                inputs = inputs.expand(*output.shape[:-2], *inputs.shape[-2:])
            if over != "stack" or output.dim() > 2:  # Less where the input is a vector.
                apart = (-3, features) if over == "stack" else (features,)
                kind = ProductKind(place.transposed == by_rows, added, over, apart)
                self._record_product(place, kind, inputs, output, ends=ends)
        if bias is not None and not added:
            self._added(output, bias)
        return place is not None

    def _record_product(
        self,
        place: _Place,
        kind: ProductKind,
        inputs: Tensor,
        output: Tensor,
        *,
        ends: Tensor | None = None,
        outputs: int = 1,
    ) -> None:
        options = {
            "group": place.group,
            "corner": (place.row, place.column),
            "ends": None if ends is None else ends.detach(),
            "apart": kind.apart,
            "outputs": outputs,  # How many dimensions at the end of the output hold features.
        }
        self._recorded(place.watched, kind, inputs, output, options)

    def _contracted(self, output: Tensor, equation: str, inputs: Any, weight: Any) -> bool:
        """Look at a contraction by Einstein's convention, and return whether it is a product."""
        place = self._place(weight)
        if place is None or not isinstance(inputs, Tensor) or place.transposed:
            return False
        terms = contraction(equation, inputs.dim(), weight.dim())
        letter = equation.partition(",")[2].strip()[:1]
        if terms is None and weight.dim() == 3 and letter not in equation.partition(",")[0]:
            # Every matrix of a stack may be given the same inputs.
            inputs = inputs.expand(len(weight), *inputs.shape)
            terms = contraction(letter + equation, inputs.dim(), weight.dim())
        if terms is None or weight.shape != place.watched.parameter.shape:
            return False
        kind = ProductKind(not terms.by_rows, False, terms.over, terms.apart)
        laid_out = inputs.permute(terms.order)
        first = inputs.dim() + terms.apart[-1] - (terms.inner - 1)
        laid_out = laid_out.flatten(first, first + terms.inner - 1)
        self._record_product(place, kind, laid_out, output, outputs=terms.outer)
        return True

    def _added(self, output: Tensor, bias: Any) -> None:
        """Look at ``… + b``."""
        if isinstance(bias, Tensor) and bias.dim() == 1 and len(bias) == output.shape[-1]:
            watched = self._of(bias)
            if watched is not None and bias.is_contiguous():
                start = bias.storage_offset() - watched.parameter.storage_offset()
                options = {"start": start}
                nothing = output.new_zeros(()).expand(output.shape)  # Laid out as samples are.
                self._recorded(watched, AddedKind(), nothing, output, options)

    def _picked(self, output: Tensor, weight: Any, numbers: Any) -> None:
        """Look at rows picked of a matrix."""
        integer = isinstance(numbers, Tensor) and numbers.dtype in (torch.int64, torch.int32)
        watched = self._of(weight) if integer else None
        if watched is not None and weight.shape == watched.parameter.shape:
            self._recorded(watched, PickedKind(), numbers, output, {})

    def _recorded(
        self,
        watched: WatchedParameter,
        kind: LayerKind,
        inputs: Tensor,
        output: Tensor,
        options: dict[str, Any],
    ) -> None:
        (key,) = kind.key_of(watched.names)
        if any(use.keys == (key,) for use in watched.uses):
            own, options = dense(inputs), options | sparsity(inputs)
            if self.sharded and is_parameter(inputs):  # Without memory after the pass.
                own = own.clone()
            of_data = is_data(inputs)
            call = LayerCall(watched.module, key, (own,), (output,), options, of_data=of_data)
            self.record(kind, call)

    def _of(self, operand: Any) -> WatchedParameter | None:
        """Return the parameter that an operand is or is a view of."""
        if not isinstance(operand, Tensor) or not operand.requires_grad or not operand.dim():
            return None
        return self._at(_address(operand))

    def _at(self, address: int) -> WatchedParameter | None:
        """Return the parameter that begins somewhere in memory."""
        found = self.watched.get(address)
        if found is None and self.sharded and address:
            present = ((one, one.parameter) for one in self.sharded)
            whole = (one for one, p in present if not is_sharded(p) and _address(p) == address)
            found = next(whole, None)
        return found

    def _behind(self, operand: Any) -> WatchedParameter | None:
        """Return the parameter of no known layer that an operand is made of, entry by entry."""
        if not isinstance(operand, Tensor) or operand.grad_fn is None or operand.dim() < 2:
            return None
        if operand.shape not in self._free_shapes:
            return None
        waiting, number = deque([operand.grad_fn]), 0
        while waiting and number < MOST_NODES:
            node, number = waiting.popleft(), number + 1
            if any(part in node.name() for part in _MIXING):
                return None
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, Tensor) and leaf.shape == operand.shape:
                found = self._at(_address(leaf))
                if found is not None and found.free:
                    return found
            waiting.extend(one for one, _ in node.next_functions if one is not None)
        return None

    def _place(self, operand: Any) -> _Place | None:
        """Return which part of a parameter an operand is, or that it is made of one entry by entry.

        A weight that is quantised, binarised or drawn around a parameter often has its gradient
        (straight-through estimators, noise). Whether it does is checked with the rows.
        """
        watched = self._of(operand)
        if watched is None:
            watched = self._behind(operand)
            return None if watched is None else _Place(watched, False, 0, 0, 0, operand.dim() == 3)
        if operand.dim() < 2 or watched.parameter.dim() < 2:
            return None
        parameter = watched.parameter
        rows, columns = parameter.shape[-2:]
        offset = operand.storage_offset() - parameter.storage_offset()
        for transposed in (False, True):
            stored = operand.mT if transposed else operand
            if stored.dim() == 3:
                if stored.shape == parameter.shape and stored.stride() == parameter.stride():
                    return _Place(watched, transposed, 0, 0, 0, True)
                continue
            if stored.dim() == 2 and stored.stride() == parameter.stride()[-2:]:
                group, inside = divmod(offset, rows * columns)
                row, column = divmod(inside, columns)
                if row + stored.shape[0] <= rows and column + stored.shape[1] <= columns:
                    return _Place(watched, transposed, group, row, column, False)
        return None


def _address(tensor: Tensor) -> int:
    """Return where a tensor's memory begins; 0 for tensors that have none of their own."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # Sparse, fake and other strange tensors.
        return 0


_Given = Mapping[str, Any]


def _linear(mode: RecordProducts, output: Tensor, given: _Given) -> None:
    mode._multiplied(output, given.get("x"), given.get("w"), given.get("b"), True)


def _product(mode: RecordProducts, output: Tensor, given: _Given) -> None:
    if given.get("beta", 1) == given.get("alpha", 1) == 1:
        left, right = given.get("x"), given.get("w")
        if not mode._multiplied(output, left, right, given.get("b"), False):
            mode._multiplied(output, right, left, None, True, features=-2)


def _einsum(mode: RecordProducts, output: Tensor, given: _Given) -> None:
    equation, left, right = (given.get(name) for name in ("equation", "x", "w"))
    if isinstance(equation, str) and not mode._contracted(output, equation, left, right):
        inputs, _, result = equation.partition("->")
        turned = ",".join(reversed(inputs.split(",")))
        mode._contracted(output, f"{turned}->{result}", right, left)


def _routed(mode: RecordProducts, output: Tensor, given: _Given) -> None:
    inputs, ends = given.get("x"), given.get("offs")
    if isinstance(ends, Tensor) and isinstance(inputs, Tensor) and inputs.dim() == 2:
        mode._multiplied(output, inputs, given.get("w"), None, False, ends=ends)


def _sum(mode: RecordProducts, output: Tensor, given: _Given) -> None:
    if given.get("alpha", 1) == 1:
        for one in (given.get("x"), given.get("b")):
            mode._added(output, one)


def _embedding(mode: RecordProducts, output: Tensor, given: _Given) -> None:
    special = ("max_norm", "scale_grad_by_freq", "sparse")
    if given.get("padding_idx") is None and not any(map(given.get, special)):
        mode._picked(output, given.get("w"), given.get("numbers"))


def _item(mode: RecordProducts, output: Tensor, given: _Given) -> None:
    table, numbers = given.get("w"), given.get("numbers")
    # Activations are indexed, too: nothing is computed for them.
    if mode._of(table) is not None and isinstance(numbers, Tensor) and numbers.dtype != torch.bool:
        assert isinstance(table, Tensor)
        mode._picked(output, table, torch.where(numbers < 0, numbers + len(table), numbers))


def _convolution(mode: RecordProducts, output: Tensor, given: _Given) -> None:
    weight, inputs = given.get("w"), given.get("x")
    watched = mode._of(weight)
    if watched is not None and isinstance(inputs, Tensor) and isinstance(weight, Tensor):
        bias = getattr(watched.module, "bias", None)
        if weight.shape == watched.parameter.shape and given.get("b") is bias:
            steps = {name: given[name] for name in _STEPS.split() if name in given}
            options = {"convolution": convolution_like(weight, **steps)}
            mode._recorded(watched, ConvolvedKind(), inputs, output, options)


@dataclass(frozen=True)
class _Look:
    """What is looked at of a function.

    Attributes:
        look: Looks at the output and at the arguments by their parts.
        names: The function's arguments in order.
        parts: Their parts: x and w are multiplied, b is added.
    """

    look: Callable[[RecordProducts, Tensor, _Given], None]
    names: str
    parts: str

    def given(self, args: tuple[Any, ...], kwargs: _Given) -> dict[str, Any]:
        """Return part → argument."""
        parts = self.parts.split()
        part_of = dict(zip(self.names.split(), parts, strict=True))
        named = {part_of.get(name, name): value for name, value in kwargs.items()}
        return dict(zip(parts, args, strict=False)) | named


_ROUTED = _Look(_routed, "mat_a mat_b offs", "x w offs")
_OPTIONS = "padding_idx max_norm norm_type scale_grad_by_freq sparse"
_STEPS = "stride padding dilation groups"
_CONVOLVED = _Look(_convolution, f"input weight bias {_STEPS}", f"x w b {_STEPS}")
_LOOKS = {
    "linear": _Look(_linear, "input weight bias", "x w b"),
    "matmul": _Look(_product, "input other", "x w"),
    "__rmatmul__": _Look(_product, "self other", "w x"),
    "mm": _Look(_product, "input mat2", "x w"),
    "spmm": _Look(_product, "input mat2", "x w"),
    "_sparse_mm": _Look(_product, "mat1 mat2", "x w"),
    "bmm": _Look(_product, "input mat2", "x w"),
    "addmm": _Look(_product, "input mat1 mat2", "b x w"),
    "baddbmm": _Look(_product, "input batch1 batch2", "b x w"),
    "_grouped_mm": _ROUTED,
    "grouped_mm_fallback": _ROUTED,
    "einsum": _Look(_einsum, "equation left right", "equation x w"),
    "add": _Look(_sum, "input other", "x b"),
    "add_": _Look(_sum, "input other", "x b"),
    "embedding": _Look(_embedding, f"input weight {_OPTIONS}", f"numbers w {_OPTIONS}"),
    "conv1d": _CONVOLVED,
    "conv2d": _CONVOLVED,
    "conv3d": _CONVOLVED,
    "__getitem__": _Look(_item, "self index", "w numbers"),
}


@dataclass(frozen=True)
class Contraction:
    """How ``y = einsum(equation, x, W)`` is a product ``x Wᵀ`` or ``x W``.

    Attributes:
        by_rows: Whether W begins with the features of the output: ``x Wᵀ``.
        over: ``"matrix"``, ``"folded"`` or ``"stack"``, as of
            :class:`natgrad.capture.product_kinds.ProductKind`.
        order: Dimensions of x in the order of those of y, its features where y has those of the
            output.
        inner: How many dimensions features of the input are.
        outer: How many dimensions features of the output are; more than one stand last in y.
        apart: Where y has the stack, if there is one, and the features, counted from the end, all
            features as one dimension.
    """

    by_rows: bool
    over: str
    order: tuple[int, ...]
    inner: int
    outer: int
    apart: tuple[int, ...]


def contraction(equation: str, input_dims: int, weight_dims: int) -> Contraction | None:
    """Return how an Einstein sum ``"x indices, W indices -> y indices"`` is a product, if it is."""
    left, arrow, y = equation.replace(" ", "").partition("->")
    x, comma, w = left.partition(",")
    rest = input_dims - len(x.replace("...", ""))
    unused = [c for c in string.ascii_letters if c not in equation][: max(0, rest)]
    x, y = (text.replace("...", "".join(unused)) for text in (x, y))
    if not arrow or not comma or not (x + w + y).isalpha():
        return None
    if any(len(set(text)) < len(text) for text in (x, w, y)):
        return None
    if len(x) != input_dims or len(w) != weight_dims:
        return None
    stack = [c for c in w if c in x and c in y]
    inner = [c for c in w if c in x and c not in y]
    outer = [c for c in w if c in y and c not in x]
    free = [c for c in y if c not in w]
    if (
        not inner
        or not outer
        or set(x) != {*stack, *inner, *free}
        or set(w) != {*stack, *inner, *outer}
    ):
        return None
    by_rows = [*w] == [*stack, *outer, *inner]
    if not by_rows and [*w] != [*stack, *inner, *outer]:
        return None
    first = outer if by_rows else inner
    if len(stack) > 1 or len(first) > 1 or (stack and weight_dims != 3):
        return None
    over = "stack" if stack else "matrix" if weight_dims == 2 else "folded"
    if len(outer) > 1 and [*y][-len(outer) :] != outer:
        return None
    letters = [c for c in y if c not in outer[1:]]
    order = [d for c in letters for d in (inner if c == outer[0] else [c])]
    apart = tuple(letters.index(c) - len(letters) for c in (*stack, outer[0]))
    return Contraction(
        by_rows, over, tuple(x.index(c) for c in order), len(inner), len(outer), apart
    )

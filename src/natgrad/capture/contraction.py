"""Einstein sums that are products with a matrix, or with every matrix of a stack."""

from __future__ import annotations

import string
from dataclasses import dataclass


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
    """Return how an Einstein sum of inputs and a parameter is a product; None where it is none.

    Args:
        equation: ``"x indices, W indices -> y indices"``, as of :func:`torch.einsum`.
        input_dims: Number of dimensions of x.
        weight_dims: That of W, 2 or 3.
    """
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

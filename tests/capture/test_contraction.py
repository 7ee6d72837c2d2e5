"""Einstein sums as products, against torch.einsum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from natgrad.capture.products import contraction
from tests.cases import normal

SIZES = dict(zip("gabijklm", (2, 3, 4, 5, 2, 3, 2, 4), strict=True))


@st.composite
def equations(draw: st.DrawFn) -> str:
    """Return equations of x and a parameter with letters of four roles, in any order."""
    stack = draw(st.sampled_from(["", "g"]))
    inner, outer = draw(st.sampled_from([("i", "k"), ("ij", "k"), ("i", "kl")]))
    if stack and len(inner + outer) > 2:
        stack = ""
    free = draw(st.sampled_from(["a", "ab"]))
    x = draw(st.permutations([*stack, *inner, *free]))
    w = draw(st.sampled_from([stack + inner + outer, stack + outer + inner]))
    y = draw(st.permutations([*stack, outer, *free]))
    return f"{''.join(x)},{w}->{''.join(y)}"


@given(equations())
def test_an_einstein_sum_is_the_product_that_it_is_said_to_be(equation):
    x_letters, _, rest = equation.partition(",")
    w_letters, _, y_letters = rest.partition("->")
    x = normal(*(SIZES[c] for c in x_letters))
    w = normal(*(SIZES[c] for c in w_letters), seed=1)
    found = contraction(equation, x.dim(), w.dim())
    several = len(w_letters) == 3 and "g" not in w_letters
    if found is None:  # Features of several dimensions must stand last, and come second in W.
        assert several
        return
    laid_out = x.permute(found.order)
    dims = x.dim() - found.inner + 1
    place = dims + found.apart[-1]
    laid_out = laid_out.flatten(place, place + found.inner - 1)
    features = laid_out.movedim(found.apart, tuple(range(-len(found.apart), 0)))
    y = torch.einsum(equation, x, w).flatten(-found.outer)
    y = y.movedim(found.apart, tuple(range(-len(found.apart), 0)))
    if found.over == "stack":
        matrices = w.mT if found.by_rows else w
        product = torch.einsum("...gi,gio->...go", features, matrices)
    else:
        matrix = w.flatten(1)
        product = features @ (matrix.T if found.by_rows else matrix)
    torch.testing.assert_close(product, y)


@pytest.mark.parametrize(
    ("equation", "dims"),
    [
        ("ni,oi->ni", (2, 2)),
        ("ii,oi->o", (2, 2)),
        ("ni,oi", (2, 2)),
        ("ni,nio->o", (2, 3)),
        ("nij,oi->no", (3, 2)),
        ("ni,oi->no", (3, 2)),
        ("ni,hoi->nho", (2, 3)),
        ("ni,->ni", (2, 2)),
    ],
)
def test_what_is_no_product_with_a_matrix(equation, dims):
    assert contraction(equation, *dims) is None


def test_an_ellipsis_stands_for_what_is_left():
    found, spelled = contraction("...i,oi->...o", 4, 2), contraction("abci,oi->abco", 4, 2)
    assert found == spelled
    assert found is not None
    assert found.order == (0, 1, 2, 3)

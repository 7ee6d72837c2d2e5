"""Embeddings in every mode: bags of tokens, sparse gradients, bounded norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad import Capture, fisher_matrix
from natgrad.curvature import STRUCTURES
from tests import dense
from tests.cases import generator, normal


class Bags(nn.Module):
    """A linear classifier of bags of tokens; each sample has some bags."""

    def __init__(self, bags: int = 1, **options: Any) -> None:
        super().__init__()
        self.bags = bags
        self.table = nn.EmbeddingBag(7, 3, **options)
        self.head = nn.Linear(3 * bags, 2)

    def forward(self, *inputs: Any, **more: Any) -> Tensor:
        return self.head(torch.tanh(self.table(*inputs, **more)).reshape(-1, 3 * self.bags))


def expected(model: nn.Module, inputs: tuple[Any, ...], structure: str = "full") -> Tensor:
    """Return the Fisher matrix of a Gaussian likelihood by one backward pass per output."""
    _, jacobian = dense.jacobian(model, inputs)
    rows = jacobian.flatten(0, 1)
    full = rows.T @ rows / len(jacobian)
    if structure == "full":
        return full
    blocks, start = [], 0
    for size in (model.table.weight.numel(), sum(p.numel() for p in model.head.parameters())):
        blocks.append(torch.arange(start, start + size))
        start += size
    return dense.block_diagonal(full, blocks)


def check(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    model = model.double()
    for structure in ("full", "block_diagonal"):
        found = fisher_matrix(model, (inputs, None), "gaussian", structure).to_dense()
        dense.assert_same(found, expected(model, inputs, structure), 1e-12)


@st.composite
def bags(draw):
    mode = draw(st.sampled_from(["sum", "mean", "max"]))
    padding = draw(st.sampled_from([None, 0, 3]))
    each, samples = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    last = draw(st.booleans())
    weighted = mode == "sum" and draw(st.booleans())
    seed = draw(st.integers(0, 99))
    torch.manual_seed(seed)
    model = Bags(each, mode=mode, padding_idx=padding, include_last_offset=last)
    count = each * samples
    if draw(st.booleans()):
        tokens = torch.randint(0, 7, (count, draw(st.integers(1, 4))))
        offsets = None
    else:
        sizes = torch.tensor([draw(st.integers(0, 3)) for _ in range(count)])
        tokens = torch.randint(0, 7, (int(sizes.sum()),))
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
        offsets = offsets if last else offsets[:-1]
    weights = normal(*tokens.shape, seed=seed) if weighted else None
    return model, (tokens, offsets, weights)


@given(bags())
def test_rows_of_bags(case):
    check(*case)


def test_bags_take_keywords():
    torch.manual_seed(0)
    model = Bags(mode="sum").double()
    inputs = {"input": torch.tensor([1, 2, 2, 5]), "offsets": torch.tensor([0, 1])}
    found = fisher_matrix(model, (inputs, None), "gaussian", "full").to_dense()
    dense.assert_same(found, expected(model, (inputs["input"], inputs["offsets"])), 1e-12)


def test_of_equal_entries_the_first_is_the_largest():
    model = Bags(mode="max").double()
    with torch.no_grad():
        model.table.weight[:] = model.table.weight[0]
    check(model, (torch.tensor([[1, 2], [3, 2], [4, 4]]),))


@pytest.mark.parametrize("bag", [False, True])
def test_tables_of_bounded_norm(bag):
    torch.manual_seed(0)
    model = Bags(max_norm=0.5, mode="sum") if bag else Looked(max_norm=0.5)
    check(model, (torch.randint(0, 7, (4, 2), generator=generator(1)),))
    assert model.table.weight.norm(dim=1).min() < 0.5 + 1e-6


class Looked(nn.Module):
    """A linear classifier of two tokens."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3, **options)
        self.head = nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens)).flatten(1))


def test_a_bag_of_one_token_is_an_embedding():
    """Also its Kronecker factors: places of bags that hold no token count nothing."""
    torch.manual_seed(0)
    bag = Bags(mode="sum").double()
    tokens = torch.tensor([1, 4, 4, 2])
    single = nn.Sequential(nn.Embedding(7, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    single.load_state_dict(dict(zip(single.state_dict(), bag.state_dict().values(), strict=True)))
    for sharing in ("expand", "reduce", "split"):
        one = fisher_matrix(single, (tokens, None), "gaussian", "kfac", weight_sharing=sharing)
        offsets = torch.arange(4)
        # The last bag has two more places, of which the padding index takes none.
        padded = torch.tensor([1, 4, 4, 2, 6, 6])
        bag.table.padding_idx = 6
        found = fisher_matrix(
            bag, ((padded, offsets), None), "gaussian", "kfac", weight_sharing=sharing
        )
        dense.assert_same(found.to_dense(), one.to_dense(), 1e-12)


@pytest.mark.parametrize("structure", sorted(set(STRUCTURES) - {"singd"}))
def test_every_structure_takes_bags(structure):
    torch.manual_seed(0)
    model = Bags(mode="mean").double()
    data = ((torch.tensor([1, 2, 2, 5, 0]), torch.tensor([0, 1, 4])), None)
    found = fisher_matrix(model, data, "gaussian", structure)
    assert float(found.trace()) > 0
    assert found.solve(normal(found.shape[0]), 0.1).isfinite().all()


def test_gradients_scaled_by_frequency_are_refused():
    for model in (Looked(scale_grad_by_freq=True), Bags(mode="sum", scale_grad_by_freq=True)):
        with Capture(model) as capture:
            assert "scale_grad_by_freq" in capture.uncovered["table.weight"]


TOKENS = torch.tensor([[1, 2], [3, 3], [0, 6], [2, 5]])
KINDS = ("KFAC", "EKFAC", "ExactNGD", "SINGD", "FNGD", "DiagonalNGD", "EGN", "ImplicitSGD", "Padam")


@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_gradients_train_as_dense_ones(kind, bag):
    ends = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = (Bags(mode="sum", sparse=sparse) if bag else Looked(sparse=sparse)).double()
        if kind in ("ImplicitSGD", "Padam"):
            optimizer = getattr(natgrad, kind)(model.parameters(), lr=0.01)
        else:
            optimizer = getattr(natgrad, kind)(model, likelihood="gaussian", lr=0.01)
        y = normal(4, 2)

        def closure(model=model, optimizer=optimizer, y=y) -> Tensor:
            optimizer.zero_grad()
            loss = 0.5 * functional.mse_loss(model(TOKENS), y, reduction="sum") / 4
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    dense.assert_same(ends[1], ends[0], 1e-10)


def test_a_preconditioner_takes_sparse_gradients():
    model = Looked(sparse=True).double()
    preconditioner = natgrad.Preconditioner(model, "gaussian", structure="kfac")
    (0.5 * model(TOKENS).square().sum(1).mean()).backward()
    preconditioner.step()
    assert model.table.weight.grad.layout == torch.strided
    assert model.table.weight.grad[1].any() and not model.table.weight.grad[4].any()

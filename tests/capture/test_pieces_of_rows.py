"""Vectors that are pulled back sample by sample go in pieces that fit into memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from natgrad import Capture
from natgrad.capture import rows
from tests.cases import normal


class Offset(nn.Module):
    """A wide layer and a parameter of its own, between narrow ends."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 40), nn.Linear(40, 2)
        self.offset = nn.Parameter(torch.zeros(40))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) + self.offset.tanh()))


def test_pieces_are_bounded_by_all_layers_that_a_vector_meets(monkeypatch):
    model, x, vectors = Offset().double(), normal(6, 3), normal(2, 6, 2, seed=1)
    with Capture(model) as capture:
        whole = capture.pull_back(model(x), vectors).to_dense()
    numbers = []
    pull = rows.batched_gradients

    def counted(output: Tensor, targets, pieces: Tensor, *args, **options):
        numbers.append(len(pieces))
        return pull(output, targets, pieces, *args, **options)

    monkeypatch.setattr(rows, "batched_gradients", counted)
    monkeypatch.setattr(rows, "SPLIT_ELEMENTS", 1500)
    with Capture(model) as capture:
        found = capture.pull_back(model(x), vectors).to_dense()
    assert torch.equal(found, whole)
    assert max(numbers) == 4  # Of 292 entries each: six outputs of both layers, and the offset.

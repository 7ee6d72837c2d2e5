"""Where samples lie is found although some layers mix them in every layout, as experts do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import natgrad
from tests import dense
from tests.cases import generator, normal


class Routed(nn.Module):
    """Attention over time on ``(T, N, d)`` or ``(N, T, d)``, then one expert for every token."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Linear(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.switch = nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embedding(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        flat = x.flatten(0, 1)
        weights, chosen = self.switch(flat).softmax(-1).max(-1)
        result = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            own = (chosen == number).nonzero()[:, 0]
            result = result.index_add(0, own, torch.tanh(expert(flat[own])))
        return self.head(x + (result * weights[:, None]).view_as(x))


@pytest.mark.filterwarnings("ignore:natgrad")
def test_only_the_experts_mix_samples():
    batch, found = normal(5, 6, 3), []
    for batch_first in (True, False):
        torch.manual_seed(0)
        model = Routed(batch_first).double()
        optimizer = natgrad.ExactNGD(model, lr=0.0, kl_clip=None, fisher="exact")
        x = batch if batch_first else batch.transpose(0, 1)
        y = torch.randint(3, (30,), generator=generator(1))
        for _ in range(3):
            output = model(x)
            in_order = output if batch_first else output.transpose(0, 1)
            nn.functional.cross_entropy(in_order.flatten(0, 1), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        sources = optimizer.preconditioner.capture.sources
        assert sources.time_first is not batch_first
        mixing = set(sources.mixing(sources.axes))
        assert mixing == set(model.experts), [sources.names[m] for m in mixing]
        found.append(optimizer.preconditioner.curvature.matrix().to_dense())
    dense.assert_same(found[1], found[0], 1e-10)
    z, jacobian = dense.jacobian(model, x)
    p = z.flatten(0, 1).softmax(-1)
    hessian = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    rows = jacobian.flatten(0, 1)
    expected = torch.einsum("eip,eij,ejq->pq", rows, hessian, rows) / len(rows)
    dense.assert_same(found[1], expected, 1e-10)

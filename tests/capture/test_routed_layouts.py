"""Where samples lie is found although some layers mix them in every layout, as experts do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad.curvature import KroneckerFactors
from natgrad.jacobians import WeightSharing
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


def factors(model: Routed, x: Tensor, vectors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return every expert's inputs ``(T, d)`` and what vectors ``(R, N, T, C)`` are there."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[module] = inputs[0], output

    handles = [expert.register_forward_hook(keep) for expert in model.experts]
    z = model(x)
    for handle in handles:
        handle.remove()
    found = []
    for expert in model.experts:
        inputs, output = seen[expert]
        pulled = [torch.autograd.grad(z, output, v, retain_graph=True)[0] for v in vectors]
        found.append((inputs.detach(), torch.stack(pulled)))
    return found


@pytest.mark.filterwarnings("ignore:natgrad")
@pytest.mark.parametrize("sharing", ["split", "expand"])
def test_positions_of_experts_count_as_samples_of_their_own(sharing: WeightSharing):
    torch.manual_seed(0)
    model = Routed(True).double()
    batches = [normal(5, 6, 3), normal(5, 6, 3, seed=1)]
    matrix = natgrad.fisher_matrix(
        model,
        [(x, None) for x in batches],
        structure=KroneckerFactors(sharing, rows_per_unit=None),
    )
    found = []
    for x in batches:
        p = model(x).detach().softmax(-1)
        roots = torch.diag_embed(p.sqrt()) - p.unsqueeze(-1) * p.sqrt().unsqueeze(-2)
        vectors = torch.zeros(5, 6, 3, 5, 6, 3, dtype=torch.float64)
        for n in range(5):
            for t in range(6):
                vectors[n, t, :, n, t] = roots[n, t].T
        found.append(factors(model, x, vectors.flatten(0, 2)))
    tokens = [[len(inputs) for inputs, _ in batch] for batch in found]
    assert tokens[0] != tokens[1] and 0 < min(map(min, tokens))
    whole = matrix.to_dense()
    place = dense.indices(model)
    for number, each in enumerate(zip(*found, strict=True)):
        inputs = torch.cat([a for a, _ in each])
        inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        a = inputs.T @ inputs / len(inputs)
        b = sum(torch.einsum("rto,rtp->op", delta, delta) for _, delta in each) / 60
        own = torch.cat(
            [place[f"experts.{number}.{name}"].flatten() for name in ("weight", "bias")]
        )
        block = whole[own][:, own]
        entries = torch.arange(20).view(4, 5)  # Of [W | b] row by row, here W before b.
        order = torch.cat([entries[:, :4].flatten(), entries[:, 4]])
        expected = torch.kron(b, a)[order][:, order]
        torch.testing.assert_close(block, expected, rtol=1e-10, atol=1e-14)

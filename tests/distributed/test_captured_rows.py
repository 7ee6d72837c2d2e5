"""Models wrapped by DistributedDataParallel, in two processes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from tests import dense, processes
from tests.cases import CASES, generator, normal
from tests.state import flat


def batch(rank: int) -> tuple[Tensor, Tensor]:
    return normal(4, 3, seed=rank), torch.randint(0, 3, (4,), generator=generator(rank))


def replica(rank: int) -> dict[str, Tensor]:
    """Capture through the wrapper."""
    result: dict[str, Tensor] = {}
    case = CASES["mlp"]()
    model = nn.parallel.DistributedDataParallel(case.model)
    x, y = batch(rank)
    with natgrad.Capture(model) as capture:
        assert capture.layout.names == tuple(dense.parameters(case.model))
        out = model(x)
        jacobians = capture.pull_back(out, normal(2, *out.shape))
        result["rows"] = jacobians.to_dense()
        functional.cross_entropy(out, y).backward()
    result["gradient"] = flat(p.grad for p in case.model.parameters())
    return result


@pytest.mark.slow
def test_rows_are_those_of_a_process_and_gradients_those_of_all():
    results = processes.run(replica)
    case = CASES["mlp"]()
    gradients = []
    for rank in range(2):
        x, y = batch(rank)
        z, jac = dense.jacobian(case.model, x)
        expected = dense.rows(jac, normal(2, *z.shape)).flatten(0, 1)
        dense.assert_same(results[rank]["rows"], expected)
        loss = functional.cross_entropy(case.model(x), y)
        gradients.append(flat(torch.autograd.grad(loss, list(case.model.parameters()))))
    for result in results:
        dense.assert_same(result["gradient"], (gradients[0] + gradients[1]) / 2)

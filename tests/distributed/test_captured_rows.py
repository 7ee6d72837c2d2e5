"""Models wrapped by DistributedDataParallel, in two processes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from tests import dense, processes
from tests.cases import CASES, generator, normal
from tests.methods import make_optimizer
from tests.state import flat


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    seed = 10 * step + rank
    return normal(4, 3, seed=seed), torch.randint(0, 3, (4,), generator=generator(seed))


def replica(rank: int) -> dict[str, Tensor]:
    """Capture through the wrapper, then train with two optimizers."""
    result: dict[str, Tensor] = {}
    case = CASES["mlp"]()
    model = nn.parallel.DistributedDataParallel(case.model)
    x, y = batch(rank, 0)
    with natgrad.Capture(model) as capture:
        assert capture.layout.names == tuple(dense.parameters(case.model))
        out = model(x)
        jacobians = capture.pull_back(out, normal(2, *out.shape))
        result["rows"] = jacobians.to_dense()
        functional.cross_entropy(out, y).backward()
    result["gradient"] = flat(p.grad for p in case.model.parameters())
    for make, options in (
        (natgrad.KFAC, {"fisher": "mc", "factors": 1, "inverses": 1}),
        (natgrad.ExactNGD, {"fisher": "exact", "lr": 0.3}),
    ):
        optimizer = make_optimizer(make, model, **options)
        for step in range(3):
            x, y = batch(rank, step)
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        result[make.__name__] = flat(case.model.parameters())
    return result


@pytest.mark.slow
def test_two_replicas():
    results = processes.run(replica)
    case = CASES["mlp"]()
    gradients = []
    for rank in range(2):
        x, y = batch(rank, 0)
        z, jac = dense.jacobian(case.model, x)
        expected = dense.rows(jac, normal(2, *z.shape)).flatten(0, 1)
        dense.assert_same(results[rank]["rows"], expected)
        loss = functional.cross_entropy(case.model(x), y)
        gradients.append(flat(torch.autograd.grad(loss, list(case.model.parameters()))))
    for result in results:
        dense.assert_same(result["gradient"], (gradients[0] + gradients[1]) / 2)
    for name in ("KFAC", "ExactNGD"):
        first, second = (result[name] for result in results)
        assert torch.equal(first, second) and first.isfinite().all()

"""The blocks of the page on coming from other libraries."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import natgrad

PAGE = Path(__file__).parents[1] / "docs" / "migration.md"
SECTIONS = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
BLOCKS = [
    (title, block)
    for title, text in SECTIONS
    for block in re.findall(r"^```python\n(.*?)```", text, re.M | re.S)
]


def dense_fisher(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(1/N) Σ Jᵀ(diag(p) − ppᵀ)J, by definition."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    jacobians = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(parameters)
    jacobian = torch.cat([part.flatten(2) for part in jacobians.values()], dim=2)
    p = model(x).detach().softmax(1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return (jacobian.mT @ hessian @ jacobian).mean(0)


def test_the_page_has_blocks_of_every_library():
    titles = [title for title, _ in BLOCKS]
    assert len(titles) == 7
    assert list(dict.fromkeys(titles)) == [
        "kfac-pytorch", "asdl (asdfghjkl)", "singd", "curvlinops", "laplace-torch"
    ]  # fmt: skip


def test_the_block_of_singd_takes_its_steps():
    theirs = pytest.importorskip("singd.optim.optimizer").SINGD
    (block,) = (block for title, block in BLOCKS if title == "singd")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()
    twin = copy.deepcopy(model)
    x, y = torch.randn(96, 2, 4, 4).double(), torch.randint(0, 3, (96,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    exec(
        block,
        {"natgrad": natgrad, "torch": torch, "F": functional, "model": model, "loader": loader},
    )
    optimizer = theirs(twin, lr=0.05, momentum=0.9, damping=1e-2, alpha1=0.5, T=10, lr_cov=0.02,
                       structures=("dense", "dense"), loss_average="batch")  # fmt: skip
    for x, y in loader:
        optimizer.zero_grad()
        functional.cross_entropy(twin(x), y).backward()
        optimizer.step()
    for ours, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("title", "block"), BLOCKS)
def test_block(title: str, block: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(48, 6).double(), torch.randint(0, 3, (48,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    v = torch.randn(sum(p.numel() for p in model.parameters())).double()
    names: dict[str, Any] = {
        "natgrad": natgrad, "torch": torch, "F": functional, "model": model, "loader": loader,
        "v": v, "x": x,
    }  # fmt: skip
    before = [p.detach().clone() for p in model.parameters()]
    dense = dense_fisher(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(block, str(PAGE), "exec"), names)
    after = list(model.parameters())
    if title == "singd":
        assert not names[
            "optimizer"
        ].preconditioner.refresh.early  # As singd: every T steps, from 0.
    if "optimizer" in names:
        assert all(not torch.equal(p, old) for p, old in zip(after, before, strict=True))
        assert all(bool(p.isfinite().all()) for p in after)
    if "matrix" in names:
        assert torch.allclose(names["product"], dense @ v, rtol=1e-10, atol=1e-14)
        assert float(names["trace"]) == pytest.approx(float(dense.trace()), rel=1e-10)
    if "K" in names:
        kfac = names["K"].to_dense()
        assert torch.allclose(names["product"], kfac @ v, rtol=1e-10, atol=1e-14)
        solved = torch.linalg.solve(kfac + 1e-2 * torch.eye(len(v)).double(), v)
        assert torch.allclose(names["natural"], solved, rtol=1e-9, atol=1e-12)
        assert torch.allclose(torch.from_numpy(names["scipy_operator"] @ v.numpy()), kfac @ v)
    if "posterior" in names:
        posterior = names["posterior"]
        assert torch.allclose(posterior.matrix.to_dense(), dense, rtol=1e-10, atol=1e-14)
        assert posterior.log_marginal_likelihood() >= names["evidence"]
        assert torch.allclose(names["probabilities"].sum(1), torch.ones(48).double())
        precision = 48 * dense + 2.0 * torch.eye(len(v)).double()
        jacobians = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x[:1],)))(
            {n: p.detach() for n, p in model.named_parameters()}
        )
        row = torch.cat([part.flatten(2) for part in jacobians.values()], dim=2)[0]
        expected = row @ torch.linalg.solve(precision, row.T)
        assert torch.allclose(names["covariance"][0], expected, rtol=1e-9)

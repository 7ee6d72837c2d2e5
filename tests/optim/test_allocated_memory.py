"""How much the tensors of a step take at most, beside what an optimizer has to keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import natgrad
from natgrad.statistics.triangles import kept_entries
from tests.cases import generator, normal

WIDTHS = (400, 300, 256, 10)


class LiveStorages(TorchDispatchMode):
    """Adds up the storages that operations have made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.made = {key: one for key, one in self.made.items() if not one[0].expired()}
        self.peak = max(self.peak, self.now)
        return result

    @property
    def now(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


@pytest.fixture(scope="module")
def measured() -> tuple[int, int, LiveStorages]:
    """Return what all factors and what the weights take, and the storages of six steps."""
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in zip(WIDTHS, WIDTHS[1:], strict=False)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    optimizer = natgrad.KFAC(model, refresh=natgrad.Refresh(factors=1, inverses=1, decay=0.9))
    with LiveStorages() as storages:
        for seed in range(6):
            optimizer.zero_grad()
            y = torch.randint(0, 10, (16,), generator=generator(seed))
            x = normal(16, WIDTHS[0], seed=seed).float()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    factors = sum(d**2 for a, b in zip(WIDTHS, WIDTHS[1:], strict=False) for d in (a + 1, b))
    return 4 * factors, 4 * sum(p.numel() for p in model.parameters()), storages


def test_triangles_and_inverses_are_kept(measured):
    factors, weights, storages = measured
    sizes = [d for a, b in zip(WIDTHS, WIDTHS[1:], strict=False) for d in (a + 1, b)]
    kept = 4 * sum(map(kept_entries, sizes)) + factors
    # Weights, gradients and the last step beside them; inputs, outputs and numbers are small.
    assert kept + 3 * weights <= storages.now < 1.05 * (kept + 3 * weights)


def test_a_step_holds_two_of_everything_and_what_one_layer_needs(measured):
    """Until it is sure that it is taken, the average and the inverse before it can come back."""
    factors, weights, storages = measured
    largest = 4 * ((WIDTHS[0] + 1) ** 2 + WIDTHS[1] ** 2)
    assert storages.peak < 2 * 1.57 * factors + 4 * weights + 1.25 * largest

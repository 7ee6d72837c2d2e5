"""What goes wrong in one of two processes concerns both, and neither waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from tests import processes
from tests.distributed.networks import batch, make, weights
from tests.methods import make_optimizer

METHODS: dict[str, dict[str, Any]] = {
    "KFAC": {}, "EKFAC": {}, "TKFAC": {}, "SINGD": {}, "FNGD": {"coefficient_steps": 2},
    "KPSVD": {}, "TwoLevelKFAC": {}, "ExactNGD": {}, "UnitWiseNGD": {}, "DiagonalNGD": {},
    "BlockTridiagonalNGD": {}, "EGN": {}, "KFAC, memory": {"sharing": "memory"},
    "EKFAC, memory": {"sharing": "memory"},
}  # fmt: skip


class Sometimes(nn.Module):
    """A network with a layer that not every batch reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.reaches = True

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.between(h)) if self.reaches else h)


def train(
    name: str,
    plain: nn.Module,
    rank: int,
    loss_of: Callable[[int, nn.Module], Tensor],
    **options: Any,
) -> Any:
    """Train a network for five steps."""
    model = nn.parallel.DistributedDataParallel(plain, find_unused_parameters=True)
    kind = getattr(natgrad, name.partition(",")[0])
    optimizer = make_optimizer(kind, model, **METHODS[name], **options)
    for step in range(5):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(step, model)
            loss.backward()
            return loss.detach()

        if name == "EGN":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return optimizer


def share(step: int, rank: int) -> tuple[Tensor, Tensor]:
    x, y = batch("mlp", step)
    return x.chunk(2)[rank], y.chunk(2)[rank]


def broken(rank: int, name: str) -> dict[str, Any]:
    """One process has a batch with NaN in step 3."""
    plain = make("mlp")

    def loss_of(step: int, model: nn.Module) -> Tensor:
        x, y = share(step, rank)
        if step == 3 and rank == 1:
            x = x.clone()
            x[0, 0] = torch.nan
        return functional.cross_entropy(model(x), y)

    optimizer = train(name, plain, rank, loss_of)
    return {"weights": weights(plain), "steps": optimizer.preconditioner.observer.steps}


def empty(rank: int, name: str) -> dict[str, Any]:
    """One process has no samples in some steps, and none that count in others."""
    plain = make("mlp")

    def loss_of(step: int, model: nn.Module) -> Tensor:
        x, y = share(step, rank)
        if step % 3 == 1 + rank:
            x, y = x[:0], y[:0]
        if step == 3 + rank:
            y = torch.full_like(y, -100)
        return functional.cross_entropy(model(x), y, reduction="sum") / 8

    train(name, plain, rank, loss_of)
    return {"weights": weights(plain)}


def unused(rank: int, name: str) -> dict[str, Any]:
    """One process does not use a layer in some steps, and in some neither does."""
    torch.manual_seed(0)
    plain = Sometimes().double()

    def loss_of(step: int, model: nn.Module) -> Tensor:
        plain.reaches = step not in (1 + rank, 3)
        x, y = share(step, rank)
        return functional.cross_entropy(model(x), y)

    train(name, plain, rank, loss_of, damping=0.1)
    return {"weights": weights(plain)}


def infinite(rank: int) -> dict[str, Any]:
    """The loss that a closure returns is infinite in one process, though its gradient is not."""
    plain = make("mlp")
    model = nn.parallel.DistributedDataParallel(plain)
    optimizer = natgrad.KFAC(model)
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            x, y = share(step, rank)
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            return loss * torch.inf if step == 2 and rank == 1 else loss

        optimizer.step(closure)
    return {"weights": weights(plain), "steps": optimizer.preconditioner.observer.steps}


def uneven(rank: int) -> dict[str, Any]:
    """Torch's context for unequal numbers of batches is refused before anybody waits."""
    from torch.distributed.algorithms.join import Join

    plain = make("mlp")
    model = nn.parallel.DistributedDataParallel(plain)
    optimizer = natgrad.KFAC(model)
    try:
        with Join([model]):
            x, y = share(0, rank)
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    except ValueError as error:
        return {"said": str(error)}
    return {"said": ""}


def attempts(rank: int) -> dict[str, Any]:
    found = {}
    log: list[tuple[str, Any]] = []
    for collective in ("all_reduce", "all_gather", "all_gather_object", "reduce", "broadcast"):
        setattr(torch.distributed, collective, noting(collective, log))
    for name in METHODS:
        for trial in (broken, empty, unused):
            log.clear()
            found[f"{name}, {trial.__name__}"] = {**trial(rank, name), "log": list(log)}
    found["infinite"], found["uneven"] = infinite(rank), uneven(rank)
    return found


def noting(collective: str, log: list[tuple[str, Any]]) -> Callable[..., Any]:
    """Return a collective that notes its calls, with the sizes of what is sent."""
    original = getattr(torch.distributed, collective)

    def noted(first: Any, *rest: Any, **options: Any) -> Any:
        sent = rest[0] if collective == "all_gather" else first
        log.append((collective, list(sent.shape) if isinstance(sent, Tensor) else None))
        return original(first, *rest, **options)

    return noted


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return processes.run(attempts)


@pytest.mark.slow
@pytest.mark.parametrize("trial", ["broken", "empty", "unused"])
@pytest.mark.parametrize("name", METHODS)
def test_processes_stay_together(found: list[dict[str, Any]], name: str, trial: str) -> None:
    one, other = (each[f"{name}, {trial}"] for each in found)
    assert torch.equal(one["weights"], other["weights"]) and one["weights"].isfinite().all()
    assert one["log"] and one["log"] == other["log"]
    if trial == "broken":
        assert one["steps"] == other["steps"] < 5


@pytest.mark.slow
def test_an_infinite_loss_of_one_is_skipped_by_all(found: list[dict[str, Any]]) -> None:
    one, other = (each["infinite"] for each in found)
    assert torch.equal(one["weights"], other["weights"])
    assert one["steps"] == other["steps"] == 3


@pytest.mark.slow
def test_unequal_numbers_of_batches_are_refused(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert "Join" in each["uneven"]["said"]

"""Several processes, each with a share of the batch, take the steps of one with all of it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import natgrad
from tests import processes
from tests.distributed.networks import SAMPLES, batch, make, soon, summed_loss, weights
from tests.methods import make_optimizer

PLAIN = {"length": "lr", "lr": 0.05, "momentum": 0.9, "kl_clip": None, "damping": 1e-2}
EVERY_STEP = {"factors": 1, "inverses": 1}
#: Two steps go too far, and the ones after them are on curvature of the day.
TOO_FAR = {
    "factors": 10, "inverses": 20, "early": True,
    "length": natgrad.MeasuredLength(start=1.0, growth=4.0), "lr": 3.0,
}  # fmt: skip
#: Every product with the matrix is a message.
ITERATED = {"ThermodynamicNGD": 2, "ConjugateGradientNGD": 2}


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        optimizer: Name of the class.
        options: Its options, those of groups by their own names; those of `soon` besides.
        network: Name of the network.
        shares: Samples of each process; an equal number for None.
        ignored: Step → how many of the last samples have a label that does not count.
        passes: Backward passes per step.
        steps: Steps.
        closure: Whether steps take a closure.
    """

    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    network: str = "mlp"
    shares: tuple[int, ...] | None = None
    ignored: dict[int, int] = field(default_factory=dict)
    passes: int = 1
    steps: int = 3
    closure: bool = False

    def train(self, world: int, rank: int | None = None) -> Tensor:
        """Train as one of some processes, or alone on what they all have; return the weights."""
        plain = make(self.network)
        model = plain if rank is None else nn.parallel.DistributedDataParallel(plain)
        step = self._stepper(plain, model)
        for number in range(ITERATED.get(self.optimizer, self.steps)):
            x, y = batch(self.network, number)
            if number in self.ignored:
                y = y.clone()
                y[SAMPLES - self.ignored[number] :] = -100
            shares = self.shares or (SAMPLES // world,) * world
            pieces = [
                [piece.chunk(self.passes) for piece in tensor.split(list(shares))]
                for tensor in (x, y)
            ]
            if rank is None:  # A pass is of the pieces of all processes.
                own = [[torch.cat(each) for each in zip(*one, strict=True)] for one in pieces]
            else:
                own = [list(one[rank]) for one in pieces]
            counting = (y != -100).sum()
            step(list(zip(*own, strict=True)), counting / (1 if rank is None else world))
        return weights(plain)

    def _stepper(self, plain: nn.Module, model: nn.Module) -> Any:
        options, preconditioner = dict(self.options), None
        if self.optimizer == "Preconditioner":
            preconditioner = make_optimizer(natgrad.Preconditioner, model, **options)
            optimizer: Any = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
        else:
            kind = getattr(natgrad, self.optimizer)
            options = soon(kind) | options
            if kind is natgrad.ImplicitSGD:
                group = None if model is plain else torch.distributed.group.WORLD
                optimizer = kind(plain.parameters(), process_group=group, **options)
            else:
                optimizer = make_optimizer(kind, model, **options)

        def step(pieces: Sequence[tuple[Tensor, Tensor]], divisor: Tensor) -> None:
            def backpropagated() -> Tensor:
                optimizer.zero_grad()
                total = torch.zeros((), dtype=torch.float64)
                for number, (x, y) in enumerate(pieces):
                    waits = model is not plain and number + 1 < len(pieces)
                    with model.no_sync() if waits else contextlib.nullcontext():
                        loss = summed_loss(model(x), y) / divisor
                        loss.backward()
                    total = total + loss.detach()
                return total

            if self.closure:
                optimizer.step(backpropagated)
                return
            backpropagated()
            if preconditioner is not None:
                preconditioner.step()
            optimizer.step()

        return step


KRONECKER = ("KFAC", "EKFAC", "TKFAC", "TEKFAC", "KPSVD", "TwoLevelKFAC", "SINGD")
SAMPLE_SPACE = (
    "ExactNGD", "BlockDiagonalNGD", "BlockTridiagonalNGD", "UnitWiseNGD", "DiagonalNGD",
    "ThermodynamicNGD", "ImprovedEmpiricalNGD",
)  # fmt: skip

RUNS: dict[str, Run] = {
    **{name: Run(name) for name in KRONECKER + SAMPLE_SPACE},
    **{f"{name}, exact": Run(name, {"fisher": "exact", **EVERY_STEP}) for name in KRONECKER},
    **{f"{name}, plain": Run(name, {**PLAIN, **EVERY_STEP}) for name in ("KFAC", "EKFAC")},
    **{f"{name}, convolution": Run(name, network="convolution") for name in KRONECKER},
    "KFAC, seldom": Run(
        "KFAC", {"factors": 10, "inverses": 20, "early": True}, "convolution", steps=12
    ),
    **{f"{name}, transformer": Run(name, network="transformer") for name in KRONECKER},
    **{
        f"{name}, transformer": Run(name, {"damping": 0.1}, network="transformer")
        for name in SAMPLE_SPACE
        if name != "ThermodynamicNGD"  # Which solves what ExactNGD does.
    },
    "KFAC, too far": Run("KFAC", TOO_FAR, steps=12),
    **{
        f"{name}, too far, sharing memory": Run(
            name, {**TOO_FAR, "sharing": "memory"}, "transformer", steps=12
        )
        for name in ("KFAC", "EKFAC")
    },
    "KFAC, every row": Run("KFAC", {"rows_per_unit": None}, network="convolution"),
    "KFAC, reduce": Run("KFAC", {"weight_sharing": "reduce"}, network="transformer"),
    "KFAC, empirical": Run("KFAC", {"fisher": "empirical", **EVERY_STEP}),
    "KFAC, improved": Run("KFAC", {"fisher": "improved"}, network="transformer"),
    "KFAC, three samples": Run("KFAC", {"fisher": natgrad.fisher.MonteCarloFisher(3)}),
    "KFAC, fused": Run("KFAC", {"fused": True}),
    **{
        f"{name}, sharing {sharing}": Run(name, {"sharing": sharing}, network="transformer")
        for name in ("KFAC", "EKFAC", "TKFAC", "KPSVD", "TwoLevelKFAC")
        for sharing in ("nothing", "memory")
        if sharing == "memory" or name in ("KFAC", "EKFAC")
    },
    "KFAC, sharing memory, plain": Run(
        "KFAC",
        {**PLAIN, "kl_clip": 1e-3, "sharing": "memory", "stagger": True, "inverses": 3},
        steps=5,
    ),
    "SINGD, sharing memory": Run("SINGD", {"sharing": "memory"}),
    "KFAC, staggered": Run("KFAC", {"stagger": True, "factors": 1, "inverses": 3}, steps=5),
    "KFAC, warm-up": Run("KFAC", {"warmup": 2}),
    "KFAC, quadratic model": Run("KFAC", {"length": "quadratic_model", "lr": 1.0, "damping": 0.1}),
    "KFAC, adaptive damping": Run(
        "KFAC", {"damping": natgrad.LevenbergMarquardt(interval=2)}, closure=True, steps=5
    ),
    "ExactNGD, line search": Run("ExactNGD", {"length": natgrad.LineSearch()}, closure=True),
    "ExactNGD, isotropic": Run("ExactNGD", {"lr": "isotropic", "damping": 0.1}),
    "EGN": Run("EGN", closure=True),
    "ConjugateGradientNGD": Run(
        "ConjugateGradientNGD", {"tolerance": 1e-13, "max_iterations": 300, "damping": 0.1}
    ),
    "FNGD": Run("FNGD", {"coefficient_steps": 2}),
    "FNGD, transformer": Run("FNGD", {"coefficient_steps": 2}, network="transformer"),
    "ImplicitSGD": Run("ImplicitSGD", {"lr": 0.3}, closure=True),
    "Preconditioner": Run("Preconditioner", {"fisher": "exact", "damping": 1e-2}),
    **{
        f"{name}, two passes": Run(name, passes=2)
        for name in ("KFAC", "EKFAC", "TKFAC", "KPSVD", "TwoLevelKFAC", "SINGD", "FNGD", "ExactNGD")
    },
    **{
        f"{name}, empirical": Run(name, {"fisher": "empirical", **EVERY_STEP})
        for name in ("EKFAC", "TKFAC", "TEKFAC", "KPSVD", "TwoLevelKFAC", "SINGD", "DiagonalNGD")
    },
    **{
        f"{name}, some ignored": Run(name, {"damping": 0.1}, ignored={0: 3, 2: 8})
        for name in ("KFAC", "EKFAC", "SINGD", "ExactNGD", "UnitWiseNGD", "DiagonalNGD")
    },
    "KFAC, quadratic model, some ignored": Run(
        "KFAC", {"length": "quadratic_model", "lr": 1.0, "damping": 0.1}, ignored={0: 3, 2: 8}
    ),
    "EGN, some ignored": Run("EGN", ignored={0: 3, 2: 8}, closure=True),
    "KFAC, tokens ignored": Run("KFAC", network="transformer", ignored={0: 3, 2: 8}),
    **{f"{name}, broad": Run(name, network="broad") for name in ("KFAC", "EKFAC", "TKFAC")},
    "KFAC, broad, sharing memory": Run("KFAC", {"sharing": "memory"}, network="broad"),
    "KFAC, about means": Run("KFAC", {"max_factor_size": 5}),
    "KFAC, about means, sharing memory": Run(
        "KFAC", {"max_factor_size": 5, "sharing": "memory"}, network="transformer"
    ),
}

#: With two processes: other runs, in which one has more samples than the other.
UNEQUAL: dict[str, Run] = {
    f"{name}, unequal": Run(name, {"damping": 0.1}, shares=(5, 11), network=network)
    for name, network in (
        ("KFAC", "mlp"), ("EKFAC", "convolution"), ("TKFAC", "transformer"), ("SINGD", "mlp"),
        ("TwoLevelKFAC", "mlp"), ("ExactNGD", "mlp"), ("UnitWiseNGD", "convolution"),
        ("KPSVD", "mlp"), ("BlockTridiagonalNGD", "mlp"), ("FNGD", "mlp"),
    )
}  # fmt: skip
UNEQUAL |= {
    f"{name}, nothing in one": Run(name, {"damping": 0.1}, shares=(0, SAMPLES))
    for name in ("KFAC", "EKFAC", "SINGD", "ExactNGD")
}
UNEQUAL["KFAC, about means, unequal"] = Run(
    "KFAC", {"damping": 0.1, "max_factor_size": 5}, shares=(5, 11)
)


#: What four processes do, too: every way to sum, gather and own what structures keep.
IN_FOUR = (
    "KFAC", "EKFAC", "KPSVD", "TwoLevelKFAC", "SINGD", "ExactNGD", "UnitWiseNGD", "DiagonalNGD",
    "ThermodynamicNGD", "FNGD", "EGN", "KFAC, transformer", "EKFAC, transformer",
    "SINGD, transformer", "KFAC, quadratic model", "KFAC, some ignored", "EKFAC, two passes",
    "KPSVD, two passes",
    "EKFAC, sharing memory", "KPSVD, sharing memory", "KFAC, sharing nothing", "BlockDiagonalNGD",
    "ImprovedEmpiricalNGD", "ConjugateGradientNGD", "ExactNGD, two passes",
)  # fmt: skip

#: What four processes do only: fractions of them keep each layer.
FRACTIONS: dict[str, Run] = {
    **{
        f"{name}, sharing {fraction:g}": Run(name, {"sharing": fraction}, network="transformer")
        for name, fraction in (
            ("KFAC", 0.25), ("KFAC", 0.5), ("KFAC", 1.0), ("EKFAC", 0.5), ("TKFAC", 0.5),
            ("KPSVD", 0.5), ("TwoLevelKFAC", 0.5),
        )
    },
    "KFAC, broad, sharing 0.5": Run(
        "KFAC", {**PLAIN, "sharing": 0.5, "stagger": True, "inverses": 3}, network="broad", steps=5
    ),
    "EKFAC, unequal, sharing 0.5": Run("EKFAC", {"sharing": 0.5}, shares=(5, 0, 7, 4)),
    "KFAC, relative damping, sharing 0.5": Run(
        "KFAC", {"sharing": 0.5, "damping": natgrad.RelativeDamping(0.1)}
    ),
}  # fmt: skip


def runs(world: int) -> dict[str, Run]:
    return RUNS | UNEQUAL if world == 2 else {name: RUNS[name] for name in IN_FOUR} | FRACTIONS


ALONE: dict[str, Tensor] = {}


def trained_alone(name: str, world: int) -> Tensor:
    """Return what one process comes to, which depends on their number if passes are cut by it."""
    run = (RUNS | UNEQUAL | FRACTIONS)[name]
    options = {key: value for key, value in run.options.items() if key != "sharing"}
    same = replace(run, options=options)
    key = repr((same, world))  # Of one process that shares nothing with others.
    if key not in ALONE:
        ALONE[key] = same.train(world)
    return ALONE[key]


def trained(rank: int, world: int) -> dict[str, Tensor]:
    """Make all runs as one of some processes."""
    return {name: run.train(world, rank) for name, run in runs(world).items()}


@pytest.fixture(scope="module", params=[2, 4])
def weights_of_processes(request: pytest.FixtureRequest) -> list[dict[str, Tensor]]:
    return processes.run(trained, request.param, world=request.param)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_processes_take_the_steps_of_one(weights_of_processes: list[dict[str, Tensor]]) -> None:
    first, *others = weights_of_processes
    wrong = {}
    world = len(weights_of_processes)
    for name, run in runs(world).items():
        for other in others:
            assert torch.equal(first[name], other[name]), name
        alone = trained_alone(name, world if run.passes > 1 else 2)
        start = weights(make(run.network))
        assert alone.isfinite().all() and not torch.equal(alone, start), name
        error = float((first[name] - alone).norm() / (alone - start).norm())
        if not error < 1e-10:
            wrong[name] = error
    assert not wrong

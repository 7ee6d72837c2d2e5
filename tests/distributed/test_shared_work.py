"""Processes divide the work, send what they must, and leave a state that any number takes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.curvature import Curvature
from natgrad.curvature.sharing import holders_of
from natgrad.distributed.replicas import Replicas
from tests import processes
from tests.distributed.networks import batch, make, summed_loss, weights
from tests.distributed.test_failures import noting
from tests.methods import make_optimizer

METHODS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("KFAC", "EKFAC", "TKFAC", "KPSVD", "SINGD", "FNGD", "ExactNGD"), {}),
    "KFAC, memory": {"sharing": "memory"},
    "EKFAC, memory": {"sharing": "memory"},
    "EKFAC, half": {"sharing": 0.5},
}
WIDTHS = (60, 80, 70, 50)


# -- work and messages -----------------------------------------------------------------------------


def working(rank: int) -> dict[str, Any]:
    """Take two steps of a wider network; note what is factorised here and what is sent."""
    found: dict[str, Any] = {}
    factorised: list[str] = []
    invert = Curvature._invert

    def noted(self: Curvature, names: list[str], damping: Any) -> None:
        factorised.extend(names)
        invert(self, names, damping)

    Curvature._invert = noted  # type: ignore[method-assign]
    log: list[tuple[str, Any]] = []
    for collective in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "reduce"):
        setattr(torch.distributed, collective, noting(collective, log))
    for name in ("KFAC", "EKFAC", "KPSVD", "KFAC, memory"):
        options = {"sharing": "memory"} if "memory" in name else {}
        torch.manual_seed(0)
        layers = [nn.Linear(a, b) for a, b in zip(WIDTHS, WIDTHS[1:], strict=False)]
        model = nn.parallel.DistributedDataParallel(nn.Sequential(*layers).double())
        kind = getattr(natgrad, name.partition(",")[0])
        # Plain steps: none is taken back.
        optimizer = make_optimizer(kind, model, factors=1, inverses=1, lr=1e-3, **options)
        for step in range(3):
            log.clear()
            factorised.clear()
            x = torch.randn(8, WIDTHS[0], generator=torch.Generator().manual_seed(step)).double()
            functional.cross_entropy(model(x), torch.arange(8) % 5).backward()
            optimizer.step()
            optimizer.zero_grad()
        estimates = optimizer.preconditioner.curvature.estimates
        kept = [part for part, one in estimates.items() if one.average or one.inverse]
        found[name] = {"factorised": list(factorised), "log": list(log), "kept": kept}
    found["passes"] = passing(log)
    return found


def passing(log: list[tuple[str, Any]]) -> dict[str, Any]:
    """Take a step of two passes, of which the last one alone averages gradients."""
    plain = make("mlp")
    model = nn.parallel.DistributedDataParallel(plain)
    optimizer = make_optimizer(natgrad.KFAC, model, fisher="exact", lr=1e-3, length="lr")
    shared, begun = optimizer.preconditioner.curvature.shared, []
    last: Any = plain[4]  # Its gradient is the first that a backward pass makes.
    last.weight.register_hook(lambda gradient: begun.append(len(shared.begun)))
    x, y = batch("mlp", 0)
    log.clear()
    with model.no_sync():
        functional.cross_entropy(model(x), y).backward()
    functional.cross_entropy(model(x), y).backward()
    before = len(shared.begun)
    optimizer.step()
    return {"begun": begun, "before": before, "after": len(shared.begun), "log": list(log)}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_every_factorisation_is_made_once(world: int) -> None:
    found = processes.run(working, world=world)
    layers = list(zip(WIDTHS, WIDTHS[1:], strict=False))
    for name in ("KFAC", "EKFAC", "KPSVD", "KFAC, memory"):
        made = [part for each in found for part in each[name]["factorised"]]
        assert sorted(made) == ["0", "1", "2"]
        if world == 3:
            assert all(len(each[name]["factorised"]) == 1 for each in found)
        for each in found:
            own = each[name]["factorised"] if "memory" in name else ["0", "1", "2"]
            assert sorted(each[name]["kept"]) == sorted(own)
    for each in found:
        passes = each["passes"]
        assert passes["begun"] == [0, 1] and passes["before"] == 1 and passes["after"] == 0
        layers_sent = [size for kind, size in passes["log"] if kind == "all_reduce"]
        assert sum(torch.Size(size).numel() > 100 for size in layers_sent) == 1  # Once a step.
    triangles = sum((a + 1) * (a + 2) / 2 + b * (b + 1) / 2 for a, b in layers)
    squares = [(a + 1) ** 2 + b**2 for a, b in layers]
    parameters = sum((a + 1) * b for a, b in layers)
    sizes = sent(found[0]["KFAC"]["log"])
    assert sizes["all_reduce"] == pytest.approx(triangles, rel=0.05)
    largest = max(squares) if world == 3 else max(squares[1], squares[0] + squares[2])
    assert sizes["all_gather"] == pytest.approx(largest, rel=0.05)
    assert sizes["broadcast"] == parameters
    assert "all_gather_object" not in sizes
    spread = sent(found[0]["KFAC, memory"]["log"])
    assert spread["reduce"] == pytest.approx(triangles, rel=0.05)
    steps = [(a + 1) * b for a, b in layers]
    most = max(steps) if world == 3 else max(steps[1], steps[0] + steps[2])
    assert spread["all_gather"] == pytest.approx(most, rel=0.05) and "broadcast" not in spread


def sent(log: list[tuple[str, Any]]) -> dict[str, float]:
    """Return collective → elements that a process sends."""
    sizes: dict[str, float] = {}
    for collective, shape in log:
        number = 0 if shape is None else torch.Size(shape).numel()
        sizes[collective] = sizes.get(collective, 0) + number
    return sizes


#: Sharing → how many collectives a step has with neither update nor inversion, with an update, and
#: with both. A gather, but of natural gradients, has outlines before it.
COLLECTIVES: dict[Any, list[dict[str, int]]] = {
    "inverses": [
        {"all_reduce": 2},
        {"all_gather": 4, "all_reduce": 4},
        {"all_gather": 6, "all_reduce": 5, "broadcast": 1},
    ],
    "memory": [
        {"all_gather": 1, "all_reduce": 2},
        {"all_gather": 7, "all_reduce": 3, "reduce": 3},
        {"all_gather": 9, "all_reduce": 4, "reduce": 3},
    ],
    0.5: [
        {"all_gather": 1, "all_reduce": 2},
        {"all_gather": 6, "all_reduce": 4, "reduce": 2},
        {"all_gather": 10, "all_reduce": 5, "reduce": 2, "broadcast": 1},
    ],
    "nothing": [
        {"all_reduce": 3},
        {"all_gather": 4, "all_reduce": 5},
        {"all_gather": 4, "all_reduce": 6},
    ],
}


def stepping(rank: int) -> dict[Any, list[list[str]]]:
    """Return sharing → the collectives of a step of every kind, in their order."""
    found, log = {}, []  # type: ignore[var-annotated]
    for collective in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "reduce"):
        setattr(torch.distributed, collective, noting(collective, log))
    for sharing in COLLECTIVES:
        model = nn.parallel.DistributedDataParallel(make("mlp"))
        options = {"factors": 2, "inverses": 4, "early": False, "sharing": sharing}
        optimizer = make_optimizer(natgrad.KFAC, model, lr=1e-3, **options)
        steps = []
        for step in range(13):
            log.clear()
            x, y = (tensor.chunk(4)[rank] for tensor in batch("mlp", step))
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            steps.append([kind for kind, _ in log])
        assert steps[9:] == [steps[step] for step in (5, 6, 7, 8)]
        found[sharing] = [steps[step] for step in (9, 10, 12)]
    return found


@pytest.mark.slow
def test_steps_exchange_nothing_where_there_is_nothing() -> None:
    found = processes.run(stepping, world=4)
    for sharing, counts in COLLECTIVES.items():
        assert [dict(Counter(step)) for step in found[0][sharing]] == counts, sharing
        assert all(each[sharing] == found[0][sharing] for each in found[1:]), sharing


# -- resuming with another number of processes -----------------------------------------------------


def optimizer_of(name: str, model: nn.Module) -> Any:
    return make_optimizer(getattr(natgrad, name.partition(",")[0]), model, **METHODS[name])


def train(name: str, world: int, rank: int, steps: range, path: Path | None = None) -> Any:
    """Train for some steps, from a saved state if there is one; return the last state."""
    plain = make("mlp")
    model = plain if world == 1 else nn.parallel.DistributedDataParallel(plain)
    optimizer = optimizer_of(name, model)
    if path is not None:
        state = torch.load(path, weights_only=True)
        plain.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for step in steps:
        x, y = (tensor.chunk(world)[rank] for tensor in batch("mlp", step))
        optimizer.zero_grad()
        (summed_loss(model(x), y) / len(y)).backward()
        optimizer.step()
    return {"model": plain.state_dict(), "optimizer": optimizer.state_dict()}


def saving(rank: int) -> dict[str, Any]:
    return {name: train(name, 2, rank, range(4)) for name in METHODS}


def resuming(rank: int, folder: Path) -> dict[str, Tensor]:
    states = {n: train(n, 4, rank, range(4, 8), folder / f"{n}.pt")["model"] for n in METHODS}
    return {name: flat(state) for name, state in states.items()}


@pytest.mark.slow
def test_a_run_goes_on_in_any_number_of_processes(tmp_path: Path) -> None:
    for name, state in processes.run(saving)[1].items():
        torch.save(state, tmp_path / f"{name}.pt")
    found = processes.run(resuming, tmp_path, world=4)[0]
    for name in METHODS:
        whole = train(name, 1, 0, range(8))["model"]
        alone = train(name, 1, 0, range(4, 8), tmp_path / f"{name}.pt")["model"]
        moved = flat(whole) - weights(make("mlp"))
        for other in (found[name], flat(alone)):
            assert float((other - flat(whole)).norm() / moved.norm()) < 1e-10, name


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in state.values()])


# -- values in one process -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sharing", "number", "count"),
    [("inverses", 6, 6), ("nothing", 6, 6), ("memory", 6, 1), (1, 6, 6), (0.5, 6, 3), (1 / 3, 6, 2),
     (1 / 6, 6, 1), (0.333, 3, 1), ("auto", 6, 6), ("auto", 64, 8), ("auto", 12, 6)],
)  # fmt: skip
def test_fractions_are_numbers_of_processes(sharing: Any, number: int, count: int) -> None:
    assert holders_of(sharing, number) == count
    natgrad.Refresh(sharing=sharing)


@pytest.mark.parametrize(("sharing", "number"), [(0.25, 6), (2 / 3, 6), (0.1, 4), (0.5, 3)])
def test_fractions_that_are_no_processes_are_refused(sharing: float, number: int) -> None:
    with pytest.raises(ValueError, match=f"a whole number that divides .* take one of 1/{number}"):
        holders_of(sharing, number)


@pytest.mark.parametrize("sharing", [0, -0.5, 1.5, "owner", None, float("nan")])
def test_other_ways_of_sharing_are_refused(sharing: Any) -> None:
    with pytest.raises(ValueError, match=r"'nothing' or a fraction of the processes in \(0, 1\]"):
        natgrad.Refresh(sharing=sharing)


@pytest.mark.parametrize("sharing", [0.5, "memory"])
def test_fused_gradients_need_every_inverse(sharing: Any) -> None:
    with pytest.raises(ValueError, match=f"sharing={sharing!r}.* leaves each with some"):
        natgrad.KFAC(
            make("mlp"), structure=natgrad.curvature.KroneckerFactors(fused=True),
            refresh=natgrad.Refresh(sharing=sharing),
        )  # fmt: skip


def test_one_process_sends_nothing():
    value = {"x": torch.ones(2)}
    assert Replicas().summed(value, torch.device("cpu")) is value
    assert Replicas().gathered(value, torch.device("cpu")) == [value]
    assert Replicas().are_alone and not Replicas().any(False, torch.device("cpu"))


# -- torch.distributed.checkpoint ------------------------------------------------------------------


IN_SHARDS = ("KFAC", "EKFAC", "FNGD", "KFAC, memory")


def train_sharded(
    name: str, world: int, rank: int, steps: range, path: Path, loads: bool
) -> Tensor:
    """Train a model in shards of some processes, from a distributed checkpoint and to one."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    model: Any = make("mlp")
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    if world == 4:  # Two replicas of two shards.
        names = ("replicas", "shards")
        mesh = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = optimizer_of(name, model)
    if loads:
        weights_of, state = get_state_dict(model, optimizer)
        both = {"model": weights_of, "optimizer": state}
        dcp.load(both, checkpoint_id=str(path))
        set_state_dict(
            model, optimizer, model_state_dict=both["model"], optim_state_dict=both["optimizer"]
        )
    for step in steps:
        x, y = (tensor.chunk(world)[rank] for tensor in batch("mlp", step))
        optimizer.zero_grad()
        (summed_loss(model(x), y) / len(y)).backward()
        optimizer.step()
    if not loads:
        weights_of, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights_of, "optimizer": state}, checkpoint_id=str(path))
    return torch.cat([p.full_tensor().detach().flatten() for p in model.parameters()])


def checkpointing(rank: int, world: int, folder: Path) -> dict[str, Tensor]:
    loads = world != 2
    steps = range(4, 8) if loads else range(4)
    return {
        name: train_sharded(name, world, rank, steps, folder / name, loads) for name in IN_SHARDS
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@processes.shards_on_cpus
def test_distributed_checkpoints_fit_any_number_of_processes(tmp_path: Path) -> None:
    found = {
        world: processes.run(checkpointing, world, tmp_path, world=world)[0] for world in (2, 1, 4)
    }
    for name in IN_SHARDS:
        whole = train(name, 1, 0, range(8))["model"]
        moved = flat(whole) - weights(make("mlp"))
        for world in (1, 4):
            gap = float((found[world][name] - flat(whole)).norm() / moved.norm())
            assert gap < 1e-10, (name, world)

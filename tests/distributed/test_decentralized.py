"""Agents that talk to their neighbours only."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.decentralized import Gossip, mixing_matrix
from natgrad.decentralized.manifolds import MANIFOLDS, projected, retracted
from tests import processes
from tests.cases import normal
from tests.distributed.networks import batch, make, summed_loss, weights

AGENTS = 4
REFRESH = natgrad.Refresh(factors=1, inverses=2, decay=0.9)
OPTIONS: dict[str, Any] = {"lr": 0.1, "damping": 0.1, "fisher": "exact", "refresh": REFRESH}


@given(st.integers(1, 12), st.sampled_from(["ring", "grid", "complete"]))
def test_mixing_matrices_are_doubly_stochastic(number: int, graph: Any) -> None:
    w = mixing_matrix(graph, number)
    ones = torch.ones(number, dtype=torch.float64)
    torch.testing.assert_close(w.sum(0), ones)
    torch.testing.assert_close(w.sum(1), ones)
    assert torch.equal(w, w.T) and (w >= 0).all() and torch.equal(mixing_matrix(w, number), w)
    sizes = torch.linalg.eigvalsh(w).abs().sort().values
    assert number == 1 or sizes[-2] < 1 - 1e-9  # Everybody hears of everybody.


def test_other_matrices_are_refused() -> None:
    for wrong in (torch.ones(2, 2), torch.tensor([[2.0, -1.0], [-1.0, 2.0]]), torch.eye(3)):
        with pytest.raises(ValueError, match="2 agents must be 2 × 2"):
            mixing_matrix(wrong, 2)
    with pytest.raises(ValueError, match="graph must be 'ring'"):
        mixing_matrix("star", 2)  # type: ignore[arg-type]


@given(st.sampled_from(sorted(MANIFOLDS)), st.integers(1, 5), st.integers(1, 5), st.integers(0, 9))
def test_directions_are_tangent_and_points_are_on_the_manifold(
    manifold: str, rows: int, columns: int, seed: int
) -> None:
    point = retracted(manifold, normal(rows, columns, seed=seed))
    torch.testing.assert_close(retracted(manifold, point), point)
    if manifold == "sphere":
        torch.testing.assert_close(point.norm(), torch.ones((), dtype=torch.float64))
    else:
        thin = point if rows >= columns else point.T
        gram = thin.T @ thin
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64))
    step = projected(manifold, point, normal(rows, columns, seed=seed + 100))
    torch.testing.assert_close(projected(manifold, point, step), step)
    errors = [
        float((retracted(manifold, point + t * step) - point - t * step).norm())
        for t in (1e-3, 5e-4)
    ]
    assert errors[0] < 1e-4 and errors[1] < 0.3 * errors[0] + 1e-15  # Of second order.


# -- processes -------------------------------------------------------------------------------------


def share(agent: int, step: int) -> tuple[Tensor, Tensor]:
    x, y = batch("mlp", step)
    return x.chunk(AGENTS)[agent], y.chunk(AGENTS)[agent]


def agreed(rank: int) -> Tensor:
    """Take the steps of K-FAC on the joint batch, by the complete graph."""
    model = make("mlp")
    optimizer = natgrad.DecentralizedKFAC(model, graph="complete", momentum=0.5, **OPTIONS)
    for step in range(8):
        x, y = share(rank, step)
        optimizer.zero_grad()
        (summed_loss(model(x), y) / len(y)).backward()
        optimizer.step()
    return weights(model)


def joint() -> Tensor:
    model = make("mlp")
    rule = natgrad.StepRule(length="lr")
    optimizer = natgrad.KFAC(model, momentum=0.5, step_rule=rule, **OPTIONS)
    for step in range(8):
        x, y = batch("mlp", step)
        optimizer.zero_grad()
        (summed_loss(model(x), y) / len(y)).backward()
        optimizer.step()
    return weights(model)


def data_of(agent: int) -> tuple[Tensor, Tensor]:
    """Return a regression of one agent, which differs from that of the others."""
    x = normal(12, 3, seed=agent) * (1 + agent)
    return x, x @ normal(3, 2, seed=50 + agent) + agent


def regression(rank: int, graph: Any) -> dict[str, Any]:
    """Fit what all agents have, starting from weights of one's own."""
    torch.manual_seed(rank)
    model = nn.Linear(3, 2).double()
    x, y = data_of(rank)
    options = {**OPTIONS, "lr": 0.5, "damping": 1e-3}
    optimizer = natgrad.DecentralizedKFAC(model, nn.MSELoss(), graph=graph, **options)
    gaps = []
    for _ in range(60):
        optimizer.zero_grad()
        functional.mse_loss(model(x), y).backward()
        optimizer.step()
        every = [torch.empty_like(weights(model)) for _ in range(AGENTS)]
        torch.distributed.all_gather(every, weights(model))
        gaps.append(float((torch.stack(every) - torch.stack(every).mean(0)).norm()))
    return {"weights": weights(model), "gaps": gaps, "gap": optimizer.gossip.spectral_gap}


def principal(rank: int) -> Tensor:
    """Find the leading direction of the data of all agents, on the sphere."""
    torch.manual_seed(rank)
    model = nn.Linear(5, 1, bias=False).double()
    x = normal(40, 5, seed=rank) * torch.tensor([1.0, 1.0, 3.0, 1.0, 1.5]).double()
    optimizer = natgrad.DecentralizedKFAC(
        model, nn.MSELoss(), manifolds={"weight": "sphere"}, graph="ring", lr=0.3, damping=1.0,
        fisher="exact", refresh=REFRESH,
    )  # fmt: skip
    for _ in range(60):
        optimizer.zero_grad()
        (-0.5 * model(x).square().mean()).backward()
        optimizer.step()
    return weights(model)


def broken(rank: int) -> dict[str, Any]:
    """One agent has a batch with NaN; the run is saved and goes on."""
    model = make("mlp")
    optimizer = natgrad.DecentralizedKFAC(model, **OPTIONS)
    states = []
    for step in range(6):
        x, y = share(rank, step)
        if step == 2 and rank == 1:
            x = x * torch.nan
        if step == 4:
            states.append(
                (
                    copy.deepcopy(optimizer.state_dict()),
                    {k: v.clone() for k, v in model.state_dict().items()},
                )
            )
        optimizer.zero_grad()
        (summed_loss(model(x), y) / len(y)).backward()
        optimizer.step()
    resumed = make("mlp")
    second = natgrad.DecentralizedKFAC(resumed, **OPTIONS)
    second.load_state_dict(states[0][0])
    resumed.load_state_dict(states[0][1])
    for step in (4, 5):
        x, y = share(rank, step)
        second.zero_grad()
        (summed_loss(resumed(x), y) / len(y)).backward()
        second.step()
    return {"weights": weights(model), "resumed": weights(resumed)}


def meeting(rank: int) -> list[Tensor]:
    gossip = Gossip("ring")
    value = normal(5, seed=rank)
    found = [value]
    for _ in range(12):
        found.append(gossip.mixed([found[-1], torch.ones(2)])[0])
    return found


def agents(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {"meeting": meeting(rank), "agreed": agreed(rank)}
    found["ring"], found["complete"] = regression(rank, "ring"), regression(rank, "complete")
    found["principal"], found["broken"] = principal(rank), broken(rank)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return processes.run(agents, world=AGENTS)


@pytest.mark.slow
def test_gossip_reaches_the_mean_at_the_rate_of_the_spectral_gap(found: Any) -> None:
    values = torch.stack([torch.stack(each["meeting"]) for each in found])  # (agents, rounds, 5)
    mean = values[:, 0].mean(0)
    torch.testing.assert_close(values.mean(0), mean.expand(13, 5))
    w = mixing_matrix("ring", AGENTS)
    for number in range(13):
        expected = torch.linalg.matrix_power(w, number) @ values[:, 0]
        torch.testing.assert_close(values[:, number], expected)
    distances = (values - mean).norm(dim=(0, 2))
    gap = Gossip("ring").spectral_gap
    assert gap == 1.0  # Of one process.
    rate = float(torch.linalg.eigvalsh(w).abs().sort().values[-2])
    assert (distances[1:] <= (rate + 1e-12) * distances[:-1]).all()


@pytest.mark.slow
def test_the_complete_graph_is_kfac_on_the_joint_batch(found: Any) -> None:
    expected, start = joint(), weights(make("mlp"))
    for each in found:
        assert float((each["agreed"] - expected).norm() / (expected - start).norm()) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["ring", "complete"])
def test_agents_agree_on_the_solution_of_all(found: Any, graph: str) -> None:
    x, y = (torch.cat(each) for each in zip(*map(data_of, range(AGENTS)), strict=True))
    inputs = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    solution = torch.linalg.lstsq(inputs, y).solution
    expected = torch.cat([solution[:3].T.flatten(), solution[3]])
    for each in found:
        torch.testing.assert_close(each[graph]["weights"], expected, rtol=1e-5, atol=1e-5)
        assert each[graph]["gaps"][-1] < 1e-5 * each[graph]["gaps"][0] + 1e-9


@pytest.mark.slow
def test_a_larger_gap_agrees_faster(found: Any) -> None:
    ring, complete = found[0]["ring"], found[0]["complete"]
    assert complete["gap"] == pytest.approx(1.0) and ring["gap"] == pytest.approx(2 / 3)
    assert all(
        b <= a + 1e-12 for a, b in zip(ring["gaps"][:20], complete["gaps"][:20], strict=True)
    )


@pytest.mark.slow
def test_the_leading_direction_is_found_on_the_sphere(found: Any) -> None:
    scale = torch.tensor([1.0, 1.0, 3.0, 1.0, 1.5]).double()
    x = torch.cat([normal(40, 5, seed=agent) * scale for agent in range(AGENTS)])
    leading = torch.linalg.eigh(x.T @ x / len(x)).eigenvectors[:, -1]
    for each in found:
        w = each["principal"]
        assert float(w.norm()) == pytest.approx(1.0)
        assert float((w @ leading).abs()) > 1 - 1e-6


@pytest.mark.slow
def test_a_broken_batch_stops_nobody_and_runs_resume(found: Any) -> None:
    for each in found:
        assert each["broken"]["weights"].isfinite().all()
        torch.testing.assert_close(
            each["broken"]["resumed"], each["broken"]["weights"], rtol=1e-12, atol=1e-14
        )


# -- one agent -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_one_agent_is_kfac() -> None:
    model, twin = make("mlp"), make("mlp")
    agent = natgrad.DecentralizedKFAC(model, weight_decay=0.1, **OPTIONS)
    alone = natgrad.KFAC(
        twin, weight_decay=0.1, momentum=0.0, step_rule=natgrad.StepRule(length="lr"), **OPTIONS
    )
    for step in range(6):
        x, y = batch("mlp", step)
        for one, optimizer in ((model, agent), (twin, alone)):
            optimizer.zero_grad()
            (summed_loss(one(x), y) / len(y)).backward()
            optimizer.step()
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-11, atol=1e-13)


def test_what_agents_cannot_do_together_is_refused() -> None:
    measured = natgrad.StepRule(length=natgrad.MeasuredLength())
    for options in ({"step_rule": measured}, {"damping": natgrad.RelativeDamping()}):
        with pytest.raises(ValueError, match="agents decide about no length together"):
            natgrad.DecentralizedKFAC(make("mlp"), **options)
    for manifolds in ({"nothing": "sphere"}, {"0.weight": "torus"}):
        with pytest.raises(ValueError, match="manifolds must map patterns"):
            natgrad.DecentralizedKFAC(make("mlp"), manifolds=manifolds)  # type: ignore[arg-type]
    vectors = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="'0.bias' of shape .* is no matrix"):
        natgrad.DecentralizedKFAC(vectors, manifolds={"*": "stiefel"})
    with pytest.raises(ValueError, match="'1.bias' is zero"):
        natgrad.DecentralizedKFAC(vectors, manifolds={"1.bias": "sphere"})
    assert not any(layer._forward_hooks for layer in vectors)
    model = make("mlp")
    for options in ({"graph": "star"}, {"manifolds": {"nothing": "sphere"}}):
        with pytest.raises(ValueError):
            natgrad.DecentralizedKFAC(model, **options)
    assert not any(module._forward_hooks for module in model.modules())

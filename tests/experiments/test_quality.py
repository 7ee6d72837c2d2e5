import copy

import pytest
import torch

from natgrad import fisher_matrix, update_quality
from natgrad.experiments import quality
from natgrad.experiments.compare import compare
from natgrad.experiments.config import CompareConfig
from natgrad.experiments.models import build_model
from natgrad.experiments.objectives import OBJECTIVES
from natgrad.experiments.quality import STRUCTURES, measure_quality
from natgrad.fisher import FISHER_TYPES
from tests.cases import generator, normal


@pytest.fixture(params=["mse", "cross_entropy"])
def problem(request):
    objective = OBJECTIVES[request.param]
    model = build_model("mlp", (1, 3, 3), 3, width=12, depth=3, seed=0).double()
    labels = torch.randint(0, 3, (7,), generator=generator())
    targets = objective.encode(labels, 3)
    if targets.is_floating_point():
        targets = targets.double()
    return model, objective, normal(7, 1, 3, 3), targets


def test_shares_are_those_of_the_best_decrease(problem):
    model, objective, inputs, targets = problem
    before = copy.deepcopy(model.state_dict())
    moved = {name: value + 0.1 for name, value in before.items()}
    points = measure_quality(model, {0: before, 5: moved}, objective, inputs, targets)
    assert len(points) == 2 * len(STRUCTURES) * len(FISHER_TYPES)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    found = {(p.step, p.structure, p.fisher): p.share for p in points}
    model.load_state_dict(moved)
    loss = objective(model(inputs), targets)
    names = [name for name, _ in model.named_parameters()]
    gradient = dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    best = {}
    for fisher in ("exact", "empirical"):
        matrix = fisher_matrix(model, (inputs, targets), objective.likelihood, "full", fisher)
        rows = 21 if fisher == "exact" else 7
        update = matrix.solve(gradient, 1e-3 * float(matrix.trace()) / rows)
        data = (inputs, targets)
        best[fisher] = update_quality(model, data, update, objective.likelihood).best_decrease
    assert found[5, "full", "exact"] == 1.0
    share = best["empirical"] / best["exact"]
    assert found[5, "full", "empirical"] == pytest.approx(share, rel=1e-6)
    # Damping costs the reference a little; nothing else can beat the natural gradient.
    assert all(share is not None and 0 < share < 1.05 for share in found.values())


def test_what_fails_has_no_share(problem, monkeypatch):
    model, objective, inputs, targets = problem
    real = quality.fisher_matrix

    def fail(model, data, likelihood, structure, fisher, **options):
        if structure == "kfac":
            raise RuntimeError("singular")
        return real(model, data, likelihood, structure, fisher, **options)

    monkeypatch.setattr(quality, "fisher_matrix", fail)
    points = measure_quality(model, {0: model.state_dict()}, objective, inputs, targets)
    assert {p.structure for p in points if p.share is None} == {"kfac"}


def test_comparisons_measure_it_along_the_run_of_the_first_method():
    config = CompareConfig(
        methods=("sgd", "exact"),
        train_samples=20,
        test_samples=10,
        width=8,
        steps=10,
        first_order_steps=20,
        search_steps=2,
    )
    results = compare(config)
    assert list(dict.fromkeys(p.step for p in results.quality)) == [0, 2, 20]
    silent = CompareConfig(**{**config.__dict__, "quality": False})
    assert compare(silent).quality == []

"""Averages of weights: against sums over the iterates, for every kind of optimizer."""

from __future__ import annotations

import copy
import io
from contextlib import nullcontext

import pytest
import torch
import torch.distributed.checkpoint
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from tests.optim.every_optimizer import KINDS, STEPS, make_model, weights

WAYS = [{"decay": 0.7}, {"start": 0}, {"start": 3}, {"decay": 0.7, "start": 2}]


def expected(iterates: list[Tensor], decay: float | None = None, start: int = 0) -> Tensor:
    """Return the average by its definition."""
    chosen = torch.stack(iterates[start:])
    ages = torch.arange(len(chosen) - 1, -1, -1, dtype=torch.float64)
    weight = (1.0 if decay is None else decay) ** ages
    return (weight / weight.sum()) @ chosen.double()


def averaged(average: natgrad.WeightAverage, model: nn.Module) -> Tensor:
    with average.applied():
        return weights(model)


def normalized(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).double()


def images(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 1, 6, 6, generator=generator).double() + seed
    return x, torch.randint(0, 3, (8,), generator=generator)


def sgd(model: nn.Module, **options: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **({"lr": 0.1, "momentum": 0.9} | options))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        x, y = images(seed)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()


# -- what is averaged ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "way"),
    [("SGD", way) for way in WAYS] + [(name, WAYS[-1]) for name in STEPS],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_the_average_is_that_of_the_iterates(name, way):
    """It begins with the first step that counts, and training does not notice it."""
    alone, model = make_model(), make_model()
    kind = KINDS.get(name, KINDS["Padam"])
    optimizers = [sgd(m) if name == "SGD" else kind.make(m) for m in (alone, model)]
    average = natgrad.WeightAverage(optimizers[1], model, **way)
    iterates: list[Tensor] = []
    for _ in range(5):
        kind.step(optimizers[0], alone)
        kind.step(optimizers[1], model)
        iterates.append(weights(model))
        assert torch.equal(iterates[-1], weights(alone))
        begun = len(iterates) > way.get("start", 0)
        now = expected(iterates, **way) if begun else iterates[-1]
        torch.testing.assert_close(averaged(average, model), now, rtol=1e-12, atol=1e-14)
    assert (iterates[0] - iterates[-1]).norm() > 1e-4


def test_a_model_that_takes_another_type_later_is_averaged_in_it():
    model = nn.Linear(3, 2)
    optimizer = sgd(model, lr=1e-2, momentum=0.0)
    average, iterates = natgrad.WeightAverage(optimizer, model, start=0), []
    model.double()
    for step in range(1, 4):
        for p in model.parameters():
            p.grad = p.detach() / step
        optimizer.step()
        iterates.append(weights(model))
    torch.testing.assert_close(averaged(average, model), expected(iterates), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_in_float32(dtype):
    """Of many iterates, too, which moves by less than half precision knows would lose."""
    model = nn.Linear(3, 2).to(dtype)
    optimizer = sgd(model, lr=1e-2, momentum=0.0)
    average = natgrad.WeightAverage(optimizer, model, start=0)
    iterates = []
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
        optimizer.step()
        iterates.append(weights(model))
    exact = expected(iterates)
    found = torch.cat([v.flatten() for v in average.state_dict()["averages"].values()])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(averaged(average, model), found.to(dtype))


def test_skipped_steps_do_not_count():
    model = make_model()
    optimizer = natgrad.KFAC(model, "gaussian", lr=0.1)
    average = natgrad.WeightAverage(optimizer, start=0)
    iterates = []
    for step in range(5):
        KINDS["KFAC"].step(optimizer, model)
        iterates.append(weights(model))
        if step in (1, 3):
            optimizer.zero_grad()
            (float("nan") * model(torch.ones(2, 5).double()).square().sum()).backward()
            with pytest.warns(match="skipped") if step == 1 else nullcontext():
                optimizer.step()
    assert average.steps == 5
    torch.testing.assert_close(averaged(average, model), expected(iterates))


@pytest.mark.filterwarnings("ignore:.*trains from now on")
def test_parameters_that_come_and_go():
    """A parameter is averaged over the steps it was trained in; a frozen one is what it is."""
    model = make_model()
    model[2].bias.requires_grad_(False)
    optimizer = natgrad.KFAC(model, "gaussian", lr=0.1)
    average = natgrad.WeightAverage(optimizer, start=0)
    parameters: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for step in range(8):
        if step == 3:
            model[2].bias.requires_grad_(True)
        if step == 5:
            with torch.no_grad():
                model[0].weight = nn.Parameter(model[0].weight + 1.0)
            parameters["0.weight"] = []
        KINDS["KFAC"].step(optimizer, model)
        for name, p in model.named_parameters():
            if p.requires_grad:
                parameters[name].append(p.detach().flatten().clone())
    assert [len(one) for one in parameters.values()] == [3, 8, 8, 5]
    with average.applied():
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach().flatten(), expected(parameters[name]))


def test_a_group_that_is_added_to_any_optimizer():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    average = natgrad.WeightAverage(optimizer, model, decay=0.9)
    for _ in range(2):
        model(torch.ones(4, 2)).sum().backward()
        optimizer.step()
    assert set(average.state_dict()["averages"]) == {"0.weight", "0.bias"}
    optimizer.add_param_group({"params": model[1].parameters()})
    optimizer.step()
    counts = {"0.weight": 3, "0.bias": 3, "1.weight": 1, "1.bias": 1}
    assert average.state_dict()["counts"] == counts
    assert torch.equal(average.state_dict()["averages"]["1.weight"], model[1].weight)


def test_a_moment_when_averaging_ends():
    model = make_model()
    average = natgrad.WeightAverage(sgd(model), model, decay=0.5)
    KINDS["Padam"].step(average.optimizer, model)
    before = averaged(average, model)
    average.remove()
    KINDS["Padam"].step(average.optimizer, model)
    assert torch.equal(averaged(average, model), before)


# -- values exchanged ------------------------------------------------------------------------------


def test_the_exchange_leaves_no_trace():
    """Also where the body raises, writes into buffers, or makes gradients."""
    model = normalized()
    optimizer = natgrad.KFAC(model, lr=0.1)
    average = natgrad.WeightAverage(optimizer, decay=0.5)
    train(model, optimizer, range(4))
    x, _ = images(9)
    twin, second, other = copy.deepcopy((model, optimizer, average))
    before, objects = copy.deepcopy(model.state_dict()), list(model.parameters())
    with pytest.raises(KeyError), average.applied() as applied:
        assert applied is model and all(map(lambda a, b: a is b, model.parameters(), objects))
        assert not torch.equal(model[0].weight, before["0.weight"])
        model.train()(x)
        with average.applied():  # Twice is once.
            assert torch.equal(model[0].weight, average.state_dict()["averages"]["0.weight"])
        raise KeyError
    state = model.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[k], before[k]) for k in state)
    train(model, optimizer, range(4, 7))
    train(twin, second, range(4, 7))
    assert torch.equal(weights(model), weights(twin))
    assert torch.equal(averaged(average, model), averaged(other, twin))


def test_a_step_inside_is_refused():
    model = make_model()
    optimizer = sgd(model)
    average = natgrad.WeightAverage(optimizer, model, decay=0.5)
    KINDS["Padam"].step(optimizer, model)
    before = weights(model)
    with pytest.raises(RuntimeError, match="leave the block first"), average.applied():
        KINDS["Padam"].step(optimizer, model)
    assert torch.equal(weights(model), before)
    KINDS["Padam"].step(optimizer, model)
    assert average.steps == 2


def test_compiled_models_see_the_exchange():
    model = make_model()
    compiled = torch.compile(model, backend="eager")
    optimizer = sgd(model)
    average = natgrad.WeightAverage(optimizer, compiled, start=0)
    x = torch.randn(3, 5).double()
    for _ in range(3):
        KINDS["Padam"].step(optimizer, compiled)
    exact = copy.deepcopy(model)
    exact.load_state_dict(average.state_dict()["averages"])
    plain = compiled(x)
    with average.applied():
        torch.testing.assert_close(compiled(x), exact(x))
    assert torch.equal(compiled(x), plain) and not torch.allclose(plain, exact(x))


# -- statistics of batch norms ---------------------------------------------------------------------


def test_running_statistics_are_averaged_with_the_weights():
    model = normalized()
    optimizer = natgrad.KFAC(model, lr=0.1)
    average = natgrad.WeightAverage(optimizer, decay=0.8)
    statistics = []
    for seed in range(5):
        train(model, optimizer, range(seed, seed + 1))
        statistics.append(torch.cat([model[1].running_mean, model[1].running_var]))
    with average.applied():
        found = torch.cat([model[1].running_mean, model[1].running_var])
    torch.testing.assert_close(found, expected(statistics, 0.8))
    assert model[1].num_batches_tracked == 5


def test_statistics_are_measured_under_the_average():
    """As those of a copy that has the average weights; the model keeps its own, and its modes."""
    model = normalized()
    model.append(nn.Dropout(0.5).eval())
    optimizer = natgrad.KFAC(model, lr=0.1)
    average = natgrad.WeightAverage(optimizer, start=0)
    train(model, optimizer, range(5))
    exact = copy.deepcopy(model)
    exact.load_state_dict(average.state_dict()["averages"], strict=False)
    data = [images(seed) for seed in range(4)]
    torch.optim.swa_utils.update_bn(data, exact)
    before = copy.deepcopy(model.state_dict())
    average.update_statistics(data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and not model[-1].training
    with average.applied():
        torch.testing.assert_close(model[1].running_mean, exact[1].running_mean)
        torch.testing.assert_close(model[1].running_var, exact[1].running_var)
    assert not torch.allclose(exact[1].running_var, before["1.running_var"])


# -- checkpoints and copies ------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("natural", [True, False])
def test_a_resumed_average_continues_to_the_last_bit(natural, way):
    def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, natgrad.WeightAverage]:
        model = normalized(seed)
        optimizer = natgrad.KFAC(model, lr=0.1) if natural else sgd(model)
        return model, optimizer, natgrad.WeightAverage(optimizer, model, **way)

    through = start(0)
    train(*through[:2], range(4))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in through], file)
    file.seek(0)
    resumed = start(1)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    copied = copy.deepcopy(through)
    for model, optimizer, _ in (through, resumed, copied):
        train(model, optimizer, range(4, 9))
    states = [average.state_dict() for _, _, average in (through, resumed, copied)]
    for state in states[1:]:
        assert state["steps"] == 9 and state["counts"] == states[0]["counts"]
        for name, value in state["averages"].items():
            assert torch.equal(value, states[0]["averages"][name])


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_distributed_checkpoints_hold_it(tmp_path):
    models = [make_model(), make_model(seed=1)]
    averages = [natgrad.WeightAverage(sgd(model), model, decay=0.5) for model in models]
    for _ in range(3):
        KINDS["Padam"].step(averages[0].optimizer, models[0])
    checkpoint = torch.distributed.checkpoint
    checkpoint.save({"average": averages[0]}, checkpoint_id=tmp_path)
    checkpoint.load({"average": averages[1]}, checkpoint_id=tmp_path)
    assert torch.equal(averaged(averages[0], models[0]), averaged(averages[1], models[1]))
    assert averages[1].steps == 3


# -- errors ----------------------------------------------------------------------------------------


def test_errors_are_clear():
    model = make_model()
    optimizer = sgd(model)
    for arguments, options, kind, words in (
        ((model,), {"decay": 0.5}, TypeError, "takes an optimizer .* got Sequential"),
        ((optimizer,), {"decay": 0.5}, ValueError, "SGD does not know its model"),
        ((optimizer, model), {}, ValueError, "needs decay= .* or start="),
        ((optimizer, model), {"decay": 1.0}, ValueError, r"decay must be in \[0, 1\)"),
        ((optimizer, model), {"start": -1}, ValueError, "start must be an integer of at least 0"),
        ((optimizer, model), {"start": 0.75}, ValueError, "start must be an integer of at least 0"),
        ((optimizer, make_model()), {"start": 0}, ValueError, "trains 4 parameters that the model"),
    ):
        with pytest.raises(kind, match=words):
            natgrad.WeightAverage(*arguments, **options)
    average = natgrad.WeightAverage(optimizer, model, start=0)
    KINDS["Padam"].step(optimizer, model)
    before = averaged(average, model)
    wide = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    other = natgrad.WeightAverage(sgd(wide), wide, start=0).state_dict()
    for state, words in (
        (other, "another model: '0.weight'"),
        (optimizer.state_dict(), "no state"),
    ):
        with pytest.raises(ValueError, match=words):
            average.load_state_dict(state)
    assert torch.equal(averaged(average, model), before)

"""What torch.optim promises, of every optimizer: the generic checks of torch's own tests."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import natgrad
from tests.optim.every_optimizer import KINDS, STEPS, loss, make_model, weights

pytestmark = pytest.mark.filterwarnings("ignore")

NATURAL = [name for name, kind in KINDS.items() if kind.is_natural]
FIRST_ORDER = [name for name, kind in KINDS.items() if kind.takes == "parameters"]
FREE = [name for name, kind in KINDS.items() if kind.takes != "residuals"]
FEW = ["KFAC", "SINGD", "ExactNGD", "EGN", "FNGD", "Padam", "ImplicitSGD", "ResidualNGD"]
NO_CLOSURE = [name for name in FREE if not KINDS[name].needs_closure]


def some(first: Any, *others: Any, names: Any = tuple(KINDS)) -> list[tuple[str, Any]]:
    """Return optimizers with the first value of an option, and few of them with the others."""
    few = [(name, other) for name in FEW if name in names for other in others]
    return [*((name, first) for name in KINDS if name in names), *few]


@pytest.fixture(params=list(KINDS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


each_step = pytest.mark.parametrize("name", STEPS)


def trained(name: str, steps: int = 2, **options: Any) -> tuple[Any, nn.Module]:
    model = make_model()
    optimizer = KINDS[name].make(model, **options)
    for _ in range(steps):
        KINDS[name].step(optimizer, model)
    return optimizer, model


def assert_goes_on_alike(name: str, *pairs: tuple[Any, nn.Module]) -> None:
    for _ in range(3):
        for optimizer, model in pairs:
            KINDS[name].step(optimizer, model)
        for _, model in pairs:
            assert torch.equal(weights(model), weights(pairs[0][1]))


# -- steps -----------------------------------------------------------------------------------------


def test_goes_the_right_direction(name: str):
    model = make_model()
    before = float(loss(model).detach())
    optimizer = KINDS[name].make(model)
    assert isinstance(optimizer, torch.optim.Optimizer) and type(optimizer).__name__ in repr(
        optimizer
    )
    for _ in range(8):
        KINDS[name].step(optimizer, model)
    assert float(loss(model).detach()) < before


@each_step
def test_schedulers_change_the_rate(name: str):
    optimizer, model = trained(name, 0, lr=0.05)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=4)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for step in range(4):
        KINDS[name].step(optimizer, model)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * (1 - step / 8))
        scheduler.step()
    plateau.step(1.0)
    plateau.step(2.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0025)


@pytest.mark.parametrize(("name", "shape"), some((), (1,), names=STEPS))
def test_tensor_rate(name: str, shape: tuple[int, ...]):
    rate = torch.full(shape, 0.03)
    plain, tensor = trained(name, 3, lr=float(rate)), trained(name, 3, lr=rate)
    assert torch.equal(weights(plain[1]), weights(tensor[1]))
    assert isinstance(tensor[0].param_groups[0]["lr"], Tensor)
    rate.mul_(2)  # As schedulers do.
    plain[0].param_groups[0]["lr"] = float(rate)
    assert_goes_on_alike(name, plain, tensor)


def test_two_rates_are_refused(name: str):
    with pytest.raises(ValueError, match="lr must be a number or a tensor of one element"):
        trained(name, 0, lr=torch.tensor([0.1, 0.1]))


@pytest.mark.parametrize(("name", "lr"), some(-1.0, float("nan"), float("inf")))
def test_rates_out_of_range_are_refused(name: str, lr: float):
    with pytest.raises(ValueError, match="lr must be"):
        trained(name, 0, lr=lr)


@pytest.mark.parametrize("name", NO_CLOSURE)
def test_nothing_moves_without_gradients(name: str):
    optimizer, model = trained(name, 1, momentum=0.0) if name in NATURAL else trained(name, 0)
    start = weights(model)
    optimizer.zero_grad()
    if name != "KFAC, quadratic model":  # That one says what is missing.
        optimizer.step()
        assert torch.equal(weights(model), start)


@pytest.mark.parametrize("name", NO_CLOSURE)
def test_nothing_moves_with_zero_gradients(name: str):
    optimizer, model = trained(name, 0)
    start = weights(model)
    optimizer.zero_grad()
    (0.0 * loss(model)).backward()
    optimizer.step()
    assert torch.equal(weights(model), start)


def test_climbing_is_named(name: str):
    if name == "Padam":
        model, other = make_model(), make_model()
        down = KINDS[name].make(model)
        up = KINDS[name].make(other, maximize=True)
        loss(model).backward()
        (-loss(other)).backward()
        down.step()
        up.step()
        assert torch.equal(weights(model), weights(other))
        return
    with pytest.raises(TypeError, match="unexpected keyword argument 'maximize'"):
        KINDS[name].cls(make_model(), maximize=True)


# -- hooks and closures ----------------------------------------------------------------------------


@functools.cache
def wrap_all_steps() -> None:
    """Make one optimizer of every class: torch then wraps its step."""
    for other in KINDS.values():
        other.make(make_model())


@each_step
def test_step_hooks_are_called_once(name: str):
    wrap_all_steps()
    optimizer, model = trained(name, 0)
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("all before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("all after")),
    ]
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    try:
        KINDS[name].step(optimizer, model)
    finally:
        for handle in handles:
            handle.remove()
    once = ["all before", "before", "after", "all after"]
    if name == "ImplicitSGD":  # An optimizer of torch solves the inner problem.
        seen = [seen[0], *(one for one in seen if not one.startswith("all")), seen[-1]]
    assert seen == once


@pytest.mark.parametrize(
    ("name", "form"),
    some("backpropagates", "returns the graph", "returns a number", names=set(STEPS) & set(FREE)),
)
def test_closures(name: str, form: str):
    """All take the closures of LBFGS, and losses with their graph."""
    pairs = [trained(name, 0), trained(name, 0)]

    def closure() -> Any:
        optimizer, model = pairs[1]
        optimizer.zero_grad()
        value = loss(model)
        if form != "returns the graph":
            value.backward()
        return float(value.detach()) if form == "returns a number" else value

    for _ in range(3):
        start = loss(pairs[1][1]).detach()
        KINDS[name].step(*pairs[0], by_closure=True)
        returned = pairs[1][0].step(closure)
        assert float(returned) == pytest.approx(float(start), rel=1e-12)
        assert torch.equal(weights(pairs[0][1]), weights(pairs[1][1]))


def test_residuals_need_no_closure():
    optimizer, _ = trained("ResidualNGD", 0)
    with pytest.raises(ValueError, match="takes no closure"):
        optimizer.step(lambda: 0.0)


# -- parameters ------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Layers of two floating-point types."""

    def __init__(self, first: torch.dtype, second: torch.dtype) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 6).to(first), nn.LayerNorm(6).to(first)
        self.second = nn.Linear(6, 3).to(second)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x.to(self.first.weight.dtype))))
        out = self.second(hidden.to(self.second.weight.dtype))
        return out.to(torch.promote_types(out.dtype, torch.float32))


TYPES = [
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize(("name", "types"), some(*TYPES, names=FREE))
def test_layers_of_several_types(name: str, types):
    torch.manual_seed(0)
    model = Mixed(*types)
    before = float(loss(model).detach())
    optimizer = KINDS[name].make(model)
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(5):
        KINDS[name].step(optimizer, model)
    for parameter, old in zip(model.parameters(), start, strict=True):
        assert parameter.dtype == old.dtype and not torch.equal(parameter, old)
    assert float(loss(model).detach()) < before


def test_types_are_those_of_a_uniform_model():
    """In float64 the parts of a mixed model are what they are in a model of one type."""
    models = [Mixed(torch.float64, torch.float64)]
    models.append(copy.deepcopy(models[0]))
    models[1].first.float(), models[1].norm.float()
    for name in ("KFAC", "ExactNGD", "KFAC, quadratic model"):
        found = []
        for model in map(copy.deepcopy, models):
            optimizer = KINDS[name].make(model)
            start = weights(model)
            KINDS[name].step(optimizer, model)
            found.append(weights(model) - start)
        assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-4


class Filter(nn.Module):
    """Multiplies every frequency of its inputs by a number."""

    def __init__(self) -> None:
        super().__init__()
        values = torch.linspace(0.5, 1.5, 4) * torch.exp(torch.tensor(0.5j))
        self.weight = nn.Parameter(values.to(torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=6)


def make_filtering() -> nn.Sequential:
    model = make_model()
    model.insert(1, Filter())
    return model


@each_step
def test_complex_parameters_are_left_to_the_fallback(name: str):
    model = make_filtering()
    before = float(loss(model).detach())
    if not KINDS[name].is_natural:
        with pytest.raises(ValueError, match=r"is torch\.complex128, .* real parameters only"):
            KINDS[name].make(model)
        return
    with pytest.warns(UserWarning, match="1.weight .complex: only real") as told:
        optimizer = KINDS[name].make(model)
    assert len([one for one in told if "1.weight" in str(one.message)]) == 1
    assert "complex: only real parameters are preconditioned" in str(optimizer.summary())
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(5):
        KINDS[name].step(optimizer, model)
    for parameter, old in zip(model.parameters(), start, strict=True):
        assert parameter.dtype == old.dtype and not torch.equal(parameter, old)
    assert float(loss(model).detach()) < before


def test_models_of_complex_parameters_alone_are_refused():
    model = nn.Linear(3, 3, dtype=torch.complex128)
    with pytest.raises(ValueError, match=r"'weight' is torch\.complex128, .* real"):
        natgrad.KFAC(model)
    with pytest.raises(ValueError, match=r"'1.weight' is torch\.complex128"):
        natgrad.fisher_matrix(make_filtering(), (torch.zeros(2, 5).double(), torch.zeros(2, 3)))


@pytest.mark.parametrize("name", FREE)
def test_a_tensor_is_no_model(name: str):
    with pytest.raises(TypeError):
        KINDS[name].cls(torch.zeros(3))


# -- copies ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "way"), some("deepcopy", "pickle", "torch.save"))
def test_copies_go_on_alike(name: str, way: str):
    pair = trained(name, 2)
    if KINDS[name].takes == "residuals" and way != "deepcopy":
        pytest.skip("functions are pickled by name, and this one has none")
    if way == "deepcopy":
        other = copy.deepcopy(pair)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(pair))
    else:
        file = io.BytesIO()
        torch.save(pair, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert_goes_on_alike(name, pair, other)


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_copies_keep_options(name: str):
    options: dict[str, Any] = {"partial": 0.3, "eps": 1e-4}
    if name == "ImplicitSGD":
        options = {"inner": "adam", "inner_steps": 3, "tolerance": 0.5, "inner_lr": 0.01}
    pair = trained(name, 1, **options)
    other = copy.deepcopy(pair)
    for key, value in options.items():
        held = other[0].defaults if name == "Padam" else vars(other[0])
        assert held[key] == value
    public = [key for key in dir(pair[0]) if not key.startswith("_")]
    assert public == [key for key in dir(other[0]) if not key.startswith("_")]
    assert_goes_on_alike(name, pair, other)


@pytest.mark.parametrize("name", FEW)
def test_older_state_dicts_load(name: str):
    """Options that a group did not have yet take their defaults."""
    pair, other = trained(name, 2), trained(name, 0)
    state = copy.deepcopy(pair[0].state_dict())
    for group in state["param_groups"]:
        for key in ("maximize", "kl_clip", "param_names", "unit"):
            group.pop(key, None)
    other[0].load_state_dict(state)
    other[1].load_state_dict(pair[1].state_dict())
    assert_goes_on_alike(name, pair, other)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("nesterov", r"give it as step_rule=natgrad\.StepRule\(nesterov=\.\.\.\)"),
        ("decay", r"give it as refresh=natgrad\.Refresh\(decay=\.\.\.\)"),
        ("weight_sharing", r"give it as structure=natgrad\.curvature\.KroneckerFactors\("),
        ("growth", r"StepRule\(length=natgrad\.MeasuredLength\(growth=\.\.\.\)\)"),
        ("kl_clp", "did you mean 'kl_clip'"),
        ("foreach", "its options are model, likelihood, .*structure, lr"),
    ],
)
@pytest.mark.parametrize("kind", [natgrad.KFAC, natgrad.DecentralizedKFAC])
def test_an_unknown_option_is_told_where_it_belongs(kind, option, said):
    with pytest.raises(TypeError, match=f"{kind.__name__} got an unexpected .*{option}.*{said}"):
        kind(make_model(), **{option: 1})


@pytest.mark.parametrize("value", ["x", None, 1j])
def test_what_is_no_number_is_refused_in_one_sentence(value):
    for make in (
        lambda: natgrad.MeasuredLength(memory=value),
        lambda: natgrad.MeasuredLength(start=value),
        lambda: natgrad.MeasuredLength(growth=value),
        lambda: natgrad.MeasuredLength(overshoot=value),
        lambda: natgrad.RelativeDamping(value),
        lambda: natgrad.KFAC(make_model(), momentum=value),
        lambda: natgrad.KFAC(make_model(), damping=value),
    ):
        with pytest.raises(ValueError, match="must be .*, got"):
            make()

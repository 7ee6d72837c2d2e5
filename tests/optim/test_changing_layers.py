"""Layers frozen, unfrozen, added, replaced, left out, or not explained by their rows."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import natgrad
from natgrad.curvature import as_structure
from tests.cases import Routed, normal
from tests.methods import make_optimizer
from tests.optim.every_optimizer import KINDS, loss, make_model, weights

NAMES = ["KFAC", "EKFAC", "SINGD", "FNGD", "ExactNGD", "BlockTridiagonalNGD", "EGN", "KFAC, fused"]


def moved(model: nn.Module, start: dict[str, Tensor]) -> set[str]:
    """Names of the parameters that are not what they were."""
    return {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


# -- unfreezing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_unfrozen_layers_are_trained_and_told(name: str):
    kind, model = KINDS[name], make_model()
    model[0].requires_grad_(False)
    optimizer = kind.make(model)
    start = values(model)
    kind.step(optimizer, model)
    assert moved(model, start) == {"2.weight", "2.bias"}
    model[0].requires_grad_(True)
    with pytest.warns(UserWarning, match=r"trains from now on.*: 0\.weight, 0\.bias"):
        kind.step(optimizer, model)
    assert moved(model, start) == set(start)
    assert len(optimizer.param_groups) == 1
    names = optimizer.param_groups[0]["param_names"]
    assert sorted(names) == sorted(start) and "0" in optimizer.preconditioner.curvature.blocks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind.step(optimizer, model)


@pytest.mark.parametrize("name", NAMES)
def test_passes_of_a_model_frozen_as_a_whole_are_not_its_own(name: str):
    """As those of a discriminator while the generator is trained."""
    ends = []
    for frozen_passes in (False, True):
        kind, model = KINDS[name], make_model()
        optimizer = kind.make(model)
        for _ in range(4):
            kind.step(optimizer, model)
            if frozen_passes:
                model.requires_grad_(False)
                inputs = torch.randn(3, 5, dtype=model[0].weight.dtype, requires_grad=True)
                model(inputs).square().sum().backward()
                assert inputs.grad is not None and bool(inputs.grad.any())
                model.requires_grad_(True)
        ends.append(values(model))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


@pytest.mark.filterwarnings("ignore:.*trains from now on")
@pytest.mark.parametrize(
    ("name", "form"),
    [("KFAC", form) for form in ("list", "generator", "named", "pattern")]
    + [(name, form) for name in NAMES for form in ("module", "one")],
)
def test_added_groups_are_trained_at_their_rate(name: str, form: str):
    kind, model = KINDS[name], make_model()
    model[0].requires_grad_(False)
    optimizer = kind.make(model)
    kind.step(optimizer, model)
    model[0].requires_grad_(True)
    given: dict[str, Any] = {
        "list": {"params": list(model[0].parameters())},
        "generator": {"params": model[0].parameters()},
        "named": {"params": [("a", model[0].weight), ("b", model[0].bias)]},
        "module": {"modules": [model[0]]},
        "pattern": {"params": "0.*"},
        "one": {"params": model[0].weight},
    }[form]
    optimizer.add_param_group({**given, "lr": 0.0})
    start = values(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if form != "one" else "ignore")
        kind.step(optimizer, model)
    at_rest = {"0.weight"} if form == "one" else {"0.weight", "0.bias"}
    assert moved(model, start) == set(start) - at_rest
    optimizer.param_groups[1]["lr"] = 0.01
    kind.step(optimizer, model)
    assert moved(model, start) == set(start)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["KFAC", "FNGD"])
@pytest.mark.parametrize("preconditioned", [True, False])
def test_copies_have_added_groups(name: str, preconditioned: bool):
    kind, model = KINDS[name], make_model()
    model[0].requires_grad_(False)
    optimizer = kind.make(model)
    kind.step(optimizer, model)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": "0.*", "lr": 0.01, "preconditioned": preconditioned})
    kind.step(optimizer, model)
    other, copied = copy.deepcopy((model, optimizer))
    assert [g["lr"] for g in copied.param_groups] == [g["lr"] for g in optimizer.param_groups]
    for _ in range(3):
        kind.step(optimizer, model)
        kind.step(copied, other)
        torch.testing.assert_close(weights(model), weights(other), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["KFAC", "FNGD"])
@pytest.mark.parametrize("given", [{"modules": "children"}, {"params": "parameters"}])
def test_groups_may_be_given_by_iterators(name: str, given: dict[str, str]):
    """As those of ``torch.optim`` often are; copies have the same groups."""
    kind, model = KINDS[name], make_model()
    group = {key: getattr(model[:2], method)() for key, method in given.items()}
    groups = ({**one, "preconditioned": False} for one in [group])
    optimizer = kind.make(model, params=groups)
    held = [g["param_names"] for g in optimizer.param_groups]
    assert held == [["2.weight", "2.bias"], ["0.weight", "0.bias"]]
    kind.step(optimizer, model)
    other, copied = copy.deepcopy((model, optimizer))
    kind.step(optimizer, model)
    kind.step(copied, other)
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-12, atol=0)


def test_wrong_groups_are_refused():
    model = make_model()
    with pytest.raises(TypeError, match=r"params takes parameter groups.*got Parameter"):
        natgrad.KFAC(model, "gaussian", params=model.parameters())
    optimizer = natgrad.KFAC(model, "gaussian")
    before = optimizer.param_groups[:]
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": list(model[0].parameters())})
    with pytest.raises(ValueError, match="no parameters of the model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match="unknown option 'rate'"):
        optimizer.add_param_group({"params": "0.*", "rate": 0.1})
    with pytest.raises(TypeError, match="must be a dict"):
        optimizer.add_param_group([model[0].weight])
    assert optimizer.param_groups == before


def test_a_joint_structure_follows():
    """Exact steps are those of an optimizer made of the layers that are trained at present."""
    model = make_model()
    optimizer = make_optimizer(natgrad.ExactNGD, model, "gaussian", fisher="exact")
    for frozen in (False, True, False):
        model[0].requires_grad_(not frozen)
        twin = copy.deepcopy(model)
        fresh = make_optimizer(natgrad.ExactNGD, twin, "gaussian", fisher="exact")
        KINDS["ExactNGD"].step(optimizer, model)
        KINDS["ExactNGD"].step(fresh, twin)
        torch.testing.assert_close(weights(model), weights(twin), rtol=1e-9, atol=1e-12)


# -- moving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "UnitWiseNGD", "TwoLevelKFAC"])
def test_a_model_that_takes_another_type_later_is_of_that_type(name: str):
    kind, ends = KINDS[name], []
    for converted_first in (True, False):
        model = make_model().float()
        if converted_first:
            model.double()
        optimizer = kind.make(model)
        model.double()
        for _ in range(3):
            kind.step(optimizer, model)
        ends.append(weights(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", ["KFAC", "EKFAC", "SINGD", "DiagonalNGD"])
def test_curvature_goes_with_a_model_that_takes_another_type(name: str):
    model = make_model().float()
    optimizer = KINDS[name].make(model, fisher="exact", lr=0.0)
    for _ in range(3):
        KINDS[name].step(optimizer, model)
    curvature = optimizer.preconditioner.curvature
    before = float(curvature.operator("0").trace())
    model.double()
    loss(model)
    assert curvature.operator("0").dtype == torch.float64
    assert float(curvature.operator("0").trace()) == pytest.approx(before, rel=1e-6)
    assert optimizer.preconditioner.observer.start == 0  # It does not begin anew.
    KINDS[name].step(optimizer, model)


# -- freezing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["KFAC", "EKFAC", "TKFAC", "DiagonalNGD"])
def test_curvature_of_a_frozen_layer_stays(name: str):
    model = make_model()
    optimizer = KINDS[name].make(model, lr=0.0, fisher="exact", factors=1, inverses=1)
    KINDS[name].step(optimizer, model)
    before = float(optimizer.preconditioner.curvature.operator("0").trace())
    model[0].requires_grad_(False)
    for _ in range(100):
        KINDS[name].step(optimizer, model)
    assert "0" not in optimizer.preconditioner.curvature.blocks
    state = copy.deepcopy(optimizer.state_dict())
    other = copy.deepcopy(model)
    resumed = KINDS[name].make(other, lr=0.0, fisher="exact", factors=1, inverses=1)
    with pytest.raises(ValueError, match="holds other parameters"):
        resumed.load_state_dict(state)  # It was made without the layer.
    model[0].requires_grad_(True)
    loss(model)
    after = float(optimizer.preconditioner.curvature.operator("0").trace())
    assert after == pytest.approx(before, rel=1e-12)
    KINDS[name].step(optimizer, model)
    last = float(optimizer.preconditioner.curvature.operator("0").trace())
    assert last == pytest.approx(before, rel=1e-2)


@pytest.mark.parametrize("name", ["KFAC", "EKFAC", "ExactNGD"])
def test_steps_after_a_long_freeze_are_those_of_a_fresh_optimizer(name: str):
    """They move the outputs no further, though the network has changed in between."""
    torch.manual_seed(0)
    model, kind = make_model(), KINDS[name]
    optimizer = kind.make(model, momentum=0.0)
    x = torch.randn(64, 5, dtype=torch.float64)
    for _ in range(20):
        kind.step(optimizer, model)
    model[0].requires_grad_(False)
    for _ in range(150):
        kind.step(optimizer, model)
    with torch.no_grad():
        model[2].weight.mul_(10.0)  # What a long training does to the layers above.
    model[0].requires_grad_(True)
    twin = copy.deepcopy(model)
    fresh = kind.make(twin, momentum=0.0)
    sizes = []
    for one, net in ((optimizer, model), (fresh, twin)):
        before = net(x).detach()
        for _ in range(3):
            kind.step(one, net)
        sizes.append(float((net(x).detach() - before).norm()))
    assert sizes[0] < 2 * sizes[1]


def test_momentum_outlives_a_freeze():
    model = make_model()
    optimizer = natgrad.KFAC(model, "gaussian")
    KINDS["KFAC"].step(optimizer, model)
    buffer = optimizer.state[model[0].weight]["previous_step"].clone()
    model[0].requires_grad_(False)
    KINDS["KFAC"].step(optimizer, model)
    model[0].requires_grad_(True)
    loss(model)
    assert torch.equal(optimizer.state[model[0].weight]["previous_step"], buffer)


def test_what_is_frozen_is_not_taken_back():
    model = make_model()
    optimizer = natgrad.KFAC(model, "gaussian")
    KINDS["KFAC"].step(optimizer, model)
    model[0].requires_grad_(False)
    for p in model.parameters():  # As after a step uphill.
        optimizer.state[p]["previous_step"].neg_()
    optimizer._lengths.state = dataclasses.replace(
        optimizer._lengths.state, slope=1e-9, usual_slope=0.0
    )
    start, taken_back = values(model), optimizer._lengths.state.taken_back
    KINDS["KFAC"].step(optimizer, model)
    assert optimizer._lengths.state.taken_back == taken_back + 1
    assert moved(model, start) == {"2.weight", "2.bias"}


# -- replaced modules ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_replaced_layer_takes_the_place_of_the_old_one(name: str):
    kind, model = KINDS[name], make_model()
    optimizer = kind.make(model, params=[{"modules": [model[2]], "lr": 0.02}])
    kind.step(optimizer, model)
    model[2] = nn.Linear(6, 3).double()
    start = values(model)
    kind.step(optimizer, model)
    assert moved(model, start) == set(start)
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.02 and group["params"] == list(model[2].parameters())


class Projected(nn.Module):
    """A weight of its own, beside which a layer may be put later."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        own = x @ self.weight
        return own + self.adapter(x) if hasattr(self, "adapter") else own


@pytest.mark.parametrize("name", ["KFAC", "EKFAC", "UnitWiseNGD", "DiagonalNGD"])
def test_a_layer_of_another_kind_starts_anew(name: str):
    """A square weight that is multiplied from the other side has the shape of the old one."""
    kind = KINDS[name]
    model = nn.Sequential(nn.Linear(5, 5, bias=False).double(), make_model())
    optimizer = kind.make(model, fisher="exact")
    kind.step(optimizer, model)
    old = optimizer.state_dict()
    model[0] = Projected()
    twin = copy.deepcopy(model)
    fresh = kind.make(twin, fisher="exact")
    kind.step(optimizer, model)
    kind.step(fresh, twin)
    found, expected = (one.preconditioner.curvature.state_dict() for one in (optimizer, fresh))
    assert (found["0"]["draws"], found["1.0"]["draws"]) == (1, 2)
    tensors = {key: one for key, one in expected["0"]["average"].items() if torch.is_tensor(one)}
    assert tensors
    for key, one in tensors.items():
        torch.testing.assert_close(found["0"]["average"][key], one, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="'0' is of another kind of layer"):
        fresh.load_state_dict(old)


@pytest.mark.filterwarnings("ignore:.*trains from now on")
@pytest.mark.parametrize("name", ["KFAC", "EKFAC", "SINGD", "FNGD", "ExactNGD"])
def test_a_renamed_parameter_is_followed(name: str):
    """``prune.remove`` keeps parameters and their order, and changes the name of one."""
    kind, model = KINDS[name], make_model()
    optimizer = kind.make(model)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    kind.step(optimizer, model)
    prune.remove(model[0], "weight")
    start = values(model)
    kind.step(optimizer, model)
    assert "0.weight" in start and moved(model, start) == set(start)
    assert set(optimizer.preconditioner.parameters) == set(start)


@pytest.mark.parametrize("name", ["KFAC", "FNGD", "ExactNGD"])
def test_a_layer_inside_of_what_held_none_is_trained(name: str):
    kind, model = KINDS[name], nn.Sequential(Projected(), make_model())
    optimizer = kind.make(model)
    kind.step(optimizer, model)
    model[0].adapter = nn.Linear(5, 5).double()
    start = values(model)
    with pytest.warns(UserWarning, match=r"trains from now on.*: 0\.adapter\.weight"):
        kind.step(optimizer, model)
    assert moved(model, start) == set(start)


# -- left out --------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A network with a scalar that would need rows of every entry of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale = make_model(), nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.body(x)


def test_no_rows_are_formed_of_what_is_not_preconditioned():
    model = Scaled()
    group = {"params": ["scale"], "preconditioned": False}
    optimizer = natgrad.KFAC(model, "gaussian", params=[group])
    assert set(optimizer.preconditioner.curvature.blocks) == {"body.0", "body.2"}
    found = {layer.name: layer.treatment for layer in optimizer.summary().layers}
    assert found == {"body.0": "kfac", "body.2": "kfac", "scale": "adamw"}
    twin = copy.deepcopy(model)
    adam = torch.optim.AdamW([twin.scale], lr=1e-3)
    loss(twin).backward()
    adam.step()
    KINDS["KFAC"].step(optimizer, model)
    assert torch.equal(model.scale, twin.scale)


# -- not explained by rows -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_untrusted_parameters_go_to_the_fallback(name: str):
    kind, model = KINDS[name], make_model()
    other, options = make_model(), {"lr": 0.1}
    if name in ("KFAC", "EKFAC"):
        # A bound, and the unit of relative damping, are of all layers together.
        options |= {"kl_clip": None, "damping": 1e-3}
    optimizer = kind.make(model, **options)
    reference, twin = kind.make(other, **options), copy.deepcopy(other)
    optimizer.preconditioner.untrusted["0.weight"] = "its rows are made up"
    with pytest.warns(UserWarning, match=r"by adamw: 0\.weight \(its rows are made up\)"):
        kind.step(optimizer, model)
    adam = torch.optim.AdamW([twin[0].weight], lr=3e-3)
    loss(twin).backward()
    adam.step()
    assert torch.equal(model[0].weight, twin[0].weight)
    assert {"exp_avg", "exp_avg_sq", "step"} <= set(optimizer.state[model[0].weight])
    if name in ("ExactNGD", "BlockTridiagonalNGD"):  # This step has no matrix of the others alone.
        assert torch.equal(model[2].weight, other[2].weight)
    if name in ("KFAC", "EKFAC"):  # The other layer's step is its own.
        kind.step(reference, other)
        torch.testing.assert_close(model[2].weight, other[2].weight, rtol=1e-9, atol=0)
    found = {layer.name: layer.treatment for layer in optimizer.summary().layers}
    assert found["0.weight"] == "adamw: its rows are made up"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind.step(optimizer, model)
    assert len(optimizer.param_groups) == 1
    # Its rate follows the group's.
    before = model[0].weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    kind.step(optimizer, model)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_untrusted_parameters_are_saved(name: str):
    kind, model = KINDS[name], make_model()
    optimizer = kind.make(model)
    optimizer.preconditioner.untrusted["0.weight"] = "its rows are made up"
    for _ in range(3):
        kind.step(optimizer, model)
    other = copy.deepcopy(model)
    resumed = kind.make(other)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.preconditioner.untrusted == {"0.weight": "its rows are made up"}
    for _ in range(3):
        kind.step(optimizer, model)
        kind.step(resumed, other)
        assert torch.equal(weights(model), weights(other))


def test_a_preconditioner_leaves_untrusted_gradients():
    model = make_model()
    preconditioner = natgrad.Preconditioner(model, "gaussian")
    loss(model).backward()
    plain = model[0].weight.grad.clone()
    preconditioner.untrusted["0.weight"] = "its rows are made up"
    with pytest.warns(UserWarning, match="leaves the plain gradients"):
        preconditioner.step()
    assert torch.equal(model[0].weight.grad, plain)


# -- order in checkpoints --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["KFAC", "EKFAC", "SINGD"])
def test_checkpoints_find_parameters_by_name(name: str):
    """A layer that joined later stands last in its group, and first where it was never frozen."""
    kind, model = KINDS[name], make_model()
    model[0].requires_grad_(False)
    optimizer = kind.make(model, momentum=0.9)
    kind.step(optimizer, model)
    model[0].requires_grad_(True)
    for _ in range(3):
        kind.step(optimizer, model)
    other = copy.deepcopy(model)
    resumed = kind.make(other, momentum=0.9)
    assert resumed.param_groups[0]["param_names"] != optimizer.param_groups[0]["param_names"]
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        kind.step(optimizer, model)
        kind.step(resumed, other)
        torch.testing.assert_close(weights(model), weights(other), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "structure", ["block_diagonal", "diagonal", "unit_wise", "kfac", "ekfac", "tkfac", "kpsvd"]
)
def test_layers_that_one_of_several_passes_reaches_are_averaged_over_all(structure):
    """As in the Fisher matrix of both batches, and as a joint batch would have it."""
    torch.manual_seed(0)
    model = Routed().double()
    batches = [(sign * normal(n, 3, seed=n).abs(), normal(n, 2)) for n, sign in ((4, 1), (7, -1))]
    chosen = as_structure(structure)
    optimizer = natgrad.NaturalGradient(model, "gaussian", structure=chosen, fisher="exact", lr=0.0)
    for x, y in batches:
        (nn.functional.mse_loss(model(x), y, reduction="sum") / 11).backward()
    optimizer.step()
    found = optimizer.preconditioner.curvature.matrix().to_dense()
    expected = natgrad.fisher_matrix(model, batches, "gaussian", chosen, "exact").to_dense()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert expected.diagonal().min() > 0

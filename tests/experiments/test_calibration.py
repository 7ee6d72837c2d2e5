import copy
import math

import pytest
import torch
from torch import nn

from natgrad.experiments.learning_rates import measured_learning_rate
from natgrad.experiments.objectives import OBJECTIVES


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1.0)


def problem(loss, *layers):
    torch.manual_seed(1)
    model = nn.Sequential(*layers).double()
    inputs, labels = torch.randn(12, 4).double(), torch.randint(3, (12,))
    return model, OBJECTIVES[loss], inputs, OBJECTIVES[loss].encode(labels, 3)


def test_rate_minimises_a_quadratic_loss_along_the_direction():
    model, objective, inputs, targets = problem("mse", nn.Linear(4, 3))
    rate = measured_learning_rate(model, sgd, objective, inputs, targets)

    def loss_after(rate):
        moved = copy.deepcopy(model)
        objective(moved(inputs), targets).backward()
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter -= rate * parameter.grad
            return objective(moved(inputs), targets).item()

    # a parabola is given by three of its points
    left, middle, right = (loss_after(value) for value in (0.0, 1.0, 2.0))
    vertex = (3 * left - 4 * middle + right) / (2 * (left - 2 * middle + right))
    assert rate == pytest.approx(vertex, rel=1e-9)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_rate_is_slope_over_curvature_of_the_dense_fisher_matrix(loss):
    model, objective, inputs, targets = problem(loss, nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    rate = measured_learning_rate(model, sgd, objective, inputs, targets)

    parameters = dict(model.named_parameters())
    outputs = model(inputs)
    gradient = torch.autograd.grad(objective(outputs, targets), list(parameters.values()))
    gradient = torch.cat([part.flatten() for part in gradient])
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (inputs,)))(
        parameters
    )
    jacobian = torch.cat([part.flatten(2) for part in jacobian.values()], dim=2)
    p = outputs.softmax(1)
    hessian = (
        torch.eye(3).double() if loss == "mse" else torch.diag_embed(p) - p[:, :, None] * p[:, None]
    )
    change = jacobian @ gradient
    curvature = (change[:, None] @ hessian @ change[:, :, None]).mean()
    assert rate == pytest.approx((gradient @ gradient / curvature).item(), rel=1e-9)


def test_model_and_its_gradients_are_left_alone():
    model, objective, inputs, targets = problem("mse", nn.Linear(4, 3))
    before = copy.deepcopy(model.state_dict())
    measured_learning_rate(model, sgd, objective, inputs, targets)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_direction_of_ascent_has_no_rate():
    model, objective, inputs, targets = problem("mse", nn.Linear(4, 3))

    def ascent(model):
        return torch.optim.SGD(model.parameters(), lr=1.0, maximize=True)

    assert math.isnan(measured_learning_rate(model, ascent, objective, inputs, targets))

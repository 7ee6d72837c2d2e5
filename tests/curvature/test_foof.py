"""FOOF against gradient descent on the outputs of layers, written step by step."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import nn

import natgrad
from natgrad.capture.rows import RowBuilder
from natgrad.curvature import ForwardOnly
from tests import dense
from tests.cases import CASES, normal


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def expected_step(model: nn.Sequential, x: torch.Tensor, damping: float) -> list[torch.Tensor]:
    """Return ``G (A + λI)⁻¹`` of both layers from their inputs, weight and bias side by side."""
    inputs = [x, torch.tanh(model[0](x)).detach()]
    steps = []
    for layer, a in zip((model[0], model[2]), inputs, strict=True):
        a = torch.cat([a, torch.ones(len(a), 1).double()], 1)
        moment = a.T @ a / len(a) + damping * torch.eye(a.shape[1]).double()
        gradient = torch.cat([layer.weight.grad, layer.bias.grad.unsqueeze(1)], 1)
        steps.append(torch.linalg.solve(moment, gradient.T).T)
    return steps


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_its_step_is_the_gradient_times_the_inverse_moment_of_inputs(damping):
    """By no other backward pass than the user's own."""
    model, x, y = network(), normal(12, 4), torch.arange(12) % 3
    optimizer = natgrad.NaturalGradient(
        model, structure="foof", fisher="empirical", lr=0.1, damping=damping, momentum=0.0,
        kl_clip=None, step_rule=natgrad.StepRule(),
    )  # fmt: skip
    before = [p.detach().clone() for p in model.parameters()]
    with mock.patch.object(RowBuilder, "_fill", side_effect=AssertionError("pulled back")):
        nn.functional.cross_entropy(model(x), y).backward()
        expected = []
        with torch.no_grad():
            for step in expected_step(model, x, damping):
                expected += [step[:, :-1], step[:, -1]]
        optimizer.step()
    for parameter, old, step in zip(model.parameters(), before, expected, strict=True):
        dense.assert_same(parameter.detach() - old, -0.1 * step, 1e-9)


@pytest.mark.parametrize("name", ["mlp", "tokens", "conv2d", "embedding", "layer_norm", "lstm"])
def test_no_output_gradient_is_in_it(name):
    """All Fisher types and likelihoods give one matrix."""
    case = CASES[name]()
    found = [
        natgrad.fisher_matrix(
            case.model, (case.x, case.target(likelihood)), likelihood, "foof", kind,
            output=case.output,
        ).to_dense()
        for likelihood, kind in (
            ("categorical", "exact"), ("categorical", "mc"), ("categorical", "empirical"),
            ("gaussian", "exact"),
        )
    ]  # fmt: skip
    for other in found[1:]:
        dense.assert_same(other, found[0], 1e-12)


def test_a_tied_parameter_keeps_the_trace_of_its_uses():
    """The table's ``I ⊗ A`` and the output layer's ``A' ⊗ I`` make one product."""
    case = CASES["tied_embedding"]()
    found = natgrad.fisher_matrix(case.model, (case.x, case.target("categorical")),
                                  structure=ForwardOnly())  # fmt: skip
    (part,) = [one for one in found.parts.values() if one.layout.names == ("embedding.weight",)]
    model = case.model
    words, size = model.embedding.weight.shape
    counts = torch.bincount(case.x.flatten(), minlength=words).double() / case.x.numel()
    recorded: list[torch.Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda _, args: recorded.append(args[0].detach()))
    model(case.x)
    handle.remove()
    hidden = recorded[0].flatten(0, -2)
    moment = hidden.T @ hidden / len(hidden)
    # Rows of the weight are words, so the table's inputs are on their side.
    uses = [(torch.eye(size).double(), torch.diag(counts)), (moment, torch.eye(words).double())]
    traces = [(a.trace(), b.trace()) for a, b in uses]
    total = sum(a * b for a, b in traces)
    a = sum(u[0] * t[1] for u, t in zip(uses, traces, strict=True)) / total
    b = sum(u[1] * t[0] for u, t in zip(uses, traces, strict=True))
    dense.assert_same(part.to_dense(), torch.kron(b.contiguous(), a.contiguous()), 1e-9)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="weight_sharing"):
        ForwardOnly(weight_sharing="sum")
    with pytest.raises(ValueError, match="rows_per_unit"):
        ForwardOnly(rows_per_unit=0)

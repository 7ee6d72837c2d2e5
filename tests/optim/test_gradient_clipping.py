"""Gradients clipped between ``backward`` and ``step``, with every optimizer's own defaults."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from tests.optim.every_optimizer import KINDS, loss, make_model, weights

NAMES = [name for name, kind in KINDS.items() if kind.is_natural]


def clipped_step(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, share: float):
    """Take a step with a share of the gradient's norm."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), float("inf")))
        nn.utils.clip_grad_norm_(model.parameters(), share * norm)
        return value

    if KINDS[name].needs_closure:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_a_clipped_gradient_shortens_a_step_at_most(name):
    """The direction stays, bounds on the step do not see the factor, and no check complains."""
    moved = []
    for share in (1.0, 0.01):
        model = make_model()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = KINDS[name].make(model)
            steps = []
            for _ in range(4):  # The fourth one finds inverses and, if fused, makes use of them.
                before = weights(model)
                clipped_step(name, model, optimizer, share)
                steps.append(weights(model) - before)
        assert all(step.isfinite().all() and step.any() for step in steps)
        moved.append(steps[0])
    whole, part = moved
    rounding = 1e-4 if "bfloat16" in name else 1e-9
    assert torch.cosine_similarity(whole, part, dim=0) > 1 - rounding
    assert 0.01 - rounding < part.norm() / whole.norm() < 1 + 1e-9

"""Random programs: Fisher matrices and steps equal the dense ones, or what differs is named."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from tests.random_programs import Program, make_program

pytestmark = pytest.mark.filterwarnings("ignore")

#: Programs that a run of the suite tries; ``NATGRAD_PROGRAMS`` asks for more.
PROGRAMS = int(os.environ.get("NATGRAD_PROGRAMS", "240"))

TOLERANCE = 1e-9
DAMPING = 0.1


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def output_of(program: Program, number: int) -> Tensor:
    """Return one pass's output with samples in the first dimension."""
    return program.model(program.batches[number]).movedim(program.batch_dim, 0)


def target_of(program: Program, number: int) -> Tensor:
    return program.targets[number].movedim(program.batch_dim, 0)


def loss_of(program: Program, number: int) -> Tensor:
    """Return the sum of the likelihood's terms, and how many they are."""
    z, y = output_of(program, number), target_of(program, number)
    if program.likelihood == "gaussian":
        return 0.5 * (z - y).square().sum()
    return functional.cross_entropy(z.flatten(0, -2), y.flatten(), reduction="sum")


def count_of(program: Program, number: int) -> int:
    y = target_of(program, number)
    return len(y) if program.likelihood == "gaussian" else int((y != -100).sum())


def dense_fisher(program: Program, number: int) -> Tensor:
    """Return ``Σ JᵀΛJ`` of one pass."""
    z = output_of(program, number)
    parameters = trained(program.model)
    rows = []
    for entry in z.flatten():
        found = torch.autograd.grad(
            entry, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([g.flatten() for g in found]))
    jacobian = torch.stack(rows).reshape(-1, z.shape[-1], len(rows[0]))
    if program.likelihood == "gaussian":
        return torch.einsum("ecp,ecq->pq", jacobian, jacobian)
    p = torch.softmax(z.detach(), -1).reshape(-1, z.shape[-1])
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    kept = (target_of(program, number).flatten() != -100).double()
    return torch.einsum("e,ecp,ecd,edq->pq", kept, jacobian, hessian, jacobian)


def error_of(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def check_fisher(program: Program, expected: Tensor, structures: Sequence[str]) -> None:
    data = list(zip(program.batches, program.targets, strict=True))
    for structure in structures:
        fisher = natgrad.fisher_matrix(
            program.model, data, program.likelihood, structure, batch_dim=program.batch_dim
        )
        found = fisher.to_dense()
        wanted = expected if structure == "full" else torch.diag(expected.diagonal())
        if found.norm() == 0 and wanted.norm() < 1e-12:
            continue
        assert error_of(found, wanted) <= TOLERANCE, f"{structure} of {program.text}"
        wrong = error_of(fisher.diagonal(), expected.diagonal())
        assert wrong <= TOLERANCE, f"diagonal of {structure} of {program.text}"


def check_step(program: Program, passes: list[int], total: Tensor) -> str:
    """Compare a step of ExactNGD; return ``"right"`` or ``"named"``."""
    model = program.model
    parameters = trained(model)
    # Ignored labels are told to the likelihood by the gradient at the output, pass by pass.
    counts = {n: count_of(program, n) for n in passes}
    losses = sum(loss_of(program, n) for n in passes) / sum(counts.values())
    gradient = torch.autograd.grad(losses, parameters, allow_unused=True, materialize_grads=True)
    gradient = torch.cat([g.flatten() for g in gradient])
    damped = total + DAMPING * torch.eye(len(total)).double()
    expected = torch.linalg.solve(damped, gradient)
    before = torch.cat([p.detach().flatten() for p in parameters])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer = natgrad.ExactNGD(
            model, program.likelihood, fisher="exact", lr=1.0, damping=DAMPING, momentum=0.0,
            kl_clip=None, batch_dim=program.batch_dim,
        )  # fmt: skip
        share = 1 / sum(counts.values())
        if program.together:
            (sum(loss_of(program, n) for n in passes) * share).backward()
        else:
            for n in passes:
                (loss_of(program, n) * share).backward()
        optimizer.step()
    found = before - torch.cat([p.detach().flatten() for p in parameters])
    if optimizer.preconditioner.untrusted:
        text = " ".join(str(one.message) for one in told)
        assert all(name in text for name in optimizer.preconditioner.untrusted), program.text
        return "named"
    difference = float((found - expected).norm() / expected.norm().clamp(min=1e-9))
    # Gradients before a layer norm cancel, so that a step has fewer digits than the matrix.
    assert difference <= 1e-6, f"step off by {difference} in {program.text}"
    return "right"


def run(number: int) -> str:
    program = make_program(number)
    if not trained(program.model):
        return "nothing to train"
    passes = [n for n in range(len(program.batches)) if count_of(program, n)]
    events = sum(count_of(program, n) for n in passes)
    expected = sum(dense_fisher(program, n) for n in passes) / events
    # Both diagonals come from the rows; a step has the whole matrix once more.
    check_fisher(program, expected, ("full",) if number // 8 % 3 else ("full", "diagonal"))
    return check_step(program, passes, expected)


@pytest.mark.parametrize("share", range(8))
def test_programs_are_right(share):
    outcomes = [run(number) for number in range(share, PROGRAMS, 8)]
    assert set(outcomes) <= {"right", "nothing to train"}

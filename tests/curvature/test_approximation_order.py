"""The order of approximation errors that theory guarantees, on networks trained on real data."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from natgrad.fisher import fisher_matrix
from natgrad.operators import FisherMatrix
from natgrad.optim import TwoLevelKFAC

TOLERANCE = 1 + 1e-9
STEPS = (0, 15, 60)


def digits() -> tuple[Tensor, Tensor]:
    sklearn = pytest.importorskip("sklearn.datasets")
    bunch = sklearn.load_digits()
    images = torch.from_numpy(bunch.images).double() / 8 - 1
    return images.unsqueeze(1), torch.from_numpy(bunch.target).long()


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "mlp":
        pool = [nn.AvgPool2d(2), nn.Flatten()]
        layers = [nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 10)]
        return nn.Sequential(*pool, *layers).double()
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.Flatten(),
        nn.Linear(16, 10),
    ).double()  # fmt: skip


class Snapshot:
    """A network at one step of its training, its exact Fisher matrix and its gradient."""

    def __init__(self, model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
        self.model, self.data = model, data
        full = fisher_matrix(model, data, structure="full")
        self.exact = full.to_dense()
        loss = functional.cross_entropy(model(data[0]), data[1])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        self.gradient = torch.cat([g.flatten() for g in gradients]).detach()

    @functools.cache  # noqa: B019
    def structure(self, name: str, **options: object) -> FisherMatrix:
        return fisher_matrix(self.model, self.data, structure=name, **options)

    @functools.cache  # noqa: B019
    def errors(self, name: str, **options: object) -> dict[str, float]:
        """Return ``‖F̂_l − F_l‖ / ‖F_l‖`` of every block, Frobenius norm."""
        found = self.structure(name, **options)
        matrix = found.to_dense()
        result = {}
        for block, index in block_indices(found).items():
            exact = self.exact[index.unsqueeze(1), index]
            difference = matrix[index.unsqueeze(1), index] - exact
            result[block] = float(difference.norm() / exact.norm())
        return result

    def solution_error(self, damping: float, name: str, **options: object) -> float:
        """Return ``‖û − u‖ / ‖u‖`` in the norm of F + λI."""
        damped = self.exact + damping * torch.eye(len(self.exact), dtype=torch.float64)
        exact = torch.linalg.solve(damped, self.gradient)
        error = self.structure(name, **options).solve(self.gradient, damping) - exact
        return float(((error @ damped @ error) / (exact @ damped @ exact)).sqrt())


def block_indices(matrix: FisherMatrix) -> dict[str, Tensor]:
    """Return where the parameters of each layer are in the flat vector."""
    order = torch.arange(matrix.layout.numel)
    of_parameter = matrix.layout.to_dict(order)
    layers: dict[str, list[Tensor]] = {}
    for name, index in of_parameter.items():
        layers.setdefault(name.rpartition(".")[0], []).append(index.flatten())
    return {name: torch.cat(found) for name, found in layers.items()}


@functools.cache
def snapshots(name: str) -> list[Snapshot]:
    images, labels = digits()
    model = network(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    result = []
    for step in range(max(STEPS) + 1):
        if step in STEPS:
            twin = network(name)
            twin.load_state_dict(model.state_dict())
            result.append(Snapshot(twin, (images[:60], labels[:60])))
        chosen = torch.randint(0, len(images), (64,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return result


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (("ekfac", {}), ("kfac", {})),
        (("tekfac", {}), ("tkfac", {})),
        (("kpsvd", {"rank": 1}), ("kfac", {})),
        (("kpsvd", {"rank": 1}), ("tkfac", {})),
        (("kpsvd", {"rank": 2}), ("kpsvd", {"rank": 1})),
        (("kpsvd", {"rank": 3}), ("kpsvd", {"rank": 2})),
        (("unit_wise", {}), ("diagonal", {})),
        (("block_diagonal", {}), ("kpsvd", {"rank": 3})),
        (("block_diagonal", {}), ("ekfac", {})),
        (("block_diagonal", {}), ("unit_wise", {})),
    ],
)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_order_of_matrices(name, better, worse):
    for snapshot in snapshots(name):
        closer = snapshot.errors(better[0], **better[1])
        further = snapshot.errors(worse[0], **worse[1])
        for block, error in closer.items():
            assert error <= further[block] * TOLERANCE + 1e-12, block


def test_the_order_is_strict_on_a_real_network():
    """The comparison would be empty if all structures were exact."""
    last = snapshots("mlp")[-1]
    first = next(iter(last.errors("kfac")))
    names = [("diagonal", {}), ("kfac", {}), ("kpsvd", {"rank": 1}), ("kpsvd", {"rank": 2})]
    errors = [last.errors(name, **options)[first] for name, options in names]
    assert all(a > 1.01 * b for a, b in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("space", ["nicolaides", "spectral", "residual", "krylov"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_two_level_solutions_are_closer_than_those_of_kfac(name, space, factored):
    for snapshot in snapshots(name):
        for damping in (1e-4, 1e-2, 1.0):
            plain = snapshot.solution_error(damping, "kfac", factored_damping=factored)
            corrected = snapshot.solution_error(
                damping, "two_level", factored_damping=factored, coarse_space=space
            )
            assert corrected <= plain * TOLERANCE


def test_two_level_kfac_learns_digits():
    images, labels = digits()
    model = network("cnn").float()
    optimizer = TwoLevelKFAC(model, lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        chosen = torch.randint(0, len(images), (128,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(images[chosen].float()), labels[chosen]).backward()
        optimizer.step()
    accuracy = (model(images.float()).argmax(1) == labels).float().mean()
    assert accuracy > 0.9

"""Influence scores against dense solves, and against models that were fitted without a sample."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

import natgrad
from natgrad.tools import influence
from tests import dense
from tests.cases import CASES, Case
from tests.curvature.structures_table import TABLE, problem
from tests.dense import assert_same

#: Structures whose damped inverse is a matrix, by the name of their entry.
LINEAR = [n for n, e in TABLE.items() if e.linear and not e.stepped and e.solution.__name__ ==
          "inverted" and not e.options]  # fmt: skip
DAMPING = 0.05


def dense_scores(case: Case, likelihood: str, inverse: Tensor) -> Tensor:
    y, loss = case.target(likelihood), case.loss(likelihood)
    vectors = dense.output_gradient(loss, case.z, y).unsqueeze(0)
    gradients = dense.rows(case.jacobian[1], vectors)[:, 0]
    return gradients @ inverse @ gradients.T


@pytest.mark.parametrize("name", sorted(CASES))
def test_scores_of_every_layer_are_those_of_the_dense_matrix(name):
    given = problem(name)
    case, data = given.case, (given.case.x, given.target)
    found = influence(
        case.model, data, data, "categorical", "full", damping=DAMPING, output=case.output
    )
    eye = torch.eye(given.size, dtype=torch.float64)
    expected = dense_scores(case, "categorical", torch.linalg.inv(given.fisher + DAMPING * eye))
    assert_same(found, expected)


@pytest.mark.parametrize("structure", LINEAR)
@pytest.mark.parametrize("name", ["mlp", "tokens"])
def test_scores_of_every_structure_are_those_of_its_dense_matrix(structure, name):
    entry, given = TABLE[structure], problem(name, "poisson")
    case, data = given.case, (given.case.x, given.target)
    damping = max(DAMPING, entry.damping)
    found = influence(
        case.model, data, data, "poisson", entry.structure, damping=damping, output=case.output
    )
    matrix = entry.definition(given, entry.of_user(given))
    shift = damping * torch.eye(given.size, dtype=torch.float64)
    assert_same(found, dense_scores(case, "poisson", torch.linalg.inv(matrix + shift)), 1e-8)


def test_the_default_damping_is_the_mean_eigenvalue_of_a_layer():
    given = problem("mlp")
    case, data = given.case, (given.case.x, given.target)
    shift = torch.zeros(given.size, dtype=torch.float64)
    for block in dense.block_indices(case.model, case.blocks):
        shift[block] = given.fisher.diagonal()[block].mean()
    matrix = TABLE["ekfac"].definition(given, TABLE["ekfac"].of_user(given))
    expected = dense_scores(case, "categorical", torch.linalg.inv(matrix + shift.diag()))
    assert_same(influence(case.model, data, data), expected)


@pytest.mark.parametrize("structure", ["full", "ekfac"])
def test_layers_add_up_and_neither_batches_nor_memory_matter(structure):
    given = problem("conv2d", "gaussian")
    case, y = given.case, given.target
    whole = influence(case.model, (case.x, y), (case.x, y), "gaussian", structure)
    layers = influence(case.model, (case.x, y), (case.x, y), "gaussian", structure, per_layer=True)
    assert set(layers) == {spec.layer for spec in case.blocks}
    assert_same(sum(layers.values()), whole)
    single = [(case.x[n : n + 1], y[n : n + 1]) for n in range(len(y))]
    matrix = natgrad.fisher_matrix(case.model, (case.x, y), "gaussian", structure)
    for memory in (1, 8 * given.size * 2, 2**30):
        found = influence(
            case.model, single, single, "gaussian", matrix=matrix, memory=memory, progress=True
        )
        assert_same(found, whole)


def test_several_heads_add_up():
    given = problem("dictionary_output")
    model, x = given.case.model, given.case.x
    y = {"logits": torch.randint(0, 3, (4,)), "other": torch.randn(4, 2).double()}
    heads = {"logits": "categorical", "other": "gaussian"}
    found = influence(model, (x, y), (x, y), heads, "full", damping=DAMPING)
    gradients, rows = [], []
    for key, likelihood in heads.items():
        z, jac = dense.jacobian(model, x, lambda out, key=key: out[key])
        loss = dense.categorical() if likelihood == "categorical" else dense.gaussian()
        gradients.append(dense.rows(jac, dense.output_gradient(loss, z, y[key]).unsqueeze(0)))
        rows.append(dense.rows(jac, dense.fisher_vectors(loss, z, y[key], "exact")))
    g, r = sum(gradients)[:, 0], torch.cat([one.flatten(0, 1) for one in rows])
    inverse = torch.linalg.inv(r.T @ r / 4 + DAMPING * torch.eye(r.shape[1]).double())
    assert_same(found, g @ inverse @ g.T)


# -- against models fitted without a sample --------------------------------------------------------


def regression(samples: int, penalty: float = 0.0, outputs: int = 1) -> tuple[nn.Module, tuple]:
    """Return a linear model at its optimum, and its data."""
    x = torch.randn(samples, 4).double()
    y = x @ torch.randn(4, outputs).double() + torch.randn(samples, outputs).double()
    return fitted(x, y, penalty, samples), (x, y)


def fitted(x: Tensor, y: Tensor, penalty: float, count: int) -> nn.Module:
    """Minimise the sum of squares over 2·count plus ``penalty/2 ‖θ‖²``."""
    a = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    matrix = a.T @ a / count + penalty * torch.eye(5).double()
    theta = torch.linalg.solve(matrix, a.T @ y / count)
    model = nn.Linear(4, y.shape[1]).double()
    with torch.no_grad():
        model.weight.copy_(theta[:4].T)
        model.bias.copy_(theta[4])
    return model


def changes(model: nn.Module, data: tuple, test: tuple, penalty: float) -> tuple[Tensor, Tensor]:
    """Return what leaving each sample out does to test losses: along the gradient, and in all."""
    (x, y), (u, v) = data, test
    residuals = (model(u) - v).detach()
    linear, whole = [], []
    for n in range(len(x)):
        rest = [i for i in range(len(x)) if i != n]
        moved = (fitted(x[rest], y[rest], penalty, len(x))(u) - model(u)).detach()
        linear.append((residuals * moved).sum(1))
        whole.append(((residuals + moved).square() - residuals.square()).sum(1) / 2)
    return torch.stack(linear, 1), torch.stack(whole, 1)


@pytest.mark.parametrize("penalty", [0.0, 0.3])
@pytest.mark.parametrize("outputs", [1, 2])
def test_leaving_one_out_of_a_regression_is_exact(penalty, outputs):
    model, data = regression(12, penalty, outputs)
    test = torch.randn(7, 4).double(), torch.randn(7, outputs).double()
    linear, _ = changes(model, data, test, penalty)
    found = influence(model, data, test, "gaussian", "full", damping=penalty, leave_one_out=True)
    assert_same(found, linear)


def test_leverage_is_what_scores_lack():
    model, data = regression(12)
    a = torch.cat([data[0], torch.ones(12, 1).double()], 1)
    leverage = (a @ torch.linalg.inv(a.T @ a) * a).sum(1)
    plain = influence(model, data, data, "gaussian", "full", damping=0.0)
    left_out = influence(model, data, data, "gaussian", "full", damping=0.0, leave_one_out=True)
    assert_same(left_out, plain / 12 / (1 - leverage))


def test_scores_are_the_change_of_the_loss_to_first_order():
    errors = []
    for samples in (50, 200, 800):
        torch.manual_seed(0)
        model, data = regression(samples)
        test = torch.randn(7, 4).double(), torch.randn(7, 1).double()
        _, whole = changes(model, data, test, 0.0)
        found = influence(model, data, test, "gaussian", "full", damping=0.0) / samples
        errors.append(float((found - whole).norm() / whole.norm()))
        assert (found.sign() == whole.sign()).float().mean() > 1 - 10 / samples
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2 and errors[2] < 0.02


def test_leaving_one_out_is_a_newton_step_without_the_sample():
    given = problem("mlp")
    case, data = given.case, (given.case.x, given.target)
    found = influence(case.model, data, data, structure="full", damping=0.1, leave_one_out=True)
    y, loss, jac = given.target, given.loss, given.case.jacobian[1]
    gradients = dense.rows(jac, dense.output_gradient(loss, case.z, y).unsqueeze(0))[:, 0]
    roots = dense.rows(jac, dense.fisher_vectors(loss, case.z, y, "exact"))
    eye = torch.eye(given.size).double()
    expected = []
    for own, row in zip(gradients, roots, strict=True):
        rest = given.count * (given.fisher + 0.1 * eye) - row.T @ row
        expected.append(gradients @ torch.linalg.solve(rest, own))
    assert_same(found, torch.stack(expected, 1), 1e-8)


# -- the file, and what is refused -----------------------------------------------------------------


@pytest.mark.parametrize("structure", ["ekfac", "kfac", "diagonal", "tekfac", "unit_wise"])
def test_a_file_gives_the_same_scores_without_making_the_matrix(structure, tmp_path, monkeypatch):
    given = problem("mlp")
    case, data = given.case, (given.case.x, given.target)
    arguments = dict(structure=structure, cache=tmp_path / "factors.pt")
    first = influence(case.model, data, data, **arguments)
    made = []
    monkeypatch.setattr(
        sys.modules[influence.__module__],
        "fisher_matrix",
        lambda *a, **k: made.append(1) or natgrad.fisher_matrix(*a, **k),
    )
    assert torch.equal(influence(case.model, data, data, **arguments), first)
    assert made == []
    # Another seed, other data, another model, another likelihood: made anew every time.
    influence(case.model, data, data, **arguments, seed=1)
    influence(case.model, (data[0] + 1, data[1]), data, **arguments)
    influence(case.model, data, data, natgrad.Categorical(label_smoothing=0.1), **arguments)
    with torch.no_grad():
        next(case.model.parameters()).add_(1.0)
    influence(case.model, data, data, **arguments)
    with torch.no_grad():
        next(case.model.parameters()).sub_(1.0)
    assert made == [1, 1, 1, 1]


class TwoHeads(nn.Module):
    """An activation that is no module, dropout, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.dropout, self.activation = nn.Dropout(0.5), torch.tanh

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.dropout(self.activation(self.body(x)))
        return self.first(hidden), self.second(hidden)


def first(outputs: tuple[Tensor, Tensor]) -> Tensor:
    return outputs[0]


def activated(model: TwoHeads) -> None:
    model.activation = torch.sin


CHANGES = {
    "output": (lambda model: None, lambda outputs: outputs[1]),
    "mode": (nn.Module.train, first),
    "activation": (activated, first),
    "frozen": (lambda model: model.body.requires_grad_(False), first),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_file_of_what_the_model_was_is_not_read(name, tmp_path):
    torch.manual_seed(0)
    model = TwoHeads().double().eval()
    data = (torch.randn(8, 4).double(), torch.arange(8) % 3)
    change, output = CHANGES[name]
    path = tmp_path / "factors.pt"
    influence(model, data, data, structure="kfac", output=first, cache=path)
    change(model)
    torch.manual_seed(0)
    found = influence(model, data, data, structure="kfac", output=output, cache=path)
    torch.manual_seed(0)
    assert_same(found, influence(model, data, data, structure="kfac", output=output), 1e-12)


def test_sparse_inputs_are_kept_apart_in_a_file(tmp_path):
    class Graph(nn.Linear):
        def forward(self, x: Tensor, neighbours: Tensor) -> Tensor:
            return torch.sparse.mm(neighbours, super().forward(x))

    torch.manual_seed(0)
    model, x, y = Graph(4, 3).double(), torch.randn(8, 4).double(), torch.arange(8) % 3
    for shift in (0, 1):
        neighbours = (torch.eye(8).roll(shift, 1) + torch.eye(8)).double().to_sparse()
        data = ((x, neighbours), y)
        found = influence(model, data, data, structure="kfac", cache=tmp_path / "factors.pt")
        assert_same(found, influence(model, data, data, structure="kfac"), 1e-12)


def test_what_has_no_order_no_target_or_no_samples_is_refused(tmp_path):
    model, (x, y) = regression(6)
    data = torch.utils.data.TensorDataset(x, y)
    shuffled = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)
    with pytest.raises(ValueError, match="shuffle=False"):
        influence(model, shuffled, (x, y), "gaussian")
    with pytest.raises(ValueError, match="test must be re-iterable"):
        influence(model, (x, y), iter([(x, y)]), "gaussian")
    with pytest.raises(ValueError, match="needs targets"):
        influence(model, (x, y), (x, None), "gaussian")
    with pytest.raises(ValueError, match="test has no samples"):
        influence(model, (x, y), [], "gaussian")
    with pytest.raises(ValueError, match="memory"):
        influence(model, (x, y), (x, y), "gaussian", memory=0)
    with pytest.raises(ValueError, match="2 of 2 samples have a leverage of 1 or more"):
        influence(
            model, (x[:2], y[:2]), (x, y), "gaussian", "full", damping=0.0, leave_one_out=True
        )
    with pytest.raises(ValueError, match="'full' is not kept in a file"):
        influence(model, (x, y), (x, y), "gaussian", "full", cache=tmp_path / "factors.pt")


@pytest.mark.parametrize("kind", ["checkpoint", "text", "cut off", "folder", "no folder"])
def test_a_file_of_something_else_stays_as_it_is(kind, tmp_path):
    torch.manual_seed(0)
    model, path = nn.Linear(4, 3).double(), tmp_path / "kept.pt"
    data = (torch.randn(8, 4).double(), torch.arange(8) % 3)
    if kind == "checkpoint":
        torch.save(model.state_dict(), path)
    elif kind == "text":
        path.write_text("nothing of ours")
    elif kind == "cut off":
        influence(model, data, data, structure="kfac", cache=path)
        path.write_bytes(path.read_bytes()[:400])
    elif kind == "folder":
        path.mkdir()
    else:
        path = tmp_path / "none" / "kept.pt"
    before = path.read_bytes() if path.is_file() else None
    expected = "there is no folder" if kind == "no folder" else "no file that influence has written"
    with pytest.raises(ValueError, match=expected):
        influence(model, data, data, structure="kfac", cache=path)
    assert (path.read_bytes() if path.is_file() else None) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == (
        [] if kind == "no folder" else ["kept.pt"]
    )


def test_a_buffer_that_is_not_saved_with_the_model_counts(tmp_path):
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.scale)

    torch.manual_seed(0)
    model = Scaled(4, 3).double()
    model.register_buffer("scale", torch.ones(4).double(), persistent=False)
    data = (torch.randn(8, 4).double(), torch.arange(8) % 3)
    arguments = dict(structure="kfac", cache=tmp_path / "factors.pt")
    influence(model, data, data, **arguments)
    model.scale[0] = 1.0003  # The outputs change by less than machines differ.
    found = influence(model, data, data, **arguments)
    assert_same(found, influence(model, data, data, structure="kfac"), 1e-12)


def test_what_is_no_fisher_matrix_is_refused():
    given = problem("mlp")
    data = (given.case.x, given.target)
    hessian = natgrad.hessian_matrix(given.case.model, data)
    with pytest.raises(TypeError, match="natgrad.FisherMatrix"):
        influence(given.case.model, data, data, matrix=hessian)

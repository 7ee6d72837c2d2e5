"""KPSVD against the singular value decomposition of the rearranged dense blocks."""

from __future__ import annotations

import copy
import dataclasses
import io
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad import Capture
from natgrad.curvature import Curvature
from natgrad.curvature.cost import Workload
from natgrad.fisher import estimation as fisher_module
from natgrad.fisher import fisher_matrix
from natgrad.likelihoods import Categorical, Gaussian
from natgrad.operators import GradientSource
from natgrad.operators.kronecker_sum import KroneckerSumOperator
from natgrad.optim import KPSVD
from tests import dense
from tests import dense_kronecker as reference
from tests.cases import CASES, normal
from tests.curvature.test_structures import build, check_interface, check_pseudo_inverse, labels
from tests.methods import curvature_of, make_optimizer

FACTORED = [name for name in CASES if CASES[name]().has_kfac]
KINDS = ["exact", "empirical"]


def rearranged(block: Tensor, d_out: int, d_in: int) -> Tensor:
    """Return Z (d_in², d_out²), on which B ⊗ A is vec(A) vec(B)ᵀ."""
    z = block.reshape(d_out, d_in, d_out, d_in).permute(1, 3, 0, 2)
    return z.reshape(d_in**2, d_out**2)


def truncated(block: Tensor, d_out: int, d_in: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return the pairs (A, B) of the truncated decomposition among symmetric factors."""
    z = rearranged(block, d_out, d_in).reshape(d_in, d_in, -1)
    z = ((z + z.transpose(0, 1)) / 2).reshape(d_in**2, -1)
    u, s, v = torch.linalg.svd(z, full_matrices=False)
    rank = min(rank, len(s))
    a = (u[:, :rank] * s[:rank].sqrt()).T.reshape(rank, d_in, d_in)
    b = (v[:rank] * s[:rank].sqrt().unsqueeze(1)).reshape(rank, d_out, d_out)
    return a, b


def kron_sum(a: Tensor, b: Tensor) -> Tensor:
    return sum(torch.kron(y.contiguous(), x.contiguous()) for x, y in zip(a, b, strict=True))


def expected(size: int, found, count: float, rank: int) -> Tensor:
    result = torch.zeros(size, size, dtype=torch.float64)
    for block in found:
        d_out, d_in = block.where.shape[1:]
        for group, index in enumerate(block.where):
            rows = block.rows[:, group].flatten(1)
            pairs = truncated(rows.T @ rows / count, d_out, d_in, rank)
            reference.place(result, index, kron_sum(*pairs))
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FACTORED)
def test_truncated_decomposition(name, kind):
    case = CASES[name]()
    size = case.jacobian[1].shape[-1]
    found, count = reference.blocks(case, "categorical", kind)
    exact = reference.exact_groups(size, found, count)
    errors = [(build(case, "categorical", "kfac", kind).to_dense() - exact).norm()]
    for rank in (1, 2, 3):
        matrix = build(case, "categorical", "kpsvd", kind, rank=rank).to_dense()
        definition = expected(size, found, count, rank)
        torch.testing.assert_close(matrix, definition, rtol=1e-8, atol=1e-9 * float(exact.norm()))
        errors.append((matrix - exact).norm())
    for worse, better in zip(errors, errors[1:], strict=False):
        assert better <= worse * (1 + 1e-12) + 1e-13
    # In full: what symmetric factors can represent, all of it without shared positions.
    matrix = build(case, "categorical", "kpsvd", kind, rank=100).to_dense()
    dense.assert_same(matrix, expected(size, found, count, 1000))
    if name in ("mlp", "mlp_without_bias", "one_layer", "layer_norm"):
        dense.assert_same(matrix, exact)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", ["mlp", "conv2d", "tokens", "embedding", "layer_norm"])
def test_deflation_is_lanczos(name, rank):
    case = CASES[name]()
    matrices = [
        build(case, "categorical", "kpsvd", rank=rank, method=method).to_dense()
        for method in ("deflation", "lanczos")
    ]
    dense.assert_same(*matrices, 1e-8)


def test_missing_pairs_are_zero():
    """A block with fewer pairs than asked for has zeros in their place."""
    for part in build(CASES["layer_norm"](), "categorical", "kpsvd", rank=5).parts.values():
        assert len(part.inputs) == len(part.outputs) == part.rank == 5


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", list(CASES))
def test_interface(name, rank):
    f = build(CASES[name](), "categorical", "kpsvd", rank=rank)
    matrix = f.to_dense()
    dense.assert_same(matrix, matrix.T)
    lowest = float(torch.linalg.eigvalsh(matrix)[0])
    if rank == 1:
        assert lowest >= -1e-9 * float(matrix.norm())
    damping = max(0.05, 0.05 - 2 * lowest)
    check_interface(f, matrix, positive=True, damping=damping)
    assert "kpsvd" in repr(f)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", ["batch_of_one", "frozen", "conv2d"])
def test_zero_damping_is_the_pseudo_inverse(name, rank):
    f = build(CASES[name](), "categorical", "kpsvd", rank=rank)
    if rank == 1:
        check_pseudo_inverse(f)
        return
    vector = normal(f.shape[0])
    inverse = torch.linalg.pinv(f.to_dense(), hermitian=True, rtol=1e-12)
    dense.assert_same(f.solve(vector), inverse @ vector, 1e-6)


def pi_matrix(part, damping: float) -> Tensor:
    """Return (B_1 + √λ/π I) ⊗ (A_1 + π√λ I) + B_2 ⊗ A_2 of a part with one group, as matrices."""
    a, b = part.inputs[:, 0], part.outputs[:, 0]
    pi = (a[0].trace() / len(a[0]) / (b[0].trace() / len(b[0]))).sqrt()
    a, b = a.clone(), b.clone()
    a[0] += damping**0.5 * pi * torch.eye(len(a[0]), dtype=a.dtype)
    b[0] += damping**0.5 / pi * torch.eye(len(b[0]), dtype=b.dtype)
    return kron_sum(a, b)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", ["mlp", "tokens", "conv1d"])
def test_pi_rule(name, rank):
    f = build(CASES[name](), "categorical", "kpsvd", rank=rank, factored_damping=True)
    for part in f.parts.values():
        if part.layout.groups > 1:
            continue
        matrix = pi_matrix(part, 1.0)
        assert torch.linalg.eigvalsh(matrix)[0] > 0
        columns = normal(part.layout.numel, 2)
        matrices = part.layout.matrix(columns.T).flatten(1).T
        solved = torch.linalg.solve(matrix, matrices)
        shape = (2, 1, part.layout.d_out, part.layout.d_augmented)
        dense.assert_same(part.solve(columns, 1.0), part.layout.flat(solved.T.reshape(shape)).T)


def indefinite_part(factored_damping: bool) -> KroneckerSumOperator:
    """Return a part whose second product spoils the first, as decompositions of it would."""
    f = build(CASES["mlp"](), "categorical", "kpsvd", factored_damping=factored_damping)
    part = next(iter(f.parts.values()))
    return dataclasses.replace(
        part,
        leading_only=True,
        inputs=torch.cat([part.inputs, -2 * part.inputs]),
        outputs=torch.cat([part.outputs, part.outputs]),
    )


@pytest.mark.parametrize("factored", [True, False])
def test_indefinite_sum_falls_back_to_the_first_product(factored):
    part, damping = indefinite_part(factored), 1e-3
    if factored:
        with pytest.raises(natgrad.linalg.FactorizationError, match="positive definite"):
            dataclasses.replace(part, leading_only=False).inverse(damping)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(2):
            inverse = part.inverse(damping)
    (warning,) = said  # Said once.
    assert "first product alone" in str(warning.message)
    layout = part.layout
    matrix = torch.kron(part.outputs[0, 0], part.inputs[0, 0])
    matrix = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)
    gradients = layout.to_dict(normal(layout.numel))
    found = inverse.natural_gradient(GradientSource(gradients))
    stacked = torch.cat([g.reshape(layout.d_out, -1) for g in gradients.values()], 1)
    solution = torch.linalg.solve(matrix, stacked.flatten()).reshape(stacked.shape)
    result = torch.cat([found[n].reshape(layout.d_out, -1) for n in layout.names], 1)
    dense.assert_same(result, solution)
    assert part.logdet(damping).isnan()


def estimated(case, **options) -> Curvature:
    """Return the estimate of a case's Fisher matrix from its batch."""
    with Capture(case.model, case.output) as capture:
        curvature = curvature_of("kpsvd", capture, **options)
        dense.call(case.model, case.x, case.output)
        output = capture.passes[-1].output
        rows = capture.pull_back(output, Categorical().root_vectors(output.detach()))
        curvature.update(rows, rows.samples)
    return curvature


@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"rank": 2, "factored_damping": True}])
def test_refreshed_inverses_are_those_of_the_matrix(options):
    for name in ("mlp", "conv2d", "embedding", "tied_embedding", "generic"):
        curvature = estimated(CASES[name](), **options)
        gradients = curvature.layout.to_dict(normal(curvature.layout.numel))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            curvature.refresh(2.0)
        found = curvature.natural_gradient(GradientSource(gradients))
        for key, value in curvature.matrix().solve(gradients, 2.0).items():
            dense.assert_same(found[key], value)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", ["mlp", "tokens", "conv2d", "embedding", "generic"])
def test_function_space_map(name, rank):
    case = CASES[name]()
    capture = Capture(case.model, case.output)
    dense.call(case.model, case.x, case.output)
    output = capture.passes[-1].output
    rows = capture.pull_back(output, Gaussian().root_vectors(output.detach()))
    f = build(case, "gaussian", "kpsvd", rank=rank)
    found = f.function_space_map(rows, damping=1.0)
    inverse = torch.linalg.inv(f.to_dense() + torch.eye(f.shape[0], dtype=torch.float64))
    jacobian = rows.to_dense()
    dense.assert_same(sum(found.values()), jacobian @ inverse @ jacobian.T)


# -- updates and training --------------------------------------------------------------------------


class StepByStep:
    """The running decomposition of an MLP's layers, by dense matrices."""

    def __init__(self, case, rank: int, decay: float, damping: float) -> None:
        self.case, self.rank, self.decay, self.damping = case, rank, decay, damping
        self.count = 0.0
        self.pairs: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.inverses: dict[tuple, Tensor] = {}

    def step(self, model, x: Tensor, y: Tensor, update: bool, refresh: bool) -> Tensor:
        leaves = list(model.parameters())
        loss = functional.cross_entropy(model(x), y)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])
        now = type(self.case)(model, x, self.case.blocks)
        found, count = reference.blocks(now, "categorical", "exact")
        if update:
            self.count = self.decay * self.count + count
        result = torch.zeros_like(gradient)
        for block in found:
            key, (d_out, d_in) = block.names, block.where.shape[1:]
            rows = block.rows[:, 0].flatten(1)
            if update:
                matrix = rows.T @ rows
                if key in self.pairs:
                    matrix = matrix + self.decay * kron_sum(*self.pairs[key])
                self.pairs[key] = truncated(matrix, d_out, d_in, self.rank)
            if refresh:
                self.inverses[key] = self.inverse(*self.pairs[key])
            index = block.where.flatten()
            result[index] = self.inverses[key] @ gradient[index]
        return result

    def inverse(self, a: Tensor, b: Tensor) -> Tensor:
        sign = torch.sign(a[0].trace())
        a, b = a * sign / self.count**0.5, b * sign / self.count**0.5
        pi = (a[0].trace() / len(a[0]) / (b[0].trace() / len(b[0]))).sqrt()
        root = self.damping**0.5
        a[0] += root * pi * torch.eye(len(a[0]), dtype=a.dtype)
        b[0] += root / pi * torch.eye(len(b[0]), dtype=b.dtype)
        return torch.linalg.inv(kron_sum(a, b))


@pytest.mark.parametrize("factor_interval", [1, 2])
@pytest.mark.parametrize("decay", [0.0, 0.7])
@pytest.mark.parametrize("rank", [1, 2])
def test_life_cycle(rank, decay, factor_interval):
    """Eight steps with intervals against the step-by-step computation."""
    case = CASES["mlp"]()
    model, damping, lr = copy.deepcopy(case.model), 0.5, 0.3
    optimizer = make_optimizer(
        KPSVD, model, lr=lr, damping=damping, momentum=0.0, fisher="exact", decay=decay,
        early=False, factors=factor_interval, inverses=3, kl_clip=None, rank=rank,
        tolerance=1e-11, max_iterations=100,
    )  # fmt: skip
    steps = StepByStep(case, rank, decay, damping)
    for step in range(8):
        x, y = normal(9, 3, seed=step), labels(9, 3, step)
        update, refresh = step % factor_interval == 0, step % 3 == 0
        direction = steps.step(copy.deepcopy(model), x, y, update, refresh)
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        after = nn.utils.parameters_to_vector(model.parameters()).detach()
        dense.assert_same((before - after) / lr, direction, 1e-8)


def train(optimizer, model: nn.Module, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        x, y = normal(4, 3, seed=step), labels(4, 3, step)
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


SETTINGS = {"fisher": "exact", "factors": 2, "inverses": 3, "damping": 0.5}


@pytest.mark.parametrize("rank", [1, 2])
def test_state_dict_round_trip(rank):
    for saved_at in (1, 2, 3, 4):
        model = copy.deepcopy(CASES["mlp"]().model)
        optimizer = make_optimizer(KPSVD, model, rank=rank, **SETTINGS)
        train(optimizer, model, range(saved_at))
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        twin = copy.deepcopy(CASES["mlp"]().model)
        twin.load_state_dict(state["model"])
        other = make_optimizer(KPSVD, twin, rank=rank, **SETTINGS)
        other.load_state_dict(state["optimizer"])
        for each, net in ((optimizer, model), (other, twin)):
            train(each, net, range(saved_at, 8))
        assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("rank", [1, 2])
def test_steps_with_nan_are_taken_back(rank):
    models = [copy.deepcopy(CASES["mlp"]().model) for _ in range(2)]
    optimizer, undisturbed = (make_optimizer(KPSVD, m, rank=rank, **SETTINGS) for m in models)
    for step in range(5):
        parameters = flat(models[0])
        x, y = normal(4, 3, seed=step), labels(4, 3, step)
        optimizer.zero_grad()
        functional.cross_entropy(models[0](x * float("nan")), y).backward()
        if step == 0:
            with pytest.warns(UserWarning, match="skipped"):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
        functional.cross_entropy(models[0](x), y).backward()
        models[0][2].bias.grad[0] = float("inf")  # Rows are finite here, the gradient is not.
        optimizer.step()
        assert torch.equal(flat(models[0]), parameters)
        for each, net in ((optimizer, models[0]), (undisturbed, models[1])):
            train(each, net, range(step, step + 1))
        assert torch.equal(flat(models[0]), flat(models[1]))


def test_batches_with_nan_are_left_out_of_the_matrix():
    case = CASES["mlp"]()
    good, other = ((normal(*case.x.shape, seed=s), labels(len(case.x), 3, s)) for s in (0, 1))
    bad = (good[0] * float("nan"), good[1])
    f = fisher_matrix(case.model, [good, bad, other], "categorical", "kpsvd")
    g = fisher_matrix(case.model, [good, other], "categorical", "kpsvd")
    dense.assert_same(f.to_dense(), g.to_dense())


def test_batches_and_chunks_add_up(monkeypatch):
    """With all products nothing is truncated between them."""
    case = CASES["mlp"]()
    y = case.target("categorical")
    whole = build(case, "categorical", "kpsvd", rank=100).to_dense()
    for elements in (fisher_module.PULL_BACK_ELEMENTS, 1):
        monkeypatch.setattr(fisher_module, "PULL_BACK_ELEMENTS", elements)
        batches = [(case.x[:2], y[:2]), (case.x[2:], y[2:])]
        found = fisher_matrix(case.model, batches, "categorical", "kpsvd", rank=100)
        dense.assert_same(found.to_dense(), whole)


def test_several_passes_of_a_step_are_one_batch():
    models = [copy.deepcopy(CASES["mlp"]().model) for _ in range(2)]
    options = {**SETTINGS, "rank": 100, "factored_damping": False, "tolerance": 1e-12}
    optimizers = [make_optimizer(KPSVD, m, max_iterations=100, **options) for m in models]
    for step in range(4):
        x, y = normal(6, 3, seed=step), labels(6, 3, step)
        for model, optimizer, passes in zip(models, optimizers, (1, 3), strict=True):
            optimizer.zero_grad()
            for inputs, target in zip(x.chunk(passes), y.chunk(passes), strict=True):
                (functional.cross_entropy(model(inputs), target) / passes).backward()
            optimizer.step()
        dense.assert_same(*map(flat, models))


def test_one_product_of_several_updates_is_positive():
    case = CASES["conv2d"]()
    data = [(normal(*case.x.shape, seed=s), labels(len(case.x), 3, s)) for s in range(4)]
    matrix = fisher_matrix(case.model, data, "categorical", "kpsvd").to_dense()
    assert torch.linalg.eigvalsh(matrix)[0] >= -1e-12 * matrix.norm()


@pytest.mark.parametrize("method", ["deflation", "lanczos"])
def test_rows_whose_products_overflow_are_left_out(method):
    case = CASES["one_layer"]()
    model = copy.deepcopy(case.model).float()
    x, y = case.x.float(), case.target("gaussian").float()
    good = fisher_matrix(model, (x, y), "gaussian", "kpsvd", method=method)
    both = fisher_matrix(model, [(x, y), (x * 1e30, y)], "gaussian", "kpsvd", method=method)
    dense.assert_same(both.to_dense().double(), good.to_dense().double(), 1e-5)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(rank, dtype):
    case = CASES["mlp"]()
    model, x = copy.deepcopy(case.model).to(dtype), case.x.to(dtype)
    y = case.target("categorical")
    found = fisher_matrix(model, (x, y), "categorical", "kpsvd", rank=rank).to_dense()
    exact = copy.deepcopy(model).double()
    f = fisher_matrix(exact, (x.double(), y), "categorical", "kpsvd", rank=rank).to_dense()
    assert found.dtype == torch.float32
    assert (found - f).norm() <= (1e-4 if dtype == torch.float32 else 0.1) * f.norm()


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.filterwarnings("ignore:the curvature of")
def test_training_reduces_the_loss(rank, convolution):
    torch.manual_seed(0)
    if convolution:
        first = [nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Flatten()]
        model = nn.Sequential(*first, nn.Linear(24, 3))
    else:
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(64, 8)
    y = (x @ torch.randn(8, 3)).argmax(1)
    optimizer = make_optimizer(KPSVD, model, rank=rank)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "qr"}, "method"),
        ({"rank": 0}, "at least 1"),
        ({"rank": 3, "factored_damping": True}, "ranks 1 and 2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(CASES["mlp"](), "categorical", "kpsvd", **options)


def test_unknown_option():
    with pytest.raises(TypeError, match="no option"):
        build(CASES["mlp"](), "categorical", "kpsvd", colour="red")


def test_large_factors_are_those_of_kfac():
    case = CASES["mlp"]()
    f = build(case, "categorical", "kpsvd", max_factor_size=2)
    g = build(case, "categorical", "kfac", max_factor_size=2)
    dense.assert_same(f.to_dense(), g.to_dense())


def test_before_any_update_and_costs():
    with Capture(CASES["mlp"]().model) as capture:
        curvature = curvature_of("kpsvd", capture, rank=2)
    assert float(curvature.matrix().trace()) == 0.0
    curvature.refresh(0.1)
    gradients = curvature.layout.to_dict(normal(curvature.layout.numel))
    found = curvature.natural_gradient(GradientSource(gradients))
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)
    for cost in curvature.costs(Workload(samples=4, directions=3)).values():
        assert cost.memory > 0 and cost.refresh > 0 and cost.step > 0

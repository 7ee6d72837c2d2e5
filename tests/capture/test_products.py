"""Products with bare parameters against rows by autograd, sample by sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack

from natgrad import Capture, fisher_matrix
from natgrad.curvature import STRUCTURES
from natgrad.jacobians import DenseJacobian, LinearJacobian, StackedJacobian
from tests.cases import normal

SIZE = 40  # 40 × 40 entries are too many for a dense block.


class Bare(nn.Module):
    """A linear map by a function, between layers."""

    def __init__(self, function, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(3, SIZE), nn.Linear(SIZE, 2)
        self.own = nn.ParameterList(
            normal(*shape, seed=n) / shape[-1] ** 0.5 for n, shape in enumerate(shapes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.function(torch.tanh(self.first(x)), *self.own)))


SQUARE, VECTOR, STACK = (SIZE, SIZE), (SIZE,), (3, SIZE, SIZE)
FUNCTIONS = {
    "linear": (lambda h, w: functional.linear(h, w), SQUARE),
    "linear with bias": (lambda h, w, b: functional.linear(h, w, b), SQUARE, VECTOR),
    "by name": (lambda h, w, b: functional.linear(input=h, bias=b, weight=w), SQUARE, VECTOR),
    "x @ w": (lambda h, w: h @ w, SQUARE),
    "x @ w + b": (lambda h, w, b: h @ w + b, SQUARE, VECTOR),
    "x.mm(w.T)": (lambda h, w: h.mm(w.T), SQUARE),
    "addmm": (lambda h, w, b: torch.addmm(b, h, w), SQUARE, VECTOR),
    "bias in place": (lambda h, w, b: (h @ w).add_(b), SQUARE, VECTOR),
    "part of the bias": (lambda h, b: torch.cat([h[:, :9] + b[:9], h[:, 9:] + b[9:]], 1), VECTOR),
    "samples second": (lambda h, b: (torch.stack([h, torch.sin(h)]) + b).prod(0), VECTOR),
    "views": (
        lambda h, b: (torch.cat([h, torch.sin(h)]) + b).unflatten(0, (2, -1)).prod(0),
        VECTOR,
    ),
    "rows": (lambda h, w: torch.cat([functional.linear(h, p) for p in w.split(20)], 1), SQUARE),
    "columns": (lambda h, w: h[:, :5] @ w[:, :5].T + h[:, 5:] @ w[:, 5:].T, SQUARE),
    "corner": (lambda h, w: functional.pad(h[:, 3:9] @ w[3:9, 7:30], (7, 10)), SQUARE),
    "a column": (lambda h, w: h + functional.linear(h, w[7:8]) + h @ w[:, 5:6], SQUARE),
    "twice": (lambda h, w: functional.linear(torch.tanh(h @ w), w), SQUARE),
    "positions": (lambda h, w: (torch.stack([h, h * h], 1) @ w).sum(1), SQUARE),
    "small": (lambda h, w: functional.pad(h[:, :4] @ w, (0, SIZE - 3)), (4, 3)),
    "small with bias": (
        lambda h, w, b: h + functional.linear(h[:, :4], w, b).sum(1, True),
        (3, 4),
        (3,),
    ),
    "small stack": (lambda h, w: h + (h[:, :4] @ w[1] + h[:, 4:8] @ w[0]).sum(1, True), (2, 4, 3)),
    "matrices of a stack": (lambda h, w: h @ w[2] + functional.linear(h, w[0]), STACK),
    "bmm": (lambda h, w: torch.bmm(h.expand(3, -1, -1), w).sum(0), STACK),
    "matmul of all": (lambda h, w: torch.matmul(h, w.mT).prod(0), STACK),
    "matmul of own inputs": (
        lambda h, w: (torch.stack([h, h * h], 1)[:, None] @ w).prod(1).sum(1),
        STACK,
    ),
    "matmul of own inputs from the left": (
        lambda h, w: (w @ torch.stack([h, h * h], 2)[:, None]).prod(1).sum(2),
        STACK,
    ),
    "straight through": (lambda h, w: functional.linear(h, w + (w.round() - w).detach()), SQUARE),
    "straight through, a bias, positions": (
        lambda h, w, b: functional.linear(
            torch.stack([h, h * h], 1), w + (w.sign() - w).detach(), b
        ).sum(1),
        SQUARE,
        VECTOR,
    ),
    "baddbmm": (lambda h, w: torch.baddbmm(h.new_ones(1), h.expand(3, -1, -1), w).sum(0), STACK),
    "w @ x": (lambda h, w: (w @ h.T).T, SQUARE),
    "w.T @ x of positions": (lambda h, w: (w.mT @ torch.stack([h, h * h], 2)).sum(2), SQUARE),
    "bmm from the left": (lambda h, w: torch.bmm(w, h.T.expand(3, -1, -1)).prod(0).T, STACK),
    "einsum": (lambda h, w: torch.einsum("ni,oi->no", h, w), SQUARE),
    "einsum, turned": (lambda h, w: torch.einsum("io,...i->...o", w, h), SQUARE),
    "einsum, samples last": (lambda h, w: torch.einsum("in,io->on", h.T, w).T, SQUARE),
    "einsum of a stack": (lambda h, w: torch.einsum("ni,gio->ngo", h, w).prod(1), STACK),
    "einsum of own inputs": (
        lambda h, w: (
            torch.einsum(
                "tgni,goi->tong", torch.stack([h, h * h]).expand(3, -1, -1, -1).transpose(0, 1), w
            )
            .prod(3)
            .sum(0)
            .T
        ),
        STACK,
    ),
    "einsum, heads": (lambda h, w: torch.einsum("ni,ihd->nhd", h, w).flatten(1), (SIZE, 4, 10)),
    "einsum, from heads": (
        lambda h, w: torch.einsum("nhd,ohd->no", h.unflatten(1, (4, 10)), w),
        (SIZE, 4, 10),
    ),
    "picked": (lambda h, w: h + w[torch.arange(len(h)) - 2], SQUARE),
    "embedding": (lambda h, w: h + functional.embedding(torch.arange(len(h)) % 3, w), SQUARE),
    "embedding by name": (
        lambda h, w: h + functional.embedding(input=torch.arange(len(h)) % 3, weight=w),
        SQUARE,
    ),
}


def rows_by_autograd(model: nn.Module, x: Tensor, vectors: Tensor) -> Tensor:
    rows = []
    for n in range(len(x)):
        for vector in vectors:
            value = (model(x)[n] * vector[n]).sum()
            grads = torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows(name):
    function, *shapes = FUNCTIONS[name]
    model, x, vectors = Bare(function, *shapes).double(), normal(5, 3), normal(2, 5, 2, seed=7)
    wanted = rows_by_autograd(model, x, vectors)
    with Capture(model) as capture:
        for _ in range(2):  # Once with the checks, once after them.
            found = capture.pull_back(model(x), vectors)
            torch.testing.assert_close(found.to_dense(), wanted, rtol=1e-10, atol=1e-12)
        assert not capture.sources.direct
        for one in found.values():
            assert one.layout.is_dense or not isinstance(one, DenseJacobian)
        independent = capture.pull_back(model(x), vectors, independent=True)
        total = independent.to_dense().unflatten(0, (-1, 2)).sum(0)
        torch.testing.assert_close(total, wanted.unflatten(0, (-1, 2)).sum(0))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_weights_that_are_made_of_parameters(scale):
    """Their products are rows where the parameter has the gradient of the weight, not elsewhere."""
    noise = normal(SIZE, SIZE, seed=4)
    model = Bare(lambda h, w, r: functional.linear(h, scale * w + r.exp() * noise), SQUARE, SQUARE)
    model, x, vectors = model.double(), normal(5, 3), normal(2, 5, 2, seed=7)
    with Capture(model) as capture:
        found = capture.pull_back(model(x), vectors)
    assert isinstance(found["own.0"], LinearJacobian) == (scale == 1)
    assert not isinstance(found["own.1"], LinearJacobian)
    torch.testing.assert_close(found.to_dense(), rows_by_autograd(model, x, vectors))


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(60, 20, padding_idx=0), nn.Linear(20, 20)
        self.between = nn.Linear(20, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.layer(self.table(tokens)))
        h = functional.linear(torch.tanh(self.between(h)), self.layer.weight, self.layer.bias)
        return functional.linear(h, self.table.weight)


def test_layers_whose_parameters_are_multiplied_elsewhere():
    model, tokens = TiedHead().double(), torch.tensor([[0, 3, 5], [2, 0, 7], [8, 9, 9]])
    vectors = normal(2, 3, 3, 60)
    wanted = rows_by_autograd(model, tokens, vectors)
    with Capture(model) as capture:
        for _ in range(2):
            found = capture.pull_back(model(tokens), vectors)
            torch.testing.assert_close(found.to_dense(), wanted)
        assert capture.sources.by_products == {"table", "layer"}
        assert not any(isinstance(one, DenseJacobian) for one in found.values())


def test_layers_used_as_layers_alone_are_not_watched_after_the_check():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    seen = []
    with Capture(model) as capture:
        model[1].register_forward_hook(
            lambda *_: seen.append(len(_get_current_function_mode_stack()))
        )
        for _ in range(2):
            out = model(normal(5, 3).float())
            capture.pull_back(out, torch.ones(1, 5, 2))
    assert seen == [1, 0]


def grouped(h: Tensor, w: Tensor) -> Tensor:
    return functional.grouped_mm(h, w.mT, offs=torch.tensor([1, 1, 5], dtype=torch.int32))


@pytest.mark.skipif(not hasattr(functional, "grouped_mm"), reason="needs a newer torch")
def test_grouped_products():
    """The kernel takes float32 or less, and rows that begin at multiples of 16 bytes."""
    model = Bare(grouped, STACK).float()
    x, vectors = normal(5, 3).float(), normal(2, 5, 2, seed=7).float()
    wanted = rows_by_autograd(model, x, vectors)
    with Capture(model) as capture:
        for _ in range(2):
            found = capture.pull_back(model(x), vectors)
            torch.testing.assert_close(found.to_dense(), wanted, rtol=1e-4, atol=1e-5)
        assert capture.sources.by_products == {"own"}
        assert isinstance(found["own"], StackedJacobian)


@pytest.mark.parametrize(
    "function", [lambda h, w: h @ (w @ w), lambda h, w: torch.einsum("ni,oi->ni", h, w)]
)
def test_what_is_no_product(function):
    model = Bare(function, SQUARE).double()
    x, vectors = normal(4, 3), normal(1, 4, 2, seed=7)
    with Capture(model) as capture:
        found = capture.pull_back(model(x), vectors)
        torch.testing.assert_close(found.to_dense(), rows_by_autograd(model, x, vectors))
        assert list(capture.sources.direct) == ["own"]


def test_a_pass_that_fails_leaves_no_mode_behind():
    model = Bare(lambda h, w: h @ w[:3], SQUARE).double()
    with Capture(model), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(normal(4, 3))
    assert not _get_current_function_mode_stack()


@pytest.mark.slow
def test_a_model_that_is_compiled_later():
    function, *shapes = FUNCTIONS["x @ w"]
    model, x, vectors = Bare(function, *shapes).double(), normal(4, 3), normal(2, 4, 2, seed=7)
    wanted = rows_by_autograd(model, x, vectors)
    with Capture(model) as capture:
        capture.pull_back(model(x), vectors)
        assert capture.sources.by_products
        out = torch.compile(model, backend="eager")(x)
        torch.testing.assert_close(capture.pull_back(out, vectors).to_dense(), wanted)
        assert not capture.sources.by_products


class Experts(nn.Module):
    """A network in which every sample goes to one of three experts, which are layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(5, 24), nn.Linear(24, 3, bias=False)
        self.up = nn.ModuleList(nn.Linear(24, 16, bias=False) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(16, 24, bias=False) for _ in range(3))
        self.last = nn.Linear(24, 4)

    def expert(self, number: int, h: Tensor) -> Tensor:
        return self.down[number](torch.tanh(self.up[number](h)))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        share, chosen = self.gate(h).softmax(-1).max(-1)
        total = torch.zeros_like(h)
        for number in range(3):
            (which,) = torch.where(chosen == number)
            if len(which):
                out = self.expert(number, h[which]) * share[which, None]
                total = total.index_add(0, which, out)
        return self.last(h + total)


class StackedExperts(Experts):
    """The same with the experts' matrices stacked, as libraries store them."""

    def __init__(self, other: Experts) -> None:
        super().__init__()
        self.load_state_dict(other.state_dict())
        up, down = (torch.stack([e.weight for e in m]).detach() for m in (self.up, self.down))
        del self.up, self.down
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)

    def expert(self, number: int, h: Tensor) -> Tensor:
        return torch.tanh(h @ self.up[number].T) @ self.down[number].T


@pytest.fixture(scope="module")
def experts():
    torch.manual_seed(0)
    layers = Experts().double()
    return layers, StackedExperts(layers).double()


def in_order_of(stacked: nn.Module, layers: nn.Module, matrix: Tensor) -> Tensor:
    """Return a matrix over the parameters of layers in the order of those of a stack."""
    sizes = [p.numel() for p in layers.parameters()]
    places = dict(
        zip(dict(layers.named_parameters()), torch.arange(sum(sizes)).split(sizes), strict=True)
    )
    order = []
    for name, _ in stacked.named_parameters():
        own = [name] if name in places else [f"{name}.{e}.weight" for e in range(3)]
        order += [places[one] for one in own]
    index = torch.cat(order)
    return matrix[index][:, index]


@pytest.mark.parametrize(
    ("structure", "fisher"),
    [("kfac", "mc"), *((s, "exact") for s in STRUCTURES if s != "block_tridiagonal")],
)
def test_a_stack_of_experts_has_the_matrix_of_experts_that_are_layers(experts, structure, fisher):
    """(Neighbours of a tridiagonal matrix are others.)"""
    layers, stacked = experts
    data = normal(7, 5), torch.arange(7) % 4
    wanted, found = (
        fisher_matrix(model, data, "categorical", structure, fisher).to_dense()
        for model in (layers, stacked)
    )
    torch.testing.assert_close(found, in_order_of(stacked, layers, wanted), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kronecker_factors_of_a_stack(experts, sharing):
    """Every expert's factors are those of the samples that it sees."""
    _, model = experts
    x = normal(12, 5)
    with Capture(model) as capture:
        out = model(x)
        rows = capture.pull_back(out, torch.eye(4).double()[:, None].expand(4, 12, 4))[
            "StackedExperts.up"
        ]
    factors = rows.kronecker_factors(sharing)
    hidden = torch.tanh(model.first(x)).detach()
    chosen = model.gate(hidden).argmax(-1)
    for number in range(3):
        own = hidden[chosen == number]
        assert len(own)
        mean = factors.inputs[number] / factors.positions[number]
        seen = own if sharing == "expand" else own.mean(0, keepdim=True)
        torch.testing.assert_close(mean.tril(), (seen.T @ seen).tril() / len(seen))
        # Once for the vectors of each sample, as they are coupled.
        assert factors.positions[number] == 12 * len(seen)

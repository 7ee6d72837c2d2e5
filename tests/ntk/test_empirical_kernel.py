"""The empirical tangent kernel, against dense Jacobians from one backward pass per output."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from natgrad import Capture
from natgrad.jacobians import LinearJacobian
from natgrad.ntk import MLP, empirical, empirical_kernel
from tests import dense
from tests.cases import CASES, Case, normal

# Its attention mask has no dimension for samples.
NAMES = [name for name in CASES if name != "self_attention_time_first_masked"]
# Batch statistics are those of the batch, whatever its size: other batches are other functions.
SPLITTABLE = [name for name in NAMES if name != "batch_norm_train"]
#: Of which everything is asked.
SOME = ("mlp", "conv2d", "self_attention")


@pytest.fixture(params=NAMES)
def case(request) -> Case:
    return CASES[request.param]()


def each(x, function):
    """Apply a function to every tensor of some inputs."""
    if isinstance(x, dict):
        return {name: function(value) for name, value in x.items()}
    if isinstance(x, tuple):
        return tuple(function(value) for value in x)
    return function(x)


def others(case: Case):
    """Return other inputs, one sample fewer where there is more than one."""
    samples = max(1, len(case.z) - 1)

    def change(value: Tensor) -> Tensor:
        if value.is_floating_point():
            return (0.7 * value + 0.3 * value.flip(0).sin() + 0.1)[:samples]
        return value.roll(1, -1)[:samples]

    return each(case.x, change)


def jacobian(case: Case, x=None) -> Tensor:
    """Return ``(N, D, P)`` with D outputs per sample."""
    if x is None:
        z, jac = case.jacobian
    else:
        z, jac = dense.jacobian(case.model, x, case.output)
    return jac.reshape(len(z), -1, jac.shape[-1])


#: Model of a case → rows of its other inputs.
ROWS_OF_OTHERS: dict[nn.Module, Tensor] = {}


def jacobian_of_others(case: Case) -> Tensor:
    if case.model not in ROWS_OF_OTHERS:
        ROWS_OF_OTHERS[case.model] = jacobian(case, others(case))
    return ROWS_OF_OTHERS[case.model]


def gram(left: Tensor, right: Tensor, outputs: str = "full") -> Tensor:
    """Return the kernel entry by entry of its definition."""
    products = torch.einsum("ncp,mdp->ncmd", left, right)
    if outputs == "full":
        return products.reshape(products.shape[0] * products.shape[1], -1)
    same = torch.stack([products[:, c, :, c] for c in range(products.shape[1])])
    return same if outputs == "classwise" else same.sum(0)


def block_names(case: Case) -> dict[str, int]:
    """Return block name → its place in the case's list of blocks."""
    with Capture(case.model, case.output) as capture:
        names = {name: frozenset(block.layout.names) for name, block in capture.blocks.items()}
    places = {frozenset(spec.names): place for place, spec in enumerate(case.blocks)}
    return {name: places[own] for name, own in names.items()}


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", ["full", "classwise", "trace"])
def test_kernel_of_every_layer_kind(case, outputs):
    own, x2 = jacobian(case), others(case)
    found = empirical_kernel(case.model, case.x, outputs=outputs, output=case.output)
    dense.assert_same(found, gram(own, own, outputs))
    found = empirical_kernel(case.model, case.x, x2, outputs=outputs, output=case.output)
    dense.assert_same(found, gram(own, jacobian_of_others(case), outputs))
    # Given twice, the inputs are not known to be the same, but the kernel is.
    found = empirical_kernel(case.model, case.x, case.x, outputs=outputs, output=case.output)
    dense.assert_same(found, gram(own, own, outputs))


@pytest.mark.parametrize(
    ("name", "outputs"),
    # Of all layers together every kind is compared above.
    [(name, "full") for name in NAMES]
    + [(name, outputs) for name in SOME for outputs in ("classwise", "trace")],
)
def test_kernel_per_layer(name, outputs):
    case = CASES[name]()
    left, right = jacobian(case), jacobian_of_others(case)
    places = block_names(case)
    columns = dense.block_indices(case.model, case.blocks)
    for x2, other in ((None, left), (others(case), right)):
        found = empirical_kernel(
            case.model, case.x, x2, per_layer=True, outputs=outputs, output=case.output
        )
        scale = float(gram(left, other, outputs).norm())
        for name, kernel in found.items():
            index = columns[places[name]]
            wanted = gram(left[..., index], other[..., index], outputs)
            assert kernel.shape == wanted.shape and kernel.dtype == torch.float64
            assert float((kernel - wanted).norm()) <= 1e-10 * scale, name
        for name, place in places.items():
            if name not in found:  # the output does not depend on it
                assert not bool(left[..., columns[place]].any())
        dense.assert_same(sum(found.values()), gram(left, other, outputs))


def test_kernel_per_unit(case):
    left, right = jacobian(case), jacobian_of_others(case)
    places = block_names(case)
    columns = dense.block_indices(case.model, case.blocks)
    for x2, other in ((None, left), (others(case), right)):
        found = empirical_kernel(case.model, case.x, x2, per_unit=True, output=case.output)
        scale = float(gram(left, other).norm())
        assert found
        for name, kernels in found.items():
            place = places[name]
            units = dense.unit_indices(case.model, [case.blocks[place]])
            assert len(kernels) == len(units), name
            for kernel, index in zip(kernels, units, strict=True):
                wanted = gram(left[..., index], other[..., index])
                assert kernel.shape == wanted.shape
                assert float((kernel - wanted).norm()) <= 1e-10 * scale, name
            layer = gram(left[..., columns[place]], other[..., columns[place]])
            assert float((kernels.sum(0) - layer).norm()) <= 1e-10 * scale


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [(name, 2) for name in SPLITTABLE] + [(name, size) for name in SOME for size in (1, 3, 1000)],
)
def test_batches_change_nothing(name, batch_size):
    case = CASES[name]()
    left, x2 = jacobian(case), others(case)
    right = jacobian_of_others(case)
    options = {"output": case.output, "batch_size": batch_size}
    found = empirical_kernel(case.model, case.x, **options)
    dense.assert_same(found, gram(left, left))
    if batch_size < len(left):  # the products of different batches are mirrored
        size, n = batch_size * left.shape[1], len(found)
        for start in range(0, n, size):
            stop = min(start + size, n)
            assert torch.equal(found[start:stop, stop:], found[stop:, start:stop].T)
    found = empirical_kernel(case.model, case.x, x2, **options)
    dense.assert_same(found, gram(left, right))
    if name in SOME:
        columns = dense.block_indices(case.model, case.blocks)
        per_layer = empirical_kernel(case.model, case.x, x2, per_layer=True, **options)
        per_unit = empirical_kernel(case.model, case.x, per_unit=True, **options)
        for key, place in block_names(case).items():
            index = columns[place]
            dense.assert_same(per_layer[key], gram(left[..., index], right[..., index]))
            units = dense.unit_indices(case.model, [case.blocks[place]])
            wanted = [gram(left[..., unit], left[..., unit]) for unit in units]
            dense.assert_same(per_unit[key], torch.stack(wanted))
        for outputs in ("classwise", "trace"):
            found = empirical_kernel(case.model, case.x, outputs=outputs, **options)
            dense.assert_same(found, gram(left, left, outputs))


@pytest.mark.parametrize("batch_size", [None, 1, 3])
@pytest.mark.parametrize("name", ["mlp", "repeated", "conv2d", "tokens", "self_attention"])
def test_symmetric_kernels_are_symmetric_to_the_last_bit(name, batch_size):
    case = CASES[name]()
    for outputs in ("full", "classwise", "trace"):
        options = {"outputs": outputs, "batch_size": batch_size}
        found = empirical_kernel(case.model, case.x, **options)
        assert torch.equal(found, found.mT)
        for kernel in empirical_kernel(case.model, case.x, per_layer=True, **options).values():
            assert torch.equal(kernel, kernel.mT)


@given(
    samples=st.integers(1, 7),
    more=st.integers(0, 7),
    outputs=st.integers(1, 3),
    depth=st.integers(1, 3),
    batch_size=st.one_of(st.none(), st.integers(1, 8)),
    kind=st.sampled_from(["full", "classwise", "trace"]),
    bias=st.sampled_from([0.0, 0.3]),
)
def test_any_shape(samples, more, outputs, depth, batch_size, kind, bias):
    torch.manual_seed(samples)
    model = MLP((3, *[4] * (depth - 1), outputs), "tanh", 1.5, bias, dtype=torch.float64)
    x, x2 = normal(samples, 3), normal(more, 3, seed=1) if more else None
    case = Case(model, x, ())
    right = jacobian(case) if x2 is None else jacobian(case, x2)
    found = empirical_kernel(model, x, x2, outputs=kind, batch_size=batch_size)
    dense.assert_same(found, gram(jacobian(case), right, kind))


def test_kernel_of_functional_jacobians():
    """The same by ``torch.func.jacrev``, on a network of NTK layers."""
    torch.manual_seed(0)
    model = MLP((5, 6, 4, 2), "gelu", 1.5, 0.3, dtype=torch.float64)
    x = normal(4, 5)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    jac = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(parameters)
    rows = torch.cat([value.reshape(8, -1) for value in jac.values()], 1)
    dense.assert_same(empirical_kernel(model, x), rows @ rows.T)


def test_every_pair_of_samples_is_multiplied_once(monkeypatch):
    calls = []
    plain = LinearJacobian.gram

    def counted(self, other=None):
        calls.append(other is None)
        return plain(self, other)

    monkeypatch.setattr(LinearJacobian, "gram", counted)
    model, x = nn.Linear(3, 2).double(), normal(5, 3)
    found = empirical_kernel(model, x, batch_size=1)
    assert len(calls) == 5 * 6 // 2 and calls.count(True) == 5
    dense.assert_same(found, gram(*[jacobian(Case(model, x, ()))] * 2))


@pytest.mark.parametrize("limit", [1, 40])
def test_rows_that_are_not_kept(monkeypatch, limit):
    """Batches follow a budget, and rows are made again where they do not fit it."""
    monkeypatch.setattr(empirical, "BATCH_ELEMENTS", limit)
    sizes = []
    for name in ("mlp", "conv2d", "bilinear", "dictionary_output"):
        case = CASES[name]()
        left, x2 = jacobian(case), others(case)
        handle = case.model.register_forward_hook(lambda *args: sizes.append(1))
        found = empirical_kernel(case.model, case.x, output=case.output)
        handle.remove()
        dense.assert_same(found, gram(left, left))
        found = empirical_kernel(case.model, case.x, x2, output=case.output)
        dense.assert_same(found, gram(left, jacobian(case, x2)))
    assert len(sizes) > 2 * 4


@pytest.mark.parametrize("limit, most", [(1, 3), (2**20, 12)])
def test_rows_in_memory(monkeypatch, limit, most):
    """Beyond the budget: those of one batch of either side, and of the one just made."""
    plain, made, alive = empirical.output_rows, [], []

    def recorded(capture, inputs):
        outputs, rows = plain(capture, inputs)
        made.append(weakref.ref(rows))
        alive.append(sum(reference() is not None for reference in made))
        return outputs, rows

    monkeypatch.setattr(empirical, "output_rows", recorded)
    monkeypatch.setattr(empirical, "BATCH_ELEMENTS", limit)
    model, x = nn.Linear(3, 2).double(), normal(6, 3)
    found = empirical_kernel(model, x, normal(6, 3, seed=1), batch_size=1)
    assert found.shape == (12, 12)
    assert max(alive) <= most + 1
    # Two probes; then each batch once where rows are kept.
    assert (len(made) == 2 + 12) == (limit > 1)


def test_other_arguments_than_tensors():
    """They are passed on as they are."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, factor: float, square: bool = False) -> Tensor:
            y = factor * self.layer(x)
            return y.square() if square else y

    model = Scaled().double()
    x = normal(4, 3)
    for arguments in ((x, 1.7, True), {"x": x, "factor": 1.7, "square": True}):
        jac = jacobian(Case(model, arguments, ()))
        for batch_size in (None, 3):
            found = empirical_kernel(model, arguments, batch_size=batch_size)
            dense.assert_same(found, gram(jac, jac))


def test_one_output_per_sample():
    """Outputs of shape (N, 1), and those of shape (N,), have one direction each."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = normal(4, 3)
    jac = jacobian(Case(model, x, ()))[:, 0]
    for outputs, shape in (("full", (4, 4)), ("classwise", (1, 4, 4)), ("trace", (4, 4))):
        found = empirical_kernel(model, x, outputs=outputs)
        dense.assert_same(found, (jac @ jac.T).reshape(shape))
        flat = empirical_kernel(model, x, outputs=outputs, output=lambda out: out[:, 0])
        dense.assert_same(flat, found)
    with pytest.raises(ValueError, match="is a single number, as a loss is"):
        empirical_kernel(model, x, output=lambda out: out.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_has_the_dtype_of_the_parameters(dtype):
    case = CASES["mlp"]()
    model = copy.deepcopy(case.model).to(dtype)
    found = empirical_kernel(model, case.x.to(dtype))
    assert found.dtype == dtype
    own = jacobian(case)
    error = (found.double() - gram(own, own)).norm() / gram(own, own).norm()
    # Rounding of about 20 operations in sequence.
    assert error < 20 * torch.finfo(dtype).eps


def test_kernel_of_a_wide_network_needs_no_dense_rows():
    """Rows of 2·10⁶ parameters for 50 samples: 840 MB if they were written out."""
    torch.manual_seed(0)
    model = MLP((10, 1024, 1024, 2), "relu", dtype=torch.float64)
    x = normal(25, 10)
    h = [x * math.sqrt(2 / 10)]
    u = h[0] @ model[1].weight.T
    h.append(u.relu() * math.sqrt(2 / 1024))
    v = h[1] @ model[3].weight.T
    h.append(v.relu() * math.sqrt(2 / 1024))
    top = math.sqrt(2 / 1024) * torch.einsum("ci,ni->nci", model[5].weight, (v > 0).double())
    low = math.sqrt(2 / 1024) * (top @ model[3].weight) * (u > 0).double().unsqueeze(1)
    deltas = [low, top, torch.eye(2, dtype=torch.float64).expand(25, 2, 2)]
    wanted = torch.zeros(25, 2, 25, 2, dtype=torch.float64)
    for inner, delta in zip(h, deltas, strict=True):
        wanted += torch.einsum("nci,mdi,nm->ncmd", delta, delta, inner @ inner.T)
    dense.assert_same(empirical_kernel(model, x), wanted.reshape(50, 50).detach(), 1e-12)


# -- errors and traces -----------------------------------------------------------------------------


def test_errors():
    case = CASES["mlp"]()
    model, x = case.model, case.x
    with pytest.raises(ValueError, match="'full', 'classwise' or 'trace', got 'diagonal'"):
        empirical_kernel(model, x, outputs="diagonal")
    for outputs in ("classwise", "trace"):
        with pytest.raises(ValueError, match="outputs='full'"):
            empirical_kernel(model, x, per_unit=True, outputs=outputs)
    for size in (0, -1):
        with pytest.raises(ValueError, match="batch_size must be an integer of at least 1"):
            empirical_kernel(model, x, batch_size=size)
    for bad in (x[:0], (x, x[:2]), {"input": x, "other": torch.tensor(1.0)}, (), (1.0,)):
        with pytest.raises(ValueError, match="same number of samples"):
            empirical_kernel(model, bad)
    pixels = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten()).double()
    with pytest.raises(ValueError, match="8 outputs per sample and x2 to 18"):
        empirical_kernel(pixels, normal(2, 1, 2, 2), normal(2, 1, 3, 3))
    assert not any(module._forward_hooks for module in pixels.modules())
    for kind in ({}, {"per_layer": True}, {"per_unit": True}):
        frozen = copy.deepcopy(model).requires_grad_(False)
        with pytest.raises(ValueError, match="trainable"):
            empirical_kernel(frozen, x, **kind)


def test_uncovered_parameters_are_named():
    model = nn.Sequential(
        nn.Embedding(5, 3, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(6, 2)
    )
    with pytest.raises(ValueError, match="0.weight.*frequency"):
        empirical_kernel(model, torch.tensor([[0, 1], [2, 3]]))
    model[0].weight.requires_grad_(False)
    found = empirical_kernel(model, torch.tensor([[0, 1], [2, 3]]))
    assert found.shape == (4, 4)


def test_kernels_that_do_not_fit_memory(monkeypatch):
    """2·10⁴ samples: 3.2 GB in float64, of 1 byte there is."""
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    monkeypatch.setattr(LinearJacobian, "gram", lambda self, other=None: torch.zeros(10, 10))
    with pytest.raises(ValueError, match="GiB"):
        empirical_kernel(nn.Linear(1, 1).double(), normal(20000, 1), batch_size=10)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 2)
    ).double()
    x = normal(6, 4)
    model(x).sum().backward()
    flags = [(True, True), (False, False), (False, True)]
    for training, inner in flags:
        model.train(training)
        model[3].train(inner)
        before = copy.deepcopy(model.state_dict())
        parameters = list(model.parameters())
        gradients = [p.grad.clone() for p in parameters]
        state = torch.get_rng_state()
        for options in ({}, {"per_layer": True}, {"per_unit": True}, {"batch_size": 4}):
            empirical_kernel(model, x, x[:3], **options)
        with pytest.raises(RuntimeError):
            empirical_kernel(model, normal(3, 7))
        assert torch.equal(torch.get_rng_state(), state)
        assert (model.training, model[3].training) == (training, inner)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
        for old, new, gradient in zip(parameters, model.parameters(), gradients, strict=True):
            assert old is new and new.requires_grad and torch.equal(new.grad, gradient)
        for module in model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
            assert not module._backward_hooks

"""Several outputs with a likelihood each: F is the sum over the heads."""

from __future__ import annotations

import collections
import dataclasses
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from natgrad.likelihoods import Categorical, Gaussian, Heads
from tests.cases import generator, normal
from tests.methods import make_optimizer

DOUBLE = torch.float64
HEADS = {"logits": "categorical", "value": "gaussian", "tokens": nn.CrossEntropyLoss()}
Named = collections.namedtuple("Named", HEADS)


@dataclasses.dataclass(frozen=True)
class Record:
    logits: Tensor
    value: Tensor
    tokens: Tensor


class Model(nn.Module):
    """A trunk with three heads: (N, 4), (N, 2), and (N, 3, T) with classes in dimension 1."""

    def __init__(self, form=dict) -> None:
        super().__init__()
        self.form = form
        self.trunk, self.pi = nn.Linear(5, 4), nn.Linear(4, 4)
        self.v, self.t = nn.Linear(4, 2), nn.Linear(4, 6)
        self.double()
        for index, p in enumerate(self.parameters()):
            p.data = normal(*p.shape, seed=index) / 2

    def heads(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x).tanh()
        tokens = self.t(h).view(-1, 3, 2)
        return {"logits": self.pi(h), "value": self.v(h), "tokens": tokens}

    def forward(self, x: Tensor):
        heads = self.heads(x)
        return heads if self.form is dict else self.form(*heads.values())


def tuple_of(*items):
    return items


def list_of(*items):
    return list(items)


def data(n: int = 6):
    x = normal(n, 5)
    y = {
        "logits": torch.randint(0, 4, (n,), generator=generator(1)),
        "value": normal(n, 2, seed=2),
        "tokens": torch.randint(0, 3, (n, 2), generator=generator(3)),
    }
    return x, y


def losses(out, y):
    """The mean loss of every head."""
    get = (lambda k: out[k]) if isinstance(out, dict) else (lambda k: getattr(out, k))
    if isinstance(out, (tuple, list)) and not hasattr(out, "_fields"):
        get = dict(zip(HEADS, out, strict=True)).__getitem__
    return {
        "logits": functional.cross_entropy(get("logits"), y["logits"]),
        "value": (get("value") - y["value"]).square().sum(1).mean() / 2,
        "tokens": functional.cross_entropy(get("tokens"), y["tokens"]),
    }


def dense(model: Model, x: Tensor, y: dict, names=tuple(HEADS)) -> Tensor:
    """Σ_h Jᵀ (∂²L_h/∂z²) J by torch.func."""
    values = {n: p.detach() for n, p in model.named_parameters()}
    total = 0
    for name in names:
        z = model.heads(x)[name].detach()

        def output(v, name=name):
            model.form = dict
            return torch.func.functional_call(model, v, (x,))[name].flatten()

        form = model.form
        jacobian = torch.func.jacrev(output)(values)
        model.form = form
        rows = torch.cat([j.flatten(1) for j in jacobian.values()], 1)
        outputs = model.heads(x)

        def loss(flat, name=name, z=z, outputs=outputs):
            return losses({**outputs, name: flat.view(z.shape)}, y)[name]

        curvature = torch.func.hessian(loss)(z.flatten())
        total = total + rows.T @ curvature.detach() @ rows
    return total


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).norm() <= 1e-10 * expected.norm()


FORMS = {
    "dict": (dict, HEADS),
    "attributes": (Record, HEADS),
    "named tuple": (Named, HEADS),
    "tuple": (tuple_of, dict(enumerate(HEADS.values()))),
    "list": (list_of, dict(enumerate(HEADS.values()))),
}


def masked(y):
    y = {name: one.clone() for name, one in y.items()}
    y["tokens"][0] = y["tokens"][2, 1] = y["logits"][3] = -100
    y["value"][1] = torch.nan
    return y


@pytest.mark.parametrize("form", FORMS)
def test_fisher_matrix_is_the_sum_over_heads(form):
    kind, likelihood = FORMS[form]
    model, (x, y) = Model(kind), data()
    keyed = dict(zip(likelihood, y.values(), strict=True))
    expected = dense(model, x, y)
    for target in (None, keyed):
        F = natgrad.fisher_matrix(model, (x, target), likelihood, "full")
        assert_same(F.to_dense(), expected)
    F = natgrad.fisher_matrix(model, [(x, tuple(y.values()))], likelihood, "block_diagonal")
    blocks = F.to_dense()
    assert_same(blocks, expected * (blocks != 0))


def test_masks_count_for_their_own_head():
    model, (x, y) = Model(), data()
    y = masked(y)
    kept = {**y, "value": y["value"].nan_to_num()}
    shares = [dense(model, x, kept, (name,)) for name in ("logits", "tokens")]
    without = [i for i in range(6) if i != 1]
    shares.append(dense(model, x[without], {n: v[without] for n, v in kept.items()}, ("value",)))
    F = natgrad.fisher_matrix(model, (x, y), HEADS, "full")
    assert_same(F.to_dense(), sum(shares))


@pytest.mark.parametrize("form", FORMS)
def test_an_optimizer_sees_all_heads(form):
    kind, likelihood = FORMS[form]
    model, (x, y) = Model(kind), data()
    expected = dense(model, x, y)
    optimizer = natgrad.ExactNGD(model, likelihood, lr=0.1, damping=1e-2, kl_clip=None)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    plain = sum(losses(Model(kind)(x), y).values())
    loss = sum(losses(model(x), y).values())
    torch.testing.assert_close(loss, plain, rtol=0, atol=0)
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    gradient = torch.cat([g.flatten() for g in gradients])
    loss.backward()
    optimizer.step()
    assert_same(optimizer.preconditioner.curvature.matrix().to_dense(), expected)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    damped = expected + 1e-2 * torch.eye(len(expected), dtype=DOUBLE)
    step = torch.linalg.solve(damped, gradient)
    torch.testing.assert_close(before - after, 0.1 * step, rtol=1e-8, atol=1e-12)


class WithLoss(Model):
    """A model that computes its loss itself, and returns it first."""

    def __init__(self, y: dict[str, Tensor], form) -> None:
        super().__init__()
        self.y, self.returned = y, form

    def forward(self, x: Tensor):
        heads = self.heads(x)
        return self.returned({"loss": sum(losses(heads, self.y).values()), **heads})


@pytest.mark.parametrize("form", [dict, lambda d: types.SimpleNamespace(**d)])
def test_an_optimizer_sees_a_loss_inside_of_the_model(form):
    x, y = data()
    model = WithLoss(y, form)
    expected = dense(Model(), x, y)
    optimizer = natgrad.ExactNGD(model, HEADS, lr=0.1, damping=1e-2, kl_clip=None)
    twin = Model()
    other = natgrad.ExactNGD(twin, HEADS, lr=0.1, damping=1e-2, kl_clip=None)
    for step in range(2):
        optimizer.zero_grad(), other.zero_grad()
        out = model(x)
        loss = (out["loss"] if form is dict else out.loss) / 2
        del out
        loss.backward()
        (sum(losses(twin(x), y).values()) / 2).backward()
        optimizer.step(), other.step()
        if step == 0:
            assert_same(optimizer.preconditioner.curvature.matrix().to_dense(), expected)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_a_model_that_returns_its_loss_first():
    x, y = data()
    model = WithLoss(y, dict)
    optimizer = natgrad.KFAC(model)
    model.returned = lambda d: (d["loss"], d["logits"])
    model(x)[0].backward()
    assert optimizer.preconditioner.observer.seen[0].recorded.source.shape == (6, 4)
    optimizer.step()
    model.returned = lambda d: {key: d[key] for key in ("loss", "value", "tokens")}
    with pytest.raises(ValueError, match="loss and 'value', 'tokens': say of which"):
        model(x)
    with torch.no_grad():
        model(x)
    model.returned = lambda d: d["loss"]
    with pytest.raises(ValueError, match="is a single number"):
        model(x)


@pytest.mark.parametrize("names", [("logits",), ("value", "tokens"), ("tokens", "logits")])
def test_heads_may_be_off(names):
    model, (x, y) = Model(), data()
    optimizer = natgrad.ExactNGD(model, HEADS, lr=0.0, kl_clip=None)
    found = losses(model(x), y)
    sum(found[name] for name in names).backward()
    optimizer.step()
    F = optimizer.preconditioner.curvature.matrix().to_dense()
    assert_same(F, dense(model, x, y, names))


@given(
    st.lists(st.sampled_from(list(HEADS)), min_size=1, max_size=3, unique=True),
    st.integers(2, 5),
    st.integers(0, 2**16),
    st.sampled_from([0.0, 0.3, 0.8]),
)
@settings(deadline=None, max_examples=25)
def test_any_heads_with_any_masks(names, samples, seed, share):
    """Masks of labels and of entries; heads that are off, or masked whole."""
    model, (x, y) = Model(), data(samples)
    g = generator(seed)
    for name in ("logits", "tokens"):
        y[name][torch.rand(y[name].shape, generator=g) < share] = -100
    mask = torch.rand(samples, 1, generator=g) >= share

    def total(f):
        out = f(x)
        found = [
            functional.cross_entropy(out[name], y[name], reduction="sum")
            / (y[name] != -100).sum().clamp_min(1)
            for name in names
            if name != "value"
        ]
        if "value" in names:
            squares = ((out["value"] - y["value"]).square() * mask).sum() / 2
            found.append(squares / mask.sum().clamp_min(1))
        return sum(found)

    values = {n: p.detach() for n, p in model.named_parameters()}

    def output(v):
        return torch.func.functional_call(model, v, (x,))

    jacobians = torch.func.jacrev(output)(values)
    z = {name: one.detach() for name, one in model(x).items()}
    expected = 0.0
    for name in names:
        rows = torch.cat([j.flatten(z[name].dim()) for j in jacobians[name].values()], -1)
        rows = rows.reshape(z[name].numel(), -1)

        def loss(one, name=name):
            return total(lambda x: {**z, name: one.view(z[name].shape)})

        expected = expected + rows.T @ torch.func.hessian(loss)(z[name].flatten()) @ rows
    optimizer = natgrad.ExactNGD(model, HEADS, lr=0.0, kl_clip=None)
    total(model).backward()
    optimizer.step()
    F = optimizer.preconditioner.curvature.matrix().to_dense()
    assert (F - expected).norm() <= 1e-10 * expected.norm()


def test_the_joint_loss_is_the_sum_of_the_heads_own():
    """With an event of one head ignored, and another without a target."""
    logits, value = normal(6, 3), normal(6, 2, seed=1)
    heads = Heads({"class": "categorical", "value": "gaussian"})
    joined = heads.of_shapes({"class": logits.shape, "value": value.shape})
    y = torch.tensor([0, 2, -100, 1, 1, 0])
    target = {"class": y, "value": normal(6, 2, seed=2)}
    z = torch.cat([logits, value], 1).requires_grad_()
    own = functional.cross_entropy(z[:, :3], y)
    total = own + 0.5 * (z[:, 3:] - target["value"]).square().sum(1).mean()
    torch.testing.assert_close(joined.loss(z, target), total)
    torch.testing.assert_close(joined.nll(z, target).sum() / 6, total)
    (expected,) = torch.autograd.grad(total, z, retain_graph=True)
    torch.testing.assert_close(joined.gradient(z, target) / 6, expected)
    torch.testing.assert_close(joined.loss(z, (y, None)), own)
    # Labels that are drawn are a target again, and say the same as vectors of the same draw.
    drawn = joined.sample(z.detach(), generator(3))
    vectors = joined.sampled_vectors(z.detach(), generator(3))
    torch.testing.assert_close(joined.gradient(z, drawn).detach(), vectors[0])


def test_heads_are_equal_where_their_likelihoods_are():
    heads = Heads({"class": "categorical", "value": Gaussian(0.5)})
    assert heads == Heads({"class": Categorical(), "value": Gaussian(0.5)})
    assert hash(heads) == hash(Heads({"class": Categorical(), "value": Gaussian(0.5)}))
    assert heads != Heads({"class": "categorical", "value": "gaussian"})
    assert heads.decided(heads.decision) == heads
    with pytest.raises(ValueError, match="not a mapping"):
        Heads({"class": heads})
    with pytest.raises(NotImplementedError, match="pick one head"):
        heads.nll(normal(4, 3), torch.zeros(4))


def test_largest_decrement_is_that_of_the_summed_losses():
    """Every head's own, which is of a mean over its own count."""
    model, (x, y) = Model(), data(4)
    y["tokens"][0] = -100
    z = {name: one.detach().requires_grad_() for name, one in model(x).items()}
    losses = {
        "logits": functional.cross_entropy(z["logits"], y["logits"]),
        "value": 0.5 * (z["value"] - y["value"]).square().sum(1).mean(),
        "tokens": functional.cross_entropy(z["tokens"], y["tokens"]),
    }
    sum(losses.values()).backward()
    joined = natgrad.likelihoods.as_likelihood(HEADS).of_shapes(
        {name: one.shape for name, one in z.items()}
    )
    flat = torch.cat([one.detach().flatten(1) for one in z.values()], 1)
    cotangent = torch.cat([one.grad.flatten(1) for one in z.values()], 1)
    weights, scale = joined.infer_event_weights(flat, cotangent)
    found = 4 * joined.largest_decrement(flat, cotangent, weights, scale)
    expected = 0.0
    for name, one in z.items():
        own = joined.parts[joined.keys.index(name)]
        w, c = own.infer_event_weights(one.detach(), one.grad)
        bound = own.largest_decrement(one.detach(), one.grad, w, c)
        expected = expected + own.seen_count(one.detach(), w) * bound
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("factor", [1.0, 0.5, 8.0])
@pytest.mark.parametrize("label", ["categorical", "bernoulli"])
def test_heads_show_by_what_their_losses_are_multiplied(factor, label):
    """As the sum over samples of a variational autoencoder; a squared error shows nothing."""
    z, value = normal(8, 3, seed=1).requires_grad_(), normal(8, 2, seed=2).requires_grad_()
    if label == "categorical":
        loss = functional.cross_entropy(z, torch.arange(8) % 3)
    else:
        y = (normal(8, 3, seed=3) > 0).double()
        loss = functional.binary_cross_entropy_with_logits(z, y, reduction="sum") / 8
    (factor * (loss + value.square().sum(1).mean())).backward()
    heads = natgrad.likelihoods.as_likelihood({"z": label, "value": "gaussian"})
    joined = heads.of_shapes({"z": z.shape, "value": value.shape})
    flat, cotangent = torch.cat([z, value], 1).detach(), torch.cat([z.grad, value.grad], 1)
    _, scale = joined.infer_event_weights(flat, cotangent)
    torch.testing.assert_close(scale, scale.new_tensor(factor / 8))
    _, scale = joined.infer_event_weights(flat, torch.cat([0 * z.grad, value.grad], 1))
    torch.testing.assert_close(scale, scale.new_tensor(1 / 8))


def test_ignored_tokens_and_accumulation():
    model, (x, y) = Model(), data()
    y["tokens"][0] = y["tokens"][2, 1] = y["logits"][3] = -100
    optimizer = natgrad.ExactNGD(model, HEADS, lr=0.0, kl_clip=None)
    sum(losses(model(x), y).values()).backward()
    optimizer.step()
    F = optimizer.preconditioner.curvature.matrix().to_dense()
    assert_same(F, dense(model, x, y))
    optimizer.zero_grad()
    parts = [(x[i : i + 3], {n: v[i : i + 3] for n, v in y.items()}) for i in (0, 3)]
    for xs, ys in parts:
        (sum(losses(model(xs), ys).values()) / 2).backward()
    optimizer.step()
    F = optimizer.preconditioner.curvature.matrix().to_dense()
    assert_same(F, sum(dense(model, *part) for part in parts) / 2)


@pytest.mark.parametrize("structure", ["kfac", "full"])
def test_sampled_labels_of_the_heads_are_independent(structure):
    model, (x, _) = Model(), data()
    many = natgrad.fisher.MonteCarloFisher(samples=4000)
    F = natgrad.fisher_matrix(model, (x, None), HEADS, structure, many).to_dense()
    exact = natgrad.fisher_matrix(model, (x, None), HEADS, structure).to_dense()
    assert (F - exact).norm() < 0.08 * exact.norm()


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical", "improved"])
@pytest.mark.parametrize(
    "kind", [natgrad.KFAC, natgrad.EKFAC, natgrad.SINGD, natgrad.BlockDiagonalNGD, natgrad.FNGD]
)
def test_optimizers_train_all_heads(kind, fisher):
    model, (x, y) = Model(tuple_of), data(32)
    options = {} if kind is natgrad.FNGD else {"fisher": fisher}
    optimizer = make_optimizer(kind, model, FORMS["tuple"][1], **options)
    values = []
    for _ in range(8):
        optimizer.zero_grad()
        found = losses(model(x), y)
        sum(found.values()).backward()
        optimizer.step()
        values.append([float(one.detach()) for one in found.values()])
    assert sum(values[-1]) < sum(values[0])
    assert values[-1][1] < values[0][1]


def test_outputs_may_be_changed_in_place_and_stay_of_their_types():
    class Mixed(Model):
        def forward(self, x):
            heads = self.heads(x)
            return {**heads, "value": heads["value"].to(torch.bfloat16), "rest": [heads["logits"]]}

    model, (x, y) = Mixed(), data()
    optimizer = natgrad.KFAC(model, HEADS)
    out = model(x)
    assert out["value"].dtype == torch.bfloat16 and out["rest"][0] is out["logits"]
    out["logits"][:, 0] -= 1.0
    sum(losses(out, y).values()).backward()
    optimizer.step()


def test_the_target_may_be_told():
    model, (x, y) = Model(), data()
    y["tokens"][0] = -100
    likelihood = {**HEADS, "logits": Categorical(class_weights=[1.0, 2, 3, 4], label_smoothing=0.1)}
    optimizer = natgrad.ExactNGD(model, likelihood, lr=0.0, kl_clip=None)

    def criterion(out, y):
        found = losses(out, y)
        own = functional.cross_entropy(
            out["logits"],
            y["logits"],
            weight=torch.tensor([1.0, 2, 3, 4], dtype=DOUBLE),
            label_smoothing=0.1,
        )
        return own + found["value"] + found["tokens"]

    optimizer.loss(criterion, model(x), y).backward()
    optimizer.step()
    F = optimizer.preconditioner.curvature.matrix().to_dense()
    assert_same(F, natgrad.fisher_matrix(model, (x, y), likelihood, "full").to_dense())


def test_the_empirical_fisher_matrix_is_that_of_the_sum_of_the_losses():
    model, (x, y) = Model(tuple_of), data()
    rows = []
    for i in range(6):
        found = losses(model(x[i : i + 1]), {n: v[i : i + 1] for n, v in y.items()})
        gradients = torch.autograd.grad(sum(found.values()), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]))
    rows = torch.stack(rows)
    likelihood = FORMS["tuple"][1]
    for told in (False, True):
        optimizer = natgrad.BlockDiagonalNGD(
            model, likelihood, fisher="empirical", lr=0.0, kl_clip=None
        )
        out = model(x)
        if told:
            optimizer.update_fisher(out, tuple(y.values()))
        sum(losses(out, y).values()).backward()
        optimizer.step()
        F = optimizer.preconditioner.curvature.matrix().to_dense()
        assert_same(F, rows.T @ rows / 6 * (F != 0))
        optimizer.zero_grad()
        del optimizer


def test_laplace_of_several_heads():
    model, (x, y) = Model(), data()
    posterior = natgrad.Laplace(model, [(x, y)], HEADS, "full", prior_precision=2.0)
    total = sum(float(one.detach()) for one in losses(model(x), y).values())
    assert posterior.log_likelihood == pytest.approx(-6 * total, rel=1e-12)
    precision = 6 * dense(model, x, y) + 2 * torch.eye(posterior.matrix.shape[0], dtype=DOUBLE)
    _, covariance = posterior.functional_variance(x)
    assert covariance.shape == (6, 12, 12)
    values = {n: p.detach() for n, p in model.named_parameters()}
    jacobian = torch.func.jacrev(
        lambda v: torch.func.functional_call(model, v, (x,))["value"].flatten(1)
    )(values)
    rows = torch.cat([j.flatten(2) for j in jacobian.values()], 2)
    expected = rows @ torch.linalg.inv(precision) @ rows.mT
    torch.testing.assert_close(covariance[:, 4:6, 4:6], expected, rtol=1e-8, atol=1e-12)


def test_nested_outputs_and_those_of_transformers():
    utils = pytest.importorskip("transformers.utils")

    @dataclasses.dataclass
    class Output(utils.ModelOutput):
        logits: Tensor | None = None
        value: Tensor | None = None
        tokens: Tensor | None = None

    model, (x, y) = Model(lambda *heads: Output(**dict(zip(HEADS, heads, strict=True)))), data()
    expected = dense(model, x, y)
    optimizer = natgrad.ExactNGD(model, HEADS, lr=0.0, kl_clip=None)
    out = model(x)
    assert isinstance(out, Output) and out["logits"] is out.logits
    sum(losses(out, y).values()).backward()
    optimizer.step()
    assert_same(optimizer.preconditioner.curvature.matrix().to_dense(), expected)

    class Nested(Model):
        def forward(self, x):
            heads = self.heads(x)
            return {"policy": [heads["logits"], None], "rest": (heads["value"], heads["tokens"])}

    def flat(out):
        return dict(zip(HEADS, (out["policy"][0], *out["rest"]), strict=True))

    model = Nested()
    optimizer = natgrad.ExactNGD(model, HEADS, lr=0.0, kl_clip=None, output=flat)
    sum(losses(flat(model(x)), y).values()).backward()
    optimizer.step()
    assert_same(optimizer.preconditioner.curvature.matrix().to_dense(), expected)


def test_wrong_heads_are_named():
    model, (x, y) = Model(), data()
    with pytest.raises(ValueError, match="at least one output"):
        Heads({})
    for likelihood in ({"logit": "categorical"}, {0: "categorical"}):
        with pytest.raises(ValueError, match="no tensor under that key"):
            natgrad.fisher_matrix(model, (x, None), likelihood, "full")
    with pytest.raises(ValueError, match="mapping with keys"):
        natgrad.fisher_matrix(model, (x, y["logits"]), HEADS, "full")
    with pytest.raises(ValueError, match="Unknown likelihood 'cat'"):
        natgrad.KFAC(model, {"logits": "cat"})
    assert Heads({"a": "gaussian"}) == Heads({"a": Gaussian()})
    with pytest.raises(ValueError, match="one likelihood, not a mapping"):
        Heads({"a": {"b": "gaussian"}})
    optimizer = natgrad.KFAC(model, HEADS, output=lambda out: {**out, "value": out["value"][:, :1]})
    with pytest.raises(ValueError, match="'value' is computed from the model's output"):
        model(x)
    del optimizer


class OverTime(nn.Module):
    """Two heads of a recurrent network, ``(T, N, 3)`` and ``(T, N)``, or samples first."""

    def __init__(self, time_first: bool) -> None:
        super().__init__()
        self.rnn, self.pi, self.v = nn.GRU(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)
        self.time_first = time_first
        self.double()
        for index, p in enumerate(self.parameters()):
            p.data = normal(*p.shape, seed=index) / 2

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h, _ = self.rnn(x)
        heads = {"logits": self.pi(h), "value": self.v(h).squeeze(-1)}
        return heads if self.time_first else {k: v.transpose(0, 1) for k, v in heads.items()}


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("told", [True, False])
def test_samples_in_the_second_dimension_of_all_heads(fisher, told):
    """Whether that is told or found out: the steps are those of samples in the first."""
    x, found = normal(6, 7, 4), []
    y, v = torch.arange(42).view(6, 7) % 3, normal(6, 7, seed=2)
    for time_first in (True, False):
        model = OverTime(time_first)
        optimizer = natgrad.KFAC(
            model,
            {"logits": "categorical", "value": Gaussian(reduce_outputs="sum")},
            fisher=fisher,
            batch_dim=1 if told and time_first else None,
        )
        for _ in range(3):
            optimizer.zero_grad()
            out = model(x)
            out = out if time_first else {k: z.transpose(0, 1) for k, z in out.items()}
            loss = functional.cross_entropy(out["logits"].flatten(0, 1), y.flatten())
            (loss + (out["value"] - v).square().sum() / 14).backward()
            optimizer.step()
        found.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*found)


def test_the_matrix_of_heads_with_samples_in_the_second_dimension():
    x, heads = normal(6, 7, 4), {"logits": "categorical", "value": "gaussian"}
    turned = {"batch_dim": 1}
    data, same = [(x, None)], [(x, None)]
    found = natgrad.fisher_matrix(OverTime(True), data, heads, "full", **turned).to_dense()
    wanted = natgrad.fisher_matrix(OverTime(False), same, heads, "full").to_dense()
    torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match=r"batch_dim=2 is no dimension of .*\(6, 7\)"):
        natgrad.fisher_matrix(OverTime(True), data, heads, "full", batch_dim=2)

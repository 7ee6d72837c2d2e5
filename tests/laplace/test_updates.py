"""Further data, and what is saved: the posterior is that of all data at once."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from natgrad import Gaussian, Laplace, MonteCarloFisher, VariationalLaplace, fisher_matrix
from natgrad.curvature import STRUCTURES
from tests import dense
from tests.cases import CASES, normal
from tests.laplace.gaussians import data, network

NAMES = sorted(set(STRUCTURES) - {"singd"})
#: Those that look at rows in the eigenbases of the first data.
IN_BASES = ("ekfac", "tekfac")


def assert_same_posterior(found: Laplace, expected: Laplace, x: Any) -> None:
    assert found.count == expected.count
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-12)
    dense.assert_same(found.matrix.to_dense(), expected.matrix.to_dense(), 1e-9)
    for one, other in zip(found.functional_variance(x), expected.functional_variance(x),
                          strict=True):  # fmt: skip
        dense.assert_same(one, other, 1e-8)
    for delta in (0.3, 5.0):
        evidence = expected.log_marginal_likelihood(delta)
        assert found.log_marginal_likelihood(delta) == pytest.approx(evidence, rel=1e-9)


@pytest.mark.parametrize(
    "structure, parameters",
    [("kfac", "last_layer"), *((name, "all") for name in NAMES if name not in IN_BASES)],
)
def test_further_data_give_the_posterior_of_all(structure, parameters):
    model, (x, y), new = network(), data("categorical", 14), normal(3, 3, seed=5)
    batches = [(x[:6], y[:6]), (x[6:10], y[6:10]), (x[10:], y[10:])]
    options = {"structure": structure, "parameters": parameters, "prior_precision": 0.7}
    posterior = Laplace(model, None, **options)
    for batch in batches:
        posterior.update(batch)
        posterior.predict(new)  # What was factorised before must not be used again.
    assert_same_posterior(posterior, Laplace(model, batches, **options), new)
    if structure not in ("kpsvd", "kfoc"):  # Which sum products batch by batch.
        assert_same_posterior(posterior, Laplace(model, (x, y), **options), new)


@pytest.mark.parametrize("structure", IN_BASES)
def test_further_data_are_exact_in_the_eigenbases_of_the_first(structure):
    model, (x, y) = network(), data("categorical", 14)
    posterior = Laplace(model, (x[:6], y[:6]), structure=structure)
    first = dict(posterior.matrix.parts)
    posterior.update((x[6:], y[6:]))
    exact = fisher_matrix(model, (x, y), structure="block_diagonal")
    for name, part in posterior.matrix.parts.items():
        assert torch.equal(part.input_basis, first[name].input_basis)
        # Rows and columns of a block are the weight row by row, then the bias.
        index = part.layout.matrix(torch.arange(part.shape[0])).flatten()
        basis = torch.kron(part.output_basis[0].contiguous(), part.input_basis[0].contiguous())
        block = exact.parts[name].to_dense()[index][:, index]
        expected = basis @ torch.diag((basis.T @ block @ basis).diagonal()) @ basis.T
        dense.assert_same(part.to_dense()[index][:, index], expected)


def saved(posterior: Laplace) -> dict[str, Any]:
    """Return a state after a way through a file."""
    file = io.BytesIO()
    torch.save(posterior.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "structure, samples",
    [*((name, 4) for name in NAMES), *((n, 40) for n in ("full", "block_diagonal", "unit_wise"))],
)
def test_a_restored_posterior_is_the_one_saved_and_takes_further_data(structure, samples):
    """With fewer rows than parameters, and with more."""
    model, (x, y), new = network(), data("categorical", samples), normal(3, 3, seed=5)
    further = normal(5, 3, seed=6), torch.tensor([0, 1, 1, 0, 0])
    mean = {n: 0.1 * torch.ones_like(p) for n, p in model.named_parameters()}
    posterior = Laplace(model, (x, y), "categorical", structure, temperature=0.5, prior_mean=mean)
    posterior.prior_precision = {"0": 0.4, "2": 1.5}
    state = saved(posterior)
    restored = Laplace(model, None, "categorical", structure)
    restored.load_state_dict(state)
    assert restored.prior_precision == {"0": 0.4, "2": 1.5} and restored.temperature == 0.5
    assert restored.log_marginal_likelihood() == posterior.log_marginal_likelihood()
    assert_same_posterior(restored, posterior, new)
    for one in (posterior, restored):
        one.update(further)
    assert_same_posterior(restored, posterior, new)


def test_noise_found_by_the_evidence_is_saved_and_kept_with_further_data():
    model, (x, y) = network(), data("gaussian", 30)
    posterior = Laplace(model, (x[:20], y[:20]), Gaussian(0.5), "kfac")
    posterior.optimize_prior_precision(noise=True)
    variance = posterior.likelihood.variance
    restored = Laplace(model, None, Gaussian(0.5), "kfac")
    restored.load_state_dict(saved(posterior))
    assert restored.likelihood.variance == variance
    for one in (posterior, restored):
        one.update((x[20:], y[20:]))
    expected = Laplace(model, (x, y), Gaussian(variance), "kfac",
                       prior_precision=posterior.prior_precision)  # fmt: skip
    for one in (posterior, restored):
        assert_same_posterior(one, expected, x)


@pytest.mark.parametrize("name", ["embedding", "tied_embedding", "language_model", "layer_norm"])
@pytest.mark.parametrize("structure", ["full", "kfac"])
def test_rows_of_other_layers_are_saved_too(name, structure):
    case = CASES[name]()
    target = case.target("categorical")
    posterior = Laplace(case.model, (case.x, target), "categorical", structure, output=case.output)
    restored = Laplace(case.model, None, "categorical", structure, output=case.output)
    restored.load_state_dict(saved(posterior))
    assert_same_posterior(restored, posterior, case.x)


def test_sampled_labels_of_further_data_are_other_ones():
    """The same inputs again are two independent draws, not one counted twice."""
    model, (x, y) = network(), data("categorical")
    one = Laplace(model, (x, y), fisher=MonteCarloFisher(), structure="full")
    first = one.matrix.to_dense()
    one.update((x, y))
    assert not torch.allclose(one.matrix.to_dense(), first, rtol=1e-3)


def test_wrong_updates_and_states_leave_the_posterior_as_it_was():
    model, (x, y) = network(), data("categorical")
    empty = Laplace(model, None)
    calls = (empty.log_marginal_likelihood, empty.state_dict, lambda: empty.predict(x),
             lambda: empty.layers)  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="has seen no data"):
            call()
    with pytest.raises(ValueError, match="no target"):
        empty.update((x, torch.full((6,), -100)))
    wrong = Laplace(model, None, prior_precision={"3": 1.0})
    for _ in range(2):  # And not half fitted after the first.
        with pytest.raises(ValueError, match="one for each layer"):
            wrong.update((x, y))
    posterior = Laplace(model, (x, y), "categorical", "kfac")
    evidence, state = posterior.log_marginal_likelihood(), posterior.state_dict()
    for wrong, message in (
        ([(x, y), (x, None)], "targets"),
        ([], "no batches"),
        (iter([(x, y)]), "re-iterable"),
    ):
        with pytest.raises(ValueError, match=message):
            posterior.update(wrong)
        assert posterior.log_marginal_likelihood() == evidence
    with pytest.raises(ValueError, match="structure 'kfac'"):
        Laplace(model, None, structure="diagonal").load_state_dict(state)
    with pytest.raises(ValueError, match="the model has not"):
        Laplace(nn.Linear(3, 2).double(), None).load_state_dict(state)
    with pytest.raises(ValueError, match="parameters are not those"):
        Laplace(network(seed=1), None).load_state_dict(state)
    with torch.no_grad():
        model[0].bias += 1e-3
    with pytest.raises(ValueError, match="parameters are not those"):
        posterior.update((x, y))


@pytest.mark.parametrize("kind", ["laplace", "inducing points"])
def test_samples_are_those_of_the_trained_weights_and_predictions_want_them(kind):
    model, (x, y), generator = network(), data("categorical", 14), torch.Generator()
    posterior: Any = Laplace(model, (x, y), "categorical")
    if kind == "inducing points":
        posterior = VariationalLaplace(model, (x, y), "categorical", 5)
    trained = nn.utils.parameters_to_vector(model.parameters()).detach()
    samples = posterior.sample(3, generator.manual_seed(0))
    expected = posterior.functional_variance(x, joint=True)[1]
    for one in samples:  # As networks are drawn, one after the other.
        nn.utils.vector_to_parameters(one, model.parameters())
        dense.assert_same(posterior.sample(3, generator.manual_seed(0)), samples, 1e-15)
        for joint in (False, True):
            with pytest.raises(ValueError, match="not those that the posterior has seen"):
                posterior.functional_variance(x, joint=joint)
        with pytest.raises(ValueError, match="not those that the posterior has seen"):
            posterior.predict(x)
        if kind == "inducing points":
            for call in (posterior.elbo, lambda *batch: posterior.fit_predictive(batch, 1)):
                with pytest.raises(ValueError, match="not those that the posterior has seen"):
                    call(x, y)
    nn.utils.vector_to_parameters(trained, model.parameters())
    dense.assert_same(posterior.functional_variance(x, joint=True)[1], expected, 1e-15)


@pytest.mark.parametrize("joint", [False, True])
def test_a_sentence_for_what_cannot_be_asked(joint):
    model, (x, y) = network(), data("categorical", 14)
    posterior = Laplace(model, (x, y), "categorical")
    with pytest.raises(ValueError, match="at least (1|one)"):
        posterior.functional_variance(x[:0], joint=joint)
    for number in (0, 1.5, None):
        with pytest.raises(ValueError, match="number of samples must be an integer of at least 1"):
            posterior.sample(number)
    with pytest.raises(ValueError, match="number of samples must be an integer of at least 1"):
        posterior.predict(x, samples=1.5)
    for bounds in ((0.0, 1.0), (10.0, 1.0), (1.0, 1.0), (1.0, float("inf")), (float("nan"), 1.0)):
        for one in (posterior, VariationalLaplace(model, (x, y), "categorical", 3)):
            with pytest.raises(ValueError, match="from a lowest to a highest one"):
                one.optimize_prior_precision(*bounds)
    empty = Laplace(model, None, "categorical")
    with pytest.raises(ValueError, match="has seen no data"):
        empty.sample(1)
    with pytest.raises(ValueError, match="no state dict"):
        empty.load_state_dict({})


def test_a_prior_mean_is_finite():
    model, batch = network(), data("categorical")
    for wrong in (float("nan"), float("inf"), None, "none", torch.zeros(32)):
        with pytest.raises(ValueError, match="prior_mean must be a finite number"):
            Laplace(model, batch, prior_mean=wrong)
    mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="that of parameter '2.bias' is not"):
        Laplace(model, batch, prior_mean={**mean, "2.bias": torch.full((2,), float("nan"))})
    with pytest.raises(ValueError, match="for parameter '2.bias', got none"):
        Laplace(model, batch, prior_mean={**mean, "2.bias": 0.0})
    infinite = {"mask": torch.full((2,), -float("inf")), "_extra_state": None}  # As buffers are.
    found = Laplace(model, batch, prior_mean={**mean, **infinite}).log_marginal_likelihood()
    assert found == Laplace(model, batch).log_marginal_likelihood()


def test_the_predictive_fit_passes_over_batches_without_targets_that_count():
    model, (x, y) = network(), data("categorical", 14)
    nothing = [(x[:0], y[:0]), (x, torch.full_like(y, -100))]
    posterior = VariationalLaplace(model, (x, y), "categorical", 5)
    other = VariationalLaplace(model, (x, y), "categorical", 5)
    history = posterior.fit_predictive([*nothing, (x, y)], 4)
    assert history == other.fit_predictive((x, y), 2)
    dense.assert_same(posterior.predict(x), other.predict(x), 1e-15)

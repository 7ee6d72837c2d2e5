"""Hamiltonians against Kronecker products of Pauli matrices, and their ground states."""

from __future__ import annotations

import pytest
import torch

from natgrad.wave_functions import (
    Heisenberg,
    TransverseFieldIsing,
    all_configurations,
    chain,
    probabilities,
)
from natgrad.wave_functions.configurations import codes, distinct
from tests import dense
from tests.wave_functions import exact

SITES = 6
MATRICES = {
    "ising": (TransverseFieldIsing(SITES, 0.7, 1.3), exact.ising(SITES, 0.7, 1.3)),
    "heisenberg": (Heisenberg(SITES, 1.2), exact.heisenberg(SITES, 1.2)),
}


def test_configurations_are_in_the_order_of_binary_numbers():
    spins = all_configurations(5)
    assert spins.shape == (32, 5) and spins.dtype == torch.float64
    assert torch.equal(codes(spins), torch.arange(32))
    assert set(spins.flatten().tolist()) == {-1.0, 1.0}
    some = all_configurations(6, magnetization=2, dtype=torch.float32)
    assert some.shape == (15, 6) and bool((some.sum(1) == 2).all())


@pytest.mark.parametrize("sites", [5, 70])
def test_distinct_configurations_and_their_places(sites):
    torch.manual_seed(0)
    spins = torch.randint(0, 2, (100, sites)).double() * 2 - 1
    found, places = distinct(spins)
    assert torch.equal(found[places], spins)
    assert len(found) == len({tuple(row.tolist()) for row in spins})


@pytest.mark.parametrize("name", MATRICES)
def test_matrix_is_that_of_pauli_matrices(name):
    hamiltonian, matrix = MATRICES[name]
    assert matrix.imag.abs().max() == 0
    found = hamiltonian.matrix(all_configurations(SITES)).to_dense()
    dense.assert_same(found, matrix.real, 1e-14)


def test_a_sector_is_a_block_of_the_matrix():
    hamiltonian, matrix = MATRICES["heisenberg"]
    spins = all_configurations(SITES, magnetization=0)
    chosen = codes(spins)
    found = hamiltonian.matrix(spins).to_dense()
    dense.assert_same(found, matrix.real[chosen][:, chosen], 1e-14)
    with pytest.raises(ValueError, match="leads out"):
        MATRICES["ising"][0].matrix(spins)


def test_sign_rule_turns_one_sublattice():
    turn = exact.product(SITES, {site: exact.Z for site in range(0, SITES, 2)}).real
    expected = turn @ exact.heisenberg(SITES, 1.0).real @ turn
    found = Heisenberg(SITES, marshall=True).matrix(all_configurations(SITES)).to_dense()
    dense.assert_same(found, expected, 1e-14)
    assert bool((found - found.diagonal().diag() <= 0).all())
    _, vectors = torch.linalg.eigh(found)
    ground = vectors[:, 0] * vectors[:, 0].sum().sign()
    assert bool((ground > -1e-12).all())


def test_ising_ground_state_is_that_of_free_fermions():
    for field in (0.5, 1.0, 1.7):
        matrix = TransverseFieldIsing(8, field=field).matrix(all_configurations(8)).to_dense()
        lowest = float(torch.linalg.eigvalsh(matrix)[0])
        assert lowest == pytest.approx(exact.ising_energy(8, field), rel=1e-12)


@pytest.mark.parametrize("kind", exact.AMPLITUDES)
@pytest.mark.parametrize("name", MATRICES)
def test_local_energies(name, kind):
    hamiltonian, matrix = MATRICES[name]
    model, spins = exact.AMPLITUDES[kind](SITES), all_configurations(SITES)
    psi = torch.exp(model(spins).detach()).to(torch.complex128)
    expected = (matrix @ psi) / psi
    for chunk_size in (1024, 7):
        found = hamiltonian.local_energies(model, spins, chunk_size)
        assert found.is_complex() == (kind == "complex")
        dense.assert_same(found.to(torch.complex128).real, expected.real, 1e-13)
        if kind == "complex":
            dense.assert_same(found.imag, expected.imag, 1e-12)
    shaped = hamiltonian.local_energies(model, spins.view(8, 8, SITES))
    assert torch.equal(shaped.flatten(), hamiltonian.local_energies(model, spins))
    shares = exact.probabilities(model, spins)
    dense.assert_same(probabilities(model, spins), shares, 1e-13)
    mean = (shares * hamiltonian.local_energies(model, spins)).sum().real
    assert float(mean) == pytest.approx(exact.energy(model, spins, matrix).item(), rel=1e-12)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="24 for all"):
        all_configurations(25)
    with pytest.raises(ValueError, match="has the sum 1"):
        all_configurations(4, magnetization=1)
    with pytest.raises(ValueError, match="two different sites below 4"):
        TransverseFieldIsing(4, edges=[(0, 4)])
    with pytest.raises(ValueError, match="two sublattices"):
        Heisenberg(5, marshall=True)
    with pytest.raises(ValueError, match="at least 3"):
        chain(2)
    with pytest.raises(ValueError, match="6 sites"):
        MATRICES["ising"][0].local_energies(exact.RealAmplitude(5), all_configurations(5))
    assert chain(3, periodic=False) == [(0, 1), (1, 2)]

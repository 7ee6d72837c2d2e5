"""Sets of samples that part any two."""

import itertools
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natgrad.capture.samples import probe_samples


@given(st.integers(2, 300))
def test_of_any_two_samples_each_is_in_a_set_without_the_other(samples):
    sets = probe_samples(samples, elements=1, seed=0, limit=10**6)
    assert sets.shape[1] == samples
    member = sets.T.float()
    alone = member @ (1 - member.T)  # In how many sets the one is without the other.
    assert [pair for pair in (alone == 0).nonzero().tolist() if pair[0] != pair[1]] == []


@pytest.mark.parametrize("samples", [2, 3, 6, 7, 70, 71, 252, 253])
def test_no_fewer_sets_part_so_many_samples(samples):
    """Sperner's theorem: one set less has at most ``C(P, ⌊P/2⌋)`` choices, none part of another."""
    count = len(probe_samples(samples, elements=1, seed=0, limit=10**6))
    assert comb(count - 1, (count - 1) // 2) < samples <= comb(count, count // 2)


def test_halves_stand_for_them_where_they_would_be_too_dear():
    sets = probe_samples(70, elements=100, seed=0, limit=799)
    assert len(sets) == 4
    assert (sets[:2] == ~sets[2:]).all()
    assert len(probe_samples(70, elements=100, seed=0, limit=800)) == 8
    assert probe_samples(1, elements=100, seed=0, limit=0).tolist() == [[True]]


def test_the_sets_of_few_samples_are_those_of_each():
    members = [set(column.nonzero().flatten().tolist()) for column in probe_samples(3, 1, 0, 9).T]
    assert all(not (a & b) for a, b in itertools.combinations(members, 2))

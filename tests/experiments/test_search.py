import math

import pytest

from natgrad.experiments.learning_rates import BUDGET, best_learning_rate, search_learning_rate
from natgrad.experiments.results import Search


def bowl(best, ceiling=math.inf):
    """Loss (in log rate) with its minimum at 10^best; NaN above 10^ceiling."""
    return lambda rate: (
        math.nan if math.log10(rate) > ceiling + 1e-9 else (math.log10(rate) - best) ** 2
    )


@pytest.mark.parametrize("best", [-3.0, -2.3, -1.0, -0.6, 0.5, 1.0])
def test_minimum_inside_the_grid_is_found_to_a_quarter_of_a_decade(best):
    search = search_learning_rate(bowl(best), (-3, 1), Search(5))
    assert abs(math.log10(best_learning_rate(search)) - best) <= 0.25 + 1e-9
    assert len(search.trials) <= BUDGET
    assert search.steps == 5


@pytest.mark.parametrize("best", [-5.0, 3.0])
def test_minimum_outside_the_grid_is_found(best):
    search = search_learning_rate(bowl(best), (-3, 1), Search(5))
    assert abs(math.log10(best_learning_rate(search)) - best) <= 0.5


def test_search_creeps_up_to_the_edge_of_divergence():
    search = search_learning_rate(bowl(9.0, ceiling=-0.75), (-3, 1), Search(5))
    assert best_learning_rate(search) == pytest.approx(10**-0.75)


def test_search_goes_down_while_everything_diverges():
    search = search_learning_rate(bowl(9.0, ceiling=-6), (-3, 1), Search(5))
    assert best_learning_rate(search) <= 1e-6
    assert (
        best_learning_rate(search_learning_rate(lambda rate: math.nan, (-3, 1), Search(5))) is None
    )


def test_trials_are_distinct_and_in_order():
    rates = [
        trial.learning_rate for trial in search_learning_rate(bowl(0.0), (-3, 1), Search(5)).trials
    ]
    assert rates == sorted(set(rates))


def test_known_trials_are_not_run_again_and_lead_to_the_same_end():
    whole = search_learning_rate(bowl(-1.3), (-3, 1), Search(5))
    calls = []

    def counting(rate):
        calls.append(rate)
        return bowl(-1.3)(rate)

    begun = Search(5, list(whole.trials[1:4]))
    assert search_learning_rate(counting, (-3, 1), begun) is begun
    assert begun == whole
    assert len(calls) == len(whole.trials) - 3

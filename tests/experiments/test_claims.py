"""`natgrad claims`: the registry, the rules, the runner and the page."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from natgrad.cli import run
from natgrad.experiments.claims.claim import (
    CANNOT,
    Claim,
    Expect,
    Setting,
    Source,
    mean_and_error,
)
from natgrad.experiments.claims.page import as_values, print_claims, render_page
from natgrad.experiments.claims.registry import SOURCES, choose
from natgrad.experiments.claims.run import read_result, result_path, run_claims
from natgrad.experiments.claims.translation import TEXTS
from natgrad.experiments.config import ConfigError
from natgrad.experiments.data import DATASETS

DOCS = Path(__file__).parents[2] / "docs"
CLAIMS = choose()
RULES = [pytest.param(claim, e, id=f"{claim.name}: {e.figure}")
         for claim in CLAIMS for e in claim.expects]  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_a_claim_says_all_that_a_reader_needs(claim: Claim):
    source, _, name = claim.name.partition(".")
    assert source in {s.name for s in SOURCES} and name
    assert claim.says.endswith(".") and claim.about and claim.where
    known = {*DATASETS, *TEXTS}
    assert claim.data in known and claim.published_data in known
    assert claim.expects
    figures = [expect.figure for expect in claim.expects]
    # A more general beginning must come after a more special one, or it would hide it.
    for index, figure in enumerate(figures):
        assert not any(figure.startswith(earlier) for earlier in figures[:index]), figure


def test_names_of_claims_are_unique():
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)


def inside(expect: Expect) -> float:
    if expect.at_least == -math.inf:
        return expect.at_most
    return expect.at_least if expect.at_most == math.inf else (expect.at_least + expect.at_most) / 2


def outside(expect: Expect) -> float:
    bound = expect.at_most if expect.at_most < math.inf else expect.at_least
    return bound + (1 + abs(bound)) * (1 if expect.at_most < math.inf else -1)


@pytest.mark.parametrize(("claim", "expect"), RULES)
def test_every_rule_can_come_out_either_way(claim: Claim, expect: Expect):
    good = {e.figure: inside(e) for e in claim.expects}
    assert claim.verdict(good) == "reproduced"
    assert claim.verdict({**good, expect.figure: outside(expect)}) == "refuted"
    assert claim.verdict({**good, expect.figure: math.nan}) == CANNOT
    around = [inside(expect), outside(expect)]  # two draws that far apart tell nothing
    assert claim.verdict({**good, expect.figure: around}) == CANNOT
    del good[expect.figure]
    assert claim.verdict(good) == CANNOT


def test_draws_must_clear_a_bound_by_two_standard_errors():
    expect = Expect("x", at_most=1.0)
    draws = [0.8, 0.9, 1.0]  # mean 0.9, standard error 0.1/√3
    mean, error = mean_and_error(draws)
    assert (mean, error) == pytest.approx((0.9, 2 * 0.1 / math.sqrt(3)), abs=1e-12)
    assert expect.judge(draws) == CANNOT
    assert expect.judge([0.85, 0.9, 0.95]) == "reproduced"
    assert expect.judge([1.15, 1.2, 1.25]) == "refuted"
    assert expect.judge([math.inf, 0.5]) == "refuted"
    assert expect.judge([math.nan, 0.5]) == CANNOT
    assert Expect("x", at_least=2.0).judge(math.inf) == "reproduced"


def test_a_figure_belongs_to_the_first_expectation_that_fits():
    claim = dataclasses.replace(
        CLAIMS[0], expects=(Expect("loss, A", at_least=1.0), Expect("loss, ", at_most=0.5))
    )
    assert claim.verdict({"loss, A": 2.0, "loss, B": 0.1, "time": 9.0}) == "reproduced"
    assert claim.verdict({"loss, A": 0.1, "loss, B": 0.1}) == "refuted"
    assert claim.expectation("time") is None


class Counting:
    """A source with two claims that count how often their parts are measured."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.stop_at = ""
        self.reason: BaseException = KeyboardInterrupt()
        self.source = Source("made-up", "Made up")
        for name in ("first", "second"):
            self.add(name)

    def add(self, name: str) -> None:
        @self.source.claim(name, "here")
        def measure(setting):
            """The parts.

            Says: It holds.
            Rule:
                x ≤ 2
            """

            def part(label):
                def compute():
                    self.calls.append(f"{name}.{label}")
                    if self.stop_at == f"{name}.{label}":
                        raise self.reason
                    return 1.0

                return compute

            values = [setting.part(label, part(label)) for label in ("a", "b")]
            return {"x": values, "diverged": math.inf}


def test_results_are_kept_and_an_interrupted_run_goes_on(tmp_path):
    made = Counting()
    claims = made.source.claims
    made.stop_at = "second.b"
    results, interrupted = run_claims(claims, tmp_path)
    assert interrupted and [r.claim for r in results] == ["made-up.first"]
    assert made.calls == ["first.a", "first.b", "second.a", "second.b"]

    made.calls, made.stop_at = [], ""
    results, interrupted = run_claims(claims, tmp_path)
    assert not interrupted and made.calls == ["second.b"]
    assert [r.verdict(c) for r, c in zip(results, claims, strict=True)] == ["reproduced"] * 2
    kept = read_result(result_path(tmp_path, claims[1], full=False))
    assert kept is not None and kept.figures == {"x": [1.0, 1.0], "diverged": math.inf}
    assert kept.parts == {}

    made.calls = []
    run_claims(claims, tmp_path)
    assert made.calls == []
    run_claims(claims[:1], tmp_path, again=True)
    assert made.calls == ["first.a", "first.b"]
    made.calls = []
    run_claims(claims[:1], tmp_path, Setting(full=True))  # a result of its own
    assert made.calls == ["first.a", "first.b"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "made-up.first.json", "made-up.first.full.json", "made-up.second.json"
    }  # fmt: skip


def test_a_measurement_that_fails_cannot_be_told_and_does_not_stop_the_others(tmp_path, capsys):
    made = Counting()
    claims = made.source.claims
    made.stop_at, made.reason = "first.b", RuntimeError("the matrix is singular\nsomewhere")
    results, interrupted = run_claims(claims, tmp_path)
    assert not interrupted
    assert [r.verdict(c) for r, c in zip(results, claims, strict=True)] == [CANNOT, "reproduced"]
    assert results[0].error == "the matrix is singular"
    assert read_result(result_path(tmp_path, claims[0], full=False)) == results[0]
    page = render_page([made.source], tmp_path)
    assert "| [made-up.first](#made-upfirst) | cannot be told | – |" in page
    assert "at the size for one core: the measurement failed, the matrix is singular" in page
    print_claims(Console(width=120), list(zip(claims, results, strict=True)))
    assert "made-up.first failed: the matrix is singular" in capsys.readouterr().out
    assert as_values(claims[0], results[0])["verdict"] == CANNOT

    made.calls, made.stop_at = [], ""
    results, _ = run_claims(claims, tmp_path)
    assert made.calls == ["first.b"]
    assert [r.verdict(c) for r, c in zip(results, claims, strict=True)] == ["reproduced"] * 2


def test_the_page_shows_verdicts_figures_and_what_is_not_measured(tmp_path):
    made = Counting()
    run_claims(made.source.claims[:1], tmp_path)
    page = render_page([made.source], tmp_path)
    assert "| [made-up.first](#made-upfirst) | reproduced | – |" in page
    assert "| [made-up.second](#made-upsecond) | – | – |" in page
    assert "| x | 1 ± 0 (2) | ≤ 2 | reproduced |" in page
    assert "| diverged | ∞ |  |  |" in page
    assert "`natgrad claims made-up.first`; digits, seed 0" in page
    assert page.count("Not measured yet") == 1


def test_unreadable_results_are_refused(tmp_path):
    result_path(tmp_path, CLAIMS[0], full=False).write_text("{}")
    with pytest.raises(ConfigError, match=r"does not hold a result.*remove it"):
        run_claims(CLAIMS[:1], tmp_path)


def test_unknown_names_are_refused_with_those_that_are_close(capsys):
    assert run(["claims", "karakida-osawa.alfa", "--list"]) == 2
    assert "did you mean karakida-osawa.alpha" in capsys.readouterr().err


def test_a_claim_is_measured_listed_and_written_to_the_page(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("NATGRAD_DATA", raising=False)
    output = tmp_path / "claims"
    name = "karakida-osawa.alpha"
    assert run(["claims", name, "--json", f"--output={output}"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [found["name"] for found in printed] == [name]
    assert printed[0]["verdict"] == "reproduced"
    assert printed[0]["result"]["figures"]["α measured / theory, Exact NGD, L = 3"] == (
        pytest.approx(1.0, abs=1e-6)
    )
    assert output.with_suffix(".md").read_text() == render_page(SOURCES, output)
    assert run(["claims", "--list", f"--output={output}"]) == 0
    listed = capsys.readouterr().out
    assert all(claim.name in listed for claim in CLAIMS) and "reproduced" in listed


def test_the_documented_page_is_the_one_the_command_writes():
    assert (DOCS / "claims.md").read_text() == render_page(SOURCES, DOCS / "claims")

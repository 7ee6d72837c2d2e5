"""`natgrad theory`, end to end on small networks."""

from __future__ import annotations

import itertools
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from natgrad import ntk
from natgrad.cli import run
from natgrad.experiments import pages
from natgrad.experiments.config import ConfigError
from natgrad.experiments.formats import DataError
from natgrad.experiments.theory import run as runner
from natgrad.experiments.theory.config import SECTIONS, TheoryConfig
from natgrad.experiments.theory.problem import Problem
from natgrad.experiments.theory.report import format_number
from natgrad.experiments.theory.results import ByWidth
from natgrad.experiments.theory.run import run_theory
from tests.experiments.schema import check

SMALL = ("--width=64", "--train-samples=12", "--test-samples=10")


@pytest.fixture(scope="module", autouse=True)
def _few_draws():
    """The sections at a size that takes less time."""
    sizes = {
        "dynamics.FACTORS": (1.0, 2.5), "dynamics.STEPS": 4, "width.DRAWS": 1,
        "width.KERNEL_DRAWS": 2, "width.GD_STEPS": 4, "width.NGD_STEPS": 2, "isotropy.DRAWS": 1,
        "conditions.STEPS": 3,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, size in sizes.items():
            patch.setattr(f"natgrad.experiments.theory.{name}", size)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theory") / "out"
    with pytest.MonkeyPatch.context() as patch:  # Few are drawn: each takes half a second.
        draw, drawn = pages.save_figure, itertools.count()
        patch.setattr(
            pages,
            "save_figure",
            lambda f, kind: (
                draw(f, kind) if kind == "svg" and next(drawn) % 4 == 0 else b"<svg></svg>"
            ),
        )
        assert run(["theory", *SMALL, f"--output={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def stored(folder):
    return json.loads((folder / "results.json").read_text())


def section(stored, name):
    return next(s for s in stored["sections"] if s["name"] == name)


def lines(stored, name, plot, panel=0):
    found = next(p for p in section(stored, name)["plots"] if p["name"] == plot)
    return found["panels"][panel]["lines"]


def test_results_follow_their_schema(stored):
    check(stored, document="theory-schema.md")
    assert [s["name"] for s in stored["sections"]] == list(SECTIONS)
    for part in stored["sections"]:
        assert part["status"] == "completed", part["findings"]
        assert part["findings"] and part["plots"] and part["tables"]


def test_every_plot_is_written_and_shown(folder, stored):
    names = {plot["name"] for part in stored["sections"] for plot in part["plots"]}
    expected = {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    assert {path.name for path in folder.iterdir()} == expected | {"report.html", "results.json"}
    page = (folder / "report.html").read_text()
    assert page.count("<svg ") == len(names)

    class Links(HTMLParser):
        def handle_starttag(self, tag, attributes):
            for key, value in attributes:
                if key in ("src", "href") and not (value or "").startswith("#"):
                    raise AssertionError(f"the page loads {value}")

    Links().feed(page)
    for part in stored["sections"]:
        assert part["title"] in page


def test_dynamics_are_predicted(stored):
    """Lines and markers agree early on, and every natural gradient ends far below the start."""
    curves = lines(stored, "dynamics", "dynamics")
    predicted = {line["method"]: line["y"] for line in curves if line["style"] == "line"}
    trained = {line["method"]: line["y"] for line in curves if line["style"] == "markers"}
    assert set(predicted) == set(trained) == {
        "gd", "full", "block_diagonal", "block_tridiagonal", "kfac", "unit_wise",
    }  # fmt: skip
    for name, losses in predicted.items():
        assert losses[0] == pytest.approx(trained[name][0], rel=1e-9)
        if name not in ("gd", "unit_wise"):
            assert losses[1] < 1e-14
    # The tangent kernel of one network is off by O(1/√M), here M = 64.
    assert trained["gd"][1] == pytest.approx(predicted["gd"][1], rel=4 / 64**0.5)
    for name in ("full", "block_diagonal"):
        assert trained[name][4] < 1e-3 * trained[name][0]


def test_diagonal_is_not_isotropic_and_layer_wise_structures_are(stored):
    curves = {line["method"]: line["y"] for line in lines(stored, "isotropy", "isotropy-width")}
    assert min(curves["diagonal"]) > 0.3
    for name in ("full", "block_diagonal", "block_tridiagonal"):
        assert curves[name][-1] <= 1e-4  # at smaller widths a layer may lack rank
    rows = {row[0]: row for row in section(stored, "isotropy")["tables"][0]["rows"]}
    assert rows["Block-diagonal"][1] == 3 and rows["Block-diagonal"][2] == pytest.approx(3)


def test_no_method_fits_beyond_twice_the_isotropic_rate(stored):
    plot = next(p for p in section(stored, "dynamics")["plots"] if p["name"] == "learning-rates")
    for panel in plot["panels"]:
        beyond = [line for line in panel["lines"] if line["method"] == "rate 2.5"]
        predicted = next(line["y"] for line in beyond if line["style"] == "line")
        assert predicted[-1] > predicted[-3]


def test_depth_three_s_plus_two_leaves_the_tridiagonal_matrix_out():
    config = TheoryConfig(("dynamics", "isotropy"), depth=5, width=16, train_samples=6)
    dynamics, isotropy = run_theory(config).sections
    assert "block_tridiagonal" not in {line.method for line in dynamics.plots[0].panels[0].lines}
    assert any("3s + 2" in finding for finding in dynamics.findings)
    assert "Block-tridiagonal" not in {row[0] for row in isotropy.tables[0].rows}


def test_several_classes_and_other_activations():
    config = TheoryConfig(
        classes=(3, 5, 8), activation="tanh", width=16, train_samples=6, test_samples=6
    )
    results = run_theory(config)
    assert results.data["outputs"] == 3
    for part in results.sections:
        assert part.status == "completed", part.findings


def test_more_samples_than_dimensions_are_spread_evenly():
    """K-FAC's first layer then counts M_0, as the Forster transform promises."""
    problem = Problem.load(TheoryConfig(train_samples=100, width=128))
    assert "Forster" in problem.notes[0]
    samples, dim = problem.x.shape
    assert dim < samples == 100
    second = problem.x.T @ problem.x * dim / samples
    assert float((second - torch.eye(dim)).norm()) < 1e-2 * dim**0.5
    torch.testing.assert_close(problem.x_test.norm(dim=1), torch.ones(len(problem.x_test)).double())
    found = ntk.isotropy(problem.network(), problem.x, "kfac", 1e-16)
    assert found.layers[0].alpha == pytest.approx(dim, rel=1e-2)
    assert found.layers[0].deviation < 0.05


def test_forster_transform_refuses_what_it_cannot_spread():
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)).double()
    spread, test = ntk.forster_transform(x, x)
    torch.testing.assert_close(spread, test)
    assert float((spread.T @ spread - 2.5 * torch.eye(4)).norm()) < 2.5 * 2 * 1e-3
    with pytest.raises(ValueError, match="more samples than dimensions"):
        ntk.forster_transform(x[:4])
    with pytest.raises(ValueError, match="principal components"):
        ntk.forster_transform(x * torch.tensor([1.0, 1.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="zero"):
        ntk.forster_transform(x * (torch.arange(10) > 0).unsqueeze(1))
    crowded = torch.cat([x[:9] * torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.eye(4).double()])
    with pytest.raises(ValueError, match="subspace"):
        ntk.forster_transform(crowded)


def test_equal_images_are_refused(tmp_path):
    images = np.random.default_rng(0).normal(size=(20, 28, 28))
    images[4] = images[2]
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", images=images, labels=np.arange(20) % 2)
    config = TheoryConfig(data="mnist", data_dir=tmp_path, train_samples=20)
    with pytest.raises(DataError, match="same image"):
        run_theory(config)


@pytest.mark.usefixtures("undrawn")
def test_interruption_keeps_what_is_there(tmp_path, monkeypatch):
    def stop(setting, progress):
        raise KeyboardInterrupt

    monkeypatch.setitem(runner._SECTIONS, "isotropy", stop)
    options = ["theory", "spectrum", "isotropy", "width", *SMALL, f"--output={tmp_path / 'out'}"]
    assert run(options) == 130
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    check(stored, document="theory-schema.md")
    assert stored["interrupted"] is True
    assert [s["status"] for s in stored["sections"]] == ["completed", "interrupted"]


def test_a_section_that_fails_says_why(monkeypatch):
    def fail(setting, progress):
        raise ValueError("the theory does not go that far")

    monkeypatch.setitem(runner._SECTIONS, "spectrum", fail)
    results = run_theory(TheoryConfig(("spectrum",), width=16, train_samples=4))
    assert results.sections[0].status == "failed"
    assert results.sections[0].findings == ["the theory does not go that far"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["rotation"], "Unknown section 'rotation'"),
        (["width", "width"], "only once"),
        (["--data=imagenet"], "Unknown data set"),
        (["--data=mnist"], "--data-dir"),
        (["--classes=0"], "at least two classes"),
        (["--classes=0,ten"], "separated by commas"),
        (["--classes=0,11"], "0 to 9"),
        (["--width=0"], "width must be at least 1"),
        (["--depth=1"], "at least 2 weight layers"),
        (["--activation=step"], "Unknown activation"),
        (["--train-samples=1"], "per class"),
        (["--device=abacus"], "not available"),
        (["--output=/dev/null"], "is a file"),
    ],
)
def test_wrong_input_ends_with_one_sentence(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.delenv("NATGRAD_DATA", raising=False)
    assert run(["theory", f"--output={tmp_path / 'out'}", *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_diverging_runs_end_early():
    problem = Problem.load(TheoryConfig(width=32, train_samples=6))
    run_ = problem.train(problem.network(), "gd", 1e6, 10)
    assert len(run_.train_loss) == 11 and math.isnan(run_.train_loss[-1])


def test_exponents_and_numbers():
    assert ByWidth({2: [1.0, 1.0], 4: [0.5], 8: [0.25]}).exponent() == pytest.approx(-1)
    assert math.isnan(ByWidth({2: [1.0]}).exponent())
    assert ByWidth({2: [1.0, 3.0], 4: [0.5, 6.0]}).exponents() == pytest.approx([-1, 1])
    assert [format_number(v) for v in (None, math.nan, 0, 12345, 1.5, 2e-7)] == [
        "–", "–", "0", "12,345", "1.5", "2.0e-07",
    ]  # fmt: skip
    with pytest.raises(ConfigError):
        TheoryConfig(sections=())

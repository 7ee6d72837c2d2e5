import copy
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from natgrad.experiments import pages, report
from natgrad.experiments.compare import compare
from natgrad.experiments.config import CompareConfig, ConfigError
from natgrad.experiments.report import PLOTS
from natgrad.experiments.results import Repeat
from tests.experiments.schema import check

TINY = CompareConfig(
    methods=("sgd", "adamw"),
    train_samples=30,
    test_samples=20,
    width=8,
    first_order_steps=6,
    search_steps=2,
)


@pytest.fixture(scope="module")
def results():
    return compare(TINY, command="natgrad compare --width 8")


@pytest.fixture(scope="module")
def folder(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "nested" / "folder"
    report.write_report(results, folder)
    return folder


def test_every_file_is_written(folder):
    expected = {"results.json", "report.html"}
    expected |= {f"{plot.name}.{kind}" for plot in PLOTS for kind in ("svg", "png")}
    assert {path.name for path in folder.iterdir()} == expected
    for plot in PLOTS:
        assert (folder / f"{plot.name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        ElementTree.parse(folder / f"{plot.name}.svg")


def test_json_is_as_documented(folder):
    stored = json.loads((folder / "results.json").read_text())
    check(stored)
    assert stored["schema_version"] == 1
    assert [method["name"] for method in stored["methods"]] == ["sgd", "adamw"]
    assert stored["methods"][0]["train"]["step"] == list(range(7))
    assert stored["data"]["train_samples"] == 30


def test_numbers_that_are_not_finite_become_null(results):
    results = compare(
        CompareConfig(
            methods=("sgd",),
            learning_rates={"sgd": 1e12},
            train_samples=20,
            test_samples=10,
            width=4,
            first_order_steps=20,
        )
    )
    stored = json.loads(results.to_json(), parse_constant=lambda name: pytest.fail(name))
    check(stored)
    assert stored["methods"][0]["status"] == "diverged"
    assert stored["methods"][0]["steps_to_target"] is not None or stored["target"]["loss"] is None


class Loads(HTMLParser):
    """Collects every address that a page would load or link to."""

    def __init__(self):
        super().__init__()
        self.addresses, self.identifiers, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for key, value in attributes:
            if key in ("src", "href", "xlink:href", "data", "action", "poster"):
                self.addresses.append(value)
            if key == "id":
                self.identifiers.append(value)


def test_report_is_self_contained(folder):
    page = (folder / "report.html").read_text()
    loads = Loads()
    loads.feed(page)
    assert all(address.startswith("#") for address in loads.addresses)
    assert loads.addresses, "the plots refer to their own markers"
    assert {address[1:] for address in loads.addresses} <= set(loads.identifiers)
    assert len(set(loads.identifiers)) == len(loads.identifiers)
    assert not {"script", "link", "iframe", "img", "object"} & set(loads.tags)
    assert loads.tags.count("svg") == len(PLOTS)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)


def test_report_shows_what_was_run(folder, results):
    page = (folder / "report.html").read_text()
    text = re.sub(r"<[^>]+>", " ", page)
    for fact in ("SGD", "AdamW", "natgrad compare --width 8", "scikit-learn digits"):
        assert fact in text
    for method in results.methods:
        assert pages.format_rate(method.learning_rate) in text
        assert pages.format_loss(method.train.loss[-1]) in text
    assert results.environment["torch"] in text


def test_text_from_outside_is_escaped(results):
    plots = {plot.name: "<svg></svg>" for plot in PLOTS}
    page = report.render_html(
        type(results)(**{**results.__dict__, "command": "natgrad <script>alert(1)</script>"}), plots
    )
    assert "<script>" not in page


@pytest.mark.usefixtures("undrawn")
def test_a_failure_while_rendering_leaves_the_folder_as_it_was(results, tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("old")

    def fail(*args):
        raise RuntimeError("no ink")

    monkeypatch.setattr(report, "render_html", fail)
    with pytest.raises(RuntimeError, match="no ink"):
        report.write_report(results, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "old"


def test_a_failure_while_writing_leaves_no_temporary_file(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(pages.os, "replace", fail)
    with pytest.raises(ConfigError, match="file cannot be written: disk full"):
        pages.write_whole(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        pages.check_output(tmp_path / "file")
    with pytest.raises(ValueError, match="cannot be written"):
        pages.check_output(tmp_path / "file" / "below")
    pages.check_output(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (12.0, "12"),
        (1e-5, "1.00e-05"),
        (0.0, "0"),
        (math.nan, "–"),
        (None, "–"),
    ],
)
def test_losses_are_formatted(value, text):
    assert pages.format_loss(value) == text


def test_quantities_over_seeds_say_how_many_runs_have_them(results):
    (result, *_) = copy.deepcopy(results.methods)
    result.steps_to_target, result.seconds = 7, 1.0
    assert report.over_seeds(result, "steps_to_target") == "7"
    result.repeats = [
        Repeat(seed=1, seconds=3.0, steps_to_target=None, status="diverged"),
        Repeat(seed=2, seconds=4.0, steps_to_target=9, status="completed"),
    ]
    assert report.over_seeds(result, "seconds", "{:.1f}".format) == "3.0 (1.0 to 4.0)"
    assert report.over_seeds(result, "seconds", "{:.1f}".format, ranges=False) == "3.0"
    assert report.over_seeds(result, "steps_to_target") == "8 (7 to 9) in 2 of 3"
    assert report.over_seeds(result, "steps_to_target", ranges=False) == "8 in 2 of 3"
    assert report.outcome(result) == "2 completed, 1 diverged"
    assert report.over_seeds(result, "milliseconds_per_step", lambda value: "some") == (
        "some in 1 of 3"
    )

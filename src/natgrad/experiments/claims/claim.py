"""A claim of a source: what it says, how it is measured, and the rule that decides.

The rule is stated before anything is measured: bounds on named figures, each with its reason. A
claim may be refuted as well as reproduced; draws that do not tell a figure from its bound decide
nothing.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from natgrad.experiments.config import find_device
from natgrad.experiments.data import Dataset, load_dataset
from natgrad.experiments.theory.config import TheoryConfig
from natgrad.experiments.theory.problem import Problem

Verdict = Literal["reproduced", "refuted", "cannot be told"]
CANNOT: Verdict = "cannot be told"

Draws = float | list[float]
Figures = dict[str, Draws]
"""Measured numbers by name: one number, or one for each draw of what is random."""

Measure = Callable[["Setting"], Figures | Iterator[Mapping[str, float]]]
"""Measures a claim: returns its figures, or yields those of one draw after the other."""

Item = TypeVar("Item")
Value = TypeVar("Value", float, list[float], dict[str, float], dict[str, list[float]])

#: Standard errors by which the mean of several draws must clear a bound.
ERRORS = 2.0


@dataclass(frozen=True)
class Expect:
    """What a claim says of a figure, and why the bounds are where they are.

    The figure is a name, or the beginning of several, which all must comply. One that fits several
    expectations of a claim belongs to the first.
    """

    figure: str
    at_least: float = -math.inf
    at_most: float = math.inf
    because: str = ""

    @classmethod
    def read(cls, rule: str) -> tuple[Expect, ...]:
        """Return what a rule expects: a line each as the page has it, ``figure ≤ 1 (because)``.

        Bounds are ``≤ 1``, ``≥ 1`` or ``1 to 2``; lines that are indented go on with the last.
        """
        lines = re.sub(r"\n +", " ", textwrap.dedent(rule).strip("\n")).splitlines()
        return tuple(map(cls._line, lines))

    @classmethod
    def _line(cls, line: str) -> Expect:
        number = r"(-?[\d.e-]+)"
        bounds = rf"(?:≤ {number}|≥ {number}|{number} to {number})"
        found = re.fullmatch(rf"(.+?) {bounds}(?: \((.*)\))?", line)
        assert found is not None, line
        figure, most, least, low, high, because = found.groups()
        at_least, at_most = float(least or low or -math.inf), float(most or high or math.inf)
        return cls(figure, at_least, at_most, because or "")

    def judge(self, draws: Draws) -> Verdict:
        """Judge one figure: its mean must clear the bounds by two standard errors, if it has any.

        An infinite figure, of a run that diverged, is beyond every bound; NaN decides nothing.
        """
        mean, error = mean_and_error(draws)
        if math.isnan(mean):
            return CANNOT
        if self.at_least <= mean - error and mean + error <= self.at_most:
            return "reproduced"
        if mean + error < self.at_least or mean - error > self.at_most:
            return "refuted"
        return CANNOT

    def __str__(self) -> str:
        """Return the bounds as text."""
        if self.at_least == -math.inf:
            return f"≤ {self.at_most:g}"
        if self.at_most == math.inf:
            return f"≥ {self.at_least:g}"
        return f"{self.at_least:g} to {self.at_most:g}"


def mean_and_error(draws: Draws) -> tuple[float, float]:
    """Return the mean of some draws and two standard errors of it; 0 for one draw."""
    values = draws if isinstance(draws, list) else [draws]
    mean = statistics.fmean(values) if values else math.nan
    if len(values) < 2 or not math.isfinite(mean):
        return mean, 0.0
    return mean, ERRORS * statistics.stdev(values) / math.sqrt(len(values))


def ratios(numbers: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return the ratios of the numbers of draws that belong together; NaN for ∞/∞."""
    return [a / b for a, b in zip(numbers, others, strict=True)]


def differences(numbers: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return the differences of the numbers of draws that belong together."""
    return [a - b for a, b in zip(numbers, others, strict=True)]


def draw_by_draw(draws: Iterable[Mapping[str, float]]) -> Figures:
    """Return the figures of several draws, all those of a name in one list."""
    figures: dict[str, list[float]] = {}
    for draw in draws:
        for name, value in draw.items():
            figures.setdefault(name, []).append(value)
    return dict(figures)


@functools.cache
def _problem(config: TheoryConfig) -> Problem:
    return Problem.load(config)


@dataclass(unsafe_hash=True)
class Setting:
    """What a measurement runs with; equal to another apart from what either has found.

    `full` says whether it is at the published size instead of one for two cores, `parts` what
    finished parts of it found, by name. `store` is called after every one that finishes, `progress`
    told the share that is done.
    """

    full: bool = False
    seed: int = 0
    data: str = "digits"
    data_dir: Path | None = None
    device: str = "auto"
    parts: dict[str, Any] = field(default_factory=dict, compare=False)
    store: Callable[[], None] = field(default=lambda: None, compare=False)
    progress: Callable[[float], None] = field(default=lambda share: None, compare=False)

    def of(self, small: Item, published: Item) -> Item:
        """Return the first at the small size, the second at the published one."""
        return published if self.full else small

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield some items, and tell the share that is done after each."""
        known = list(items)
        for done, item in enumerate(known, start=1):
            yield item
            self.progress(done / len(known))

    def seed_of(self, draw: int) -> int:
        """Return the seed of a draw of what is random."""
        return 1000 * self.seed + draw

    def torch_device(self) -> torch.device:
        """Return the device."""
        return find_device(self.device)

    def dataset(self, train_samples: int | None = None, **options: Any) -> Dataset:
        """Load the data set on the device; see `load_dataset`."""
        options |= {"train_samples": train_samples, "seed": self.seed}
        return load_dataset(self.data, self.data_dir, **options).to(self.torch_device())

    def problem(self, samples: int, width: int, depth: int = 3) -> Problem:
        """Return two classes of images with targets ±½, and networks in NTK parameterisation."""
        own = {name: getattr(self, name) for name in ("data", "data_dir", "seed", "device")}
        return _problem(TheoryConfig(train_samples=samples, width=width, depth=depth, **own))

    def part(self, name: str, compute: Callable[[], Value]) -> Value:
        """Return what a part of the measurement finds, computed once and kept if interrupted.

        It is a number, a list of numbers, or a dict of such, under a name of its own in the claim.
        """
        if name not in self.parts:
            self.parts[name] = compute()
            self.store()
        found: Value = self.parts[name]
        return found


@dataclass(frozen=True)
class Claim:
    """One claim, ``source.claim``: what is said where in the source, and what is measured.

    `expects` are the rule: reproduced if all bounds hold, refuted if one is broken. `data` is the
    data set at the small size, the digits where no folder of data is known.
    """

    name: str
    where: str
    says: str
    expects: tuple[Expect, ...]
    measure: Callable[[Setting], Figures]
    about: str
    remark: str = ""
    data: str = "digits"
    published_data: str = "mnist"

    def data_for(self, full: bool, data_dir: Path | None) -> str:
        """Return the name of the data set to use."""
        if full:
            return self.published_data
        return self.data if data_dir is not None else "digits"

    def expectation(self, figure: str) -> Expect | None:
        """Return what the claim says of a figure; None if it is there for information."""
        return next((e for e in self.expects if figure.startswith(e.figure)), None)

    def verdict(self, figures: Mapping[str, Draws]) -> Verdict:
        """Return the verdict on measured figures.

        Refuted if one bound is broken, reproduced only if all hold; a bound without a figure
        decides nothing.
        """
        judged = {name: self.expectation(name) for name in figures}
        verdicts = {e.judge(figures[name]) for name, e in judged.items() if e is not None}
        if "refuted" in verdicts:
            return "refuted"
        unmeasured = set(self.expects) - set(judged.values())
        return CANNOT if CANNOT in verdicts or unmeasured or not verdicts else "reproduced"


class Source:
    """A paper, by a short name, and the claims of it that can be measured."""

    def __init__(self, name: str, reference: str) -> None:
        self.name: str = name
        self.reference: str = reference
        self.claims: list[Claim] = []

    def claim(
        self, name: str, where: str, *, rule: str = "", remark: str = "", **data: str
    ) -> Callable[[Measure], Callable[[Setting], Figures]]:
        """Register the decorated function as the measurement of a claim.

        Its docstring tells what is measured, what the source ``Says:``, the ``Rule:``, see
        :meth:`Expect.read`, and a ``Remark:``. What several claims share of these is given here.
        `data` is that at the published size, too, unless `published_data` is given.
        """

        def register(measure: Measure) -> Callable[[Setting], Figures]:
            def figures(setting: Setting) -> Figures:
                found = measure(setting)
                return found if isinstance(found, dict) else draw_by_draw(found)

            told = re.split(r"^(Says|Rule|Remark):", inspect.getdoc(measure) or "", flags=re.M)
            parts = dict(zip(told[1::2], told[2::2], strict=True))
            expects = Expect.read(rule + parts.get("Rule", ""))
            texts = told[0], parts.get("Says", ""), remark + parts.get("Remark", "")
            about, says, remarks = (" ".join(text.split()) for text in texts)
            data.setdefault("published_data", data.get("data", "mnist"))
            made = Claim(
                f"{self.name}.{name}", where, says, expects, figures, about, remarks, **data
            )
            self.claims.append(made)
            return figures

        return register

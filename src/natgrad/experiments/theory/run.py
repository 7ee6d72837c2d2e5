"""`natgrad theory`: run the sections and collect what they found."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable
from datetime import datetime, timezone

from natgrad.experiments.environment import describe_environment
from natgrad.experiments.pages import format_seconds
from natgrad.experiments.progress import Progress
from natgrad.experiments.theory.conditions import conditions
from natgrad.experiments.theory.config import TheoryConfig
from natgrad.experiments.theory.dynamics import dynamics
from natgrad.experiments.theory.isotropy import isotropy
from natgrad.experiments.theory.problem import Problem
from natgrad.experiments.theory.results import Section, TheoryResults
from natgrad.experiments.theory.spectrum import spectrum
from natgrad.experiments.theory.width import width

SectionFunction = Callable[[Problem, Callable[[float], None]], Section]

_SECTIONS: dict[str, SectionFunction] = {
    one.__name__: one for one in (dynamics, width, isotropy, conditions, spectrum)
}


def run_theory(
    config: TheoryConfig, observer: Progress | None = None, command: str = ""
) -> TheoryResults:
    """Run the sections asked for.

    `command` is the command line to record as the one that repeats the run. After Ctrl-C the
    results hold the sections that had ended, and `interrupted` is true. A section the theory cannot
    be applied to has the status "failed" and says why. Data that cannot be used are a `DataError`.
    """
    created, began = datetime.now(timezone.utc), time.perf_counter()
    observer = observer or Progress()
    problem = Problem.load(config)
    sections: list[Section] = []
    interrupted = False
    for name in config.sections:
        observer.begin(name)
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # Skipped steps of diverging runs.
                section = _SECTIONS[name](problem, observer.progress)
            told = inspect.getdoc(_SECTIONS[name]) or ""
            section.title, _, question = told.partition(".\n")
            section.name, section.question = name, " ".join(question.split())
            section.status = "completed"
        except KeyboardInterrupt:
            section = Section(name, name.capitalize(), "", "interrupted")
            interrupted = True
        except (ValueError, RuntimeError) as error:
            section = Section(name, name.capitalize(), "", "failed", [str(error)])
        section.seconds = time.perf_counter() - start
        sections.append(section)
        observer.end(f"{name}: {section.status}, {format_seconds(section.seconds)}")
        if interrupted:
            break
    return TheoryResults(
        created=created.isoformat(timespec="seconds"),
        seconds=time.perf_counter() - began,
        interrupted=interrupted,
        command=command,
        config=config.as_dict(),
        data=problem.describe(),
        environment=describe_environment(config.torch_device()),
        sections=sections,
    )

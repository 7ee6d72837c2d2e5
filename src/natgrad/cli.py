"""The command line: ``natgrad compare``, ``theory``, ``claims``, ``inspect`` and ``plan``.

Wrong input ends with exit code 2 and one sentence on standard error; Ctrl-C with 130 and one line
there, after writing what was found. ``--json`` prints results alone to standard output, progress
goes to standard error. Where output is no terminal there are no colours and no live bars.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from natgrad.curvature import STRUCTURES
from natgrad.experiments.claims.console import ClaimBars, as_values, print_claims
from natgrad.experiments.claims.page import render_page
from natgrad.experiments.claims.registry import SOURCES, choose
from natgrad.experiments.claims.results import read_result, result_path, write_whole
from natgrad.experiments.claims.run import ClaimsConfig, run_claims
from natgrad.experiments.compare import compare as run_comparison
from natgrad.experiments.config import EVAL_SAMPLES, CompareConfig, ConfigError
from natgrad.experiments.console import (
    ProgressBars,
    SectionBars,
    print_findings,
    print_results,
    print_summary,
)
from natgrad.experiments.data import DATASETS, FILE_DATASETS, DataError
from natgrad.experiments.factories import FactoryError, load_model
from natgrad.experiments.inspection import (
    InspectionError,
    example_input,
    inspect_model,
    shared_positions,
    summary_values,
)
from natgrad.experiments.methods import DEFAULT_METHODS, METHODS, OWN_METHODS, method_name
from natgrad.experiments.models import MODELS
from natgrad.experiments.objectives import METRICS, OBJECTIVES, ObjectiveError
from natgrad.experiments.pages import check_output
from natgrad.experiments.plan import METHODS as SHAREABLE_METHODS
from natgrad.experiments.plan import Options, PlanError, parse_ranks, plan_factory, to_dict
from natgrad.experiments.plan_tables import print_plan
from natgrad.experiments.report import write_report
from natgrad.experiments.results import Results, read_results
from natgrad.experiments.search import BUDGET
from natgrad.experiments.theory.config import SECTIONS, TheoryConfig
from natgrad.experiments.theory.report import write_theory_report
from natgrad.experiments.theory.run import run_theory
from natgrad.likelihoods.conversion import LIKELIHOODS
from natgrad.ntk import ACTIVATIONS
from natgrad.version import __version__

__all__ = ["app", "run"]

app = typer.Typer(
    name="natgrad",
    help="Natural gradient descent for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Else "[default: ...]" is taken for markup and left out.
)

# Typer's usage errors derive from a class that it does not export under a name of its own.
_UsageError: Any = typer.BadParameter.__mro__[1]


class _Interrupted(Exception):
    """Ctrl-C ended a command that has told what it found; the message says where that is."""


#: Errors whose message is all that users need to know.
_REFUSALS = (ConfigError, DataError, FactoryError, InspectionError, ObjectiveError, PlanError)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments after the program's name; those of the process by default.

    Returns:
        The exit code: 0 on success, 2 for wrong input, 130 after Ctrl-C.
    """
    try:
        status = app(args=arguments, standalone_mode=False)
    except typer.Exit as leaving:
        return leaving.exit_code
    except _Interrupted as stop:
        return _tell(f"interrupted; {stop}.", 130)
    except (typer.Abort, KeyboardInterrupt):
        status = 130
    except _UsageError as error:
        return _tell(error.format_message())
    except _REFUSALS as error:
        return _tell(str(error))
    if status == 130:
        return _tell("interrupted; nothing was written.", 130)
    return status if isinstance(status, int) else 0


def _tell(sentence: str, status: int = 2) -> int:
    """Print one line to standard error, and return an exit code."""
    print("natgrad: " + " ".join(sentence.split()), file=sys.stderr)
    return status


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"natgrad {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Natural gradient descent for PyTorch."""


DataOption = Annotated[str, typer.Option(help=f"Data set: {', '.join(DATASETS)}.")]
DataFolderOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder with the original files of built-in data, or train.npz and test.npz "
        "[default: $NATGRAD_DATA; digits need none]."
    ),
]
DepthOption = Annotated[int, typer.Option(help="Number of weight layers.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
OutputOption = Annotated[Path, typer.Option(help="Folder for results.json, plots and report.html.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def compare(
    factory: Annotated[
        str | None,
        typer.Argument(
            metavar="[PACKAGE.MODULE:FACTORY]",
            help="A function that returns your model, or your model and its loss "
            "[default: a built-in network].",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="package.module:loader, a function that returns an iterable of batches, or a "
            "training and a held-out one; or a built-in data set: "
            f"{', '.join(DATASETS)} [default: digits for built-in networks]."
        ),
    ] = None,
    data_dir: DataFolderOption = None,
    train_samples: Annotated[
        int | None,
        typer.Option(
            help="Training samples of built-in data to use "
            "[default: 200 with full batches, else all]."
        ),
    ] = None,
    test_samples: Annotated[
        int | None, typer.Option(help="Test samples of built-in data to use [default: all].")
    ] = None,
    eval_samples: Annotated[
        int | None,
        typer.Option(
            help="Samples of your training and of your held-out data, the first ones, on which "
            f"losses are measured [default: {EVAL_SAMPLES}]."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help=f"Built-in network: {', '.join(MODELS)} [default: mlp].")
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(help="Units or channels of the hidden layers [default: 512 (mlp), 32 (cnn)]."),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(help="Number of weight layers of a built-in network [default: 3]."),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help=f"Loss: of built-in networks {', '.join(OBJECTIVES)} [default: mse]; of yours a "
            "loss of torch, such as cross_entropy, mse or bce_with_logits, or a likelihood "
            "[default: what the factory gives, or the model computes itself, or cross_entropy "
            "where targets are class labels]."
        ),
    ] = None,
    likelihood: Annotated[
        str | None,
        typer.Option(
            help=f"What the natural methods take your loss for: {', '.join(LIKELIHOODS)} "
            "[default: the likelihood that it is]."
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help=f"Metric beside your loss: {', '.join(METRICS)}, or package.module:function of "
            "outputs and targets [default: accuracy where there are classes]."
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help=f"Methods, separated by commas, of {', '.join(METHODS)} [default: "
            f"{','.join(DEFAULT_METHODS)} for built-in networks, {','.join(OWN_METHODS)} for "
            "yours]."
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Training steps of every natural method [default: 30 for built-in networks, 200 "
            "for yours]."
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="Seconds of training of every method, and of every trial of a search."),
    ] = None,
    first_order_steps: Annotated[
        int | None,
        typer.Option(
            help="Training steps of every first-order method "
            "[default: 10 x --steps with full batches, else --steps]."
        ),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(help="Samples of built-in data per step: a number, or full [default: full]."),
    ] = None,
    damping: Annotated[
        float | None,
        typer.Option(help="Damping of every natural method [default: each method's own]."),
    ] = None,
    learning_rate: Annotated[
        list[str] | None,
        typer.Option(help="METHOD=RATE, instead of the searched or theoretical one; repeatable."),
    ] = None,
    fisher: Annotated[
        str | None,
        typer.Option(
            help="Fisher type of the natural methods: exact, mc, empirical, improved "
            "[default: exact for the mlp with full batches, else each method's own]."
        ),
    ] = None,
    search_steps: Annotated[
        int | None,
        typer.Option(
            help=f"Steps of each of the {BUDGET} trials that every first-order method has to find "
            "its learning rate [default: as many as it trains]."
        ),
    ] = None,
    target_loss: Annotated[
        float | None,
        typer.Option(help="Training loss to reach [default: the best of the first-order methods]."),
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations [default: 20 evaluations].")
    ] = None,
    quality: Annotated[
        bool | None,
        typer.Option(
            "--quality/--no-quality",
            help="Measure how close every update is to the exact natural gradient, on built-in "
            "networks [default: measure].",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, subset and batches.")] = 0,
    seeds: Annotated[
        int, typer.Option(help="Number of seeds, from --seed on; rates are those of the first.")
    ] = 1,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 or float64 [default: float32, for your model as it is]."),
    ] = None,
    output: OutputOption = Path("results/compare"),
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Take over the whole runs of an interrupted comparison."),
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Train a network, yours or a built-in one, by every method."""
    config = CompareConfig(
        factory=factory,
        data=data,
        data_dir=_data_folder(data_dir, read=data is not None and data in FILE_DATASETS),
        train_samples=train_samples,
        test_samples=test_samples,
        eval_samples=eval_samples,
        model=model,
        width=width,
        depth=depth,
        loss=loss,
        likelihood=likelihood,
        metric=metric,
        methods=None if methods is None else _methods(methods),
        steps=steps,
        seconds=seconds,
        first_order_steps=first_order_steps,
        batch_size=_batch_size(batch_size),
        damping=damping,
        learning_rates=_learning_rates(learning_rate or []),
        fisher=fisher,
        search_steps=search_steps,
        target_loss=target_loss,
        eval_every=eval_every,
        quality=quality,
        seed=seed,
        seeds=seeds,
        device=device,
        dtype=dtype,
    )
    _check_output(output)
    earlier = _earlier(output) if resume else None
    console = _console()

    def keep(results: Results) -> None:
        write_whole(output / "results.json", results.to_json())

    with ProgressBars(_console(stderr=True) if as_json else console) as bars:
        results = run_comparison(config, bars, _command(), earlier, keep)
    files = write_report(results, output)
    if as_json:
        print(results.to_json(), end="")
    else:
        print_results(console, results)
        console.print(f"Report: {files[0]}", highlight=False)
    if results.interrupted:
        raise _Interrupted(f"{output} holds what was measured, --resume goes on from it")
    return 0


_theory_defaults = TheoryConfig()


@app.command()
def theory(
    sections: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SECTION]...", help=f"Sections, of {', '.join(SECTIONS)} [default: all]."
        ),
    ] = None,
    data: DataOption = _theory_defaults.data,
    data_dir: DataFolderOption = None,
    classes: Annotated[
        str, typer.Option(help="Labels to keep, separated by commas; two give targets ±½.")
    ] = "0,1",
    train_samples: Annotated[
        int | None,
        typer.Option(help="Training samples N [default: 40 for digits, else 100]."),
    ] = None,
    test_samples: Annotated[
        int, typer.Option(help="Test samples, at most.")
    ] = _theory_defaults.test_samples,
    width: Annotated[
        int, typer.Option(help="Units of the hidden layers; the largest where it varies.")
    ] = _theory_defaults.width,
    depth: DepthOption = _theory_defaults.depth,
    activation: Annotated[
        str, typer.Option(help=f"Activation: {', '.join(ACTIVATIONS)}.")
    ] = _theory_defaults.activation,
    seed: Annotated[int, typer.Option(help="Seed of weights and subset.")] = 0,
    device: DeviceOption = _theory_defaults.device,
    output: OutputOption = Path("results/theory"),
    as_json: JsonOption = False,
) -> int:
    """Put the theory of wide networks beside what networks do."""
    config = TheoryConfig(
        sections=tuple(sections) if sections else SECTIONS,
        data=data,
        data_dir=_data_folder(data_dir, read=data in FILE_DATASETS),
        classes=_classes(classes),
        train_samples=train_samples,
        test_samples=test_samples,
        width=width,
        depth=depth,
        activation=activation,
        seed=seed,
        device=device,
    )
    _check_output(output)
    console = _console()
    with SectionBars(_console(stderr=True) if as_json else console) as bars:
        results = run_theory(config, bars, command=_command())
    files = write_theory_report(results, output)
    if as_json:
        print(results.to_json(), end="")
    else:
        print_findings(console, results)
        console.print(f"Report: {files[0]}", highlight=False)
    if results.interrupted:
        raise _Interrupted(f"{output} holds what was found")
    return 0


@app.command()
def claims(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Claims, or whole sources [default: all]."),
    ] = None,
    listing: Annotated[
        bool, typer.Option("--list", help="List the claims and their verdicts; measure nothing.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Measure at the published sizes: hours, or a GPU.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure what is kept, too.")] = False,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the files of the data sets [default: $NATGRAD_DATA; without it the "
            "digits stand in for them]."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: DeviceOption = "auto",
    output: Annotated[
        Path, typer.Option(help="Folder of the results; the page is FOLDER.md beside it.")
    ] = Path("results/claims"),
    as_json: JsonOption = False,
) -> int:
    """Put what natgrad's sources claim to the test."""
    chosen = choose(names or ())
    console, interrupted = _console(), False
    if not listing:
        _check_output(output)
        config = ClaimsConfig(output, full, again, _data_folder(data_dir), seed, device)
        with ClaimBars(_console(stderr=True) if as_json else console) as bars:
            interrupted = run_claims(chosen, config, bars)[1]
        write_whole(output.with_suffix(".md"), render_page(SOURCES, output))
    found = [(claim, read_result(result_path(output, claim, full))) for claim in chosen]
    if as_json:
        print(json.dumps([as_values(*pair) for pair in found], indent=2, ensure_ascii=False))
    else:
        print_claims(console, found)
    if not listing and not as_json:
        console.print(f"Page: {output.with_suffix('.md')}", highlight=False)
    if interrupted:
        raise _Interrupted(f"{output} holds what was measured, the same command goes on from it")
    return 0


@app.command("inspect")
def inspect_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="PACKAGE.MODULE:FACTORY",
            help="A function that returns a model, or a model and an example input.",
        ),
    ],
    structure: Annotated[
        str, typer.Option(help=f"Structure of the Fisher matrix: {', '.join(STRUCTURES)}.")
    ] = "kfac",
    likelihood: Annotated[
        str, typer.Option(help="categorical, gaussian, bernoulli or poisson.")
    ] = "categorical",
    fisher: Annotated[
        str, typer.Option(help="Fisher type: exact, mc, empirical, improved.")
    ] = "mc",
    samples: Annotated[int, typer.Option(help="Batch size that costs are stated for.")] = 128,
    input_shape: Annotated[
        str | None,
        typer.Option(
            help="Shape of one input, such as 3,32,32: needed, unless the factory returns an "
            "example, to count the positions that share weights."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Show what would be preconditioned in a model, and its cost."""
    if samples < 1:
        raise InspectionError(f"The number of samples must be at least 1, not {samples}.")
    network, _, example = load_model(model)
    if input_shape is not None:
        example = example_input(input_shape)
    positions = None if example is None else shared_positions(network, example)
    structure = structure.replace("-", "_")
    summary = inspect_model(network, structure, likelihood, fisher, samples, positions)
    if as_json:
        print(json.dumps(summary_values(summary, positions), indent=2, ensure_ascii=False))
    else:
        print_summary(_console(), summary, positions)
    return 0


_plan_defaults = Options()


@app.command("plan")
def plan_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="PACKAGE.MODULE:FACTORY",
            help="A function that returns a model, or a model and an example input.",
        ),
    ],
    ranks: Annotated[
        str, typer.Option(help="Numbers of processes, separated by commas.")
    ] = ",".join(map(str, _plan_defaults.ranks)),
    method: Annotated[
        str, typer.Option(help=f"Method: {', '.join(SHAREABLE_METHODS)}.")
    ] = _plan_defaults.method,
    samples: Annotated[
        int, typer.Option(help="Samples per process and step.")
    ] = _plan_defaults.samples,
    positions: Annotated[
        int, typer.Option(help="Positions of a sample that share weights: tokens, pixels.")
    ] = _plan_defaults.positions,
    factors: Annotated[
        int | None,
        typer.Option(help="Steps between updates of the curvature [default: the method's own]."),
    ] = None,
    inverses: Annotated[
        int | None,
        typer.Option(help="Steps between factorisations [default: the method's own]."),
    ] = None,
    bandwidth: Annotated[
        float, typer.Option(help="Of each process's link, in GB/s.")
    ] = _plan_defaults.bandwidth,
    throughput: Annotated[
        float, typer.Option(help="Of each process's arithmetic, in TFLOP/s.")
    ] = _plan_defaults.throughput,
    memory: Annotated[
        float | None,
        typer.Option(help="GiB that factors and inverses may take in a process [default: any]."),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Predict what curvature shared by processes keeps and sends."""
    options = Options(
        method=method_name(method),
        ranks=parse_ranks(ranks),
        samples=samples,
        positions=positions,
        factors=factors,
        inverses=inverses,
        bandwidth=bandwidth,
        throughput=throughput,
        memory=memory,
    )
    plan = plan_factory(model, options)
    if as_json:
        print(json.dumps(to_dict(plan), indent=2))
    else:
        print_plan(_console(), plan)
    return 0


def _console(stderr: bool = False) -> Console:
    """Return a console, wide enough for tables where no terminal sets the width."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 120)


def _data_folder(given: Path | None, read: bool = True) -> Path | None:
    """Return the folder of built-in data: the environment's, if files are read, by default."""
    folder = os.environ.get("NATGRAD_DATA")
    return Path(folder) if given is None and read and folder else given


def _check_output(directory: Path) -> None:
    try:
        check_output(directory)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _classes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(label) for label in text.split(","))
    except ValueError:
        raise ConfigError(
            f"The classes are numbers separated by commas, for example 0,1, not {text!r}."
        ) from None


def _earlier(directory: Path) -> Results | None:
    """Return the results that an interrupted comparison has left in a folder, if any."""
    path = directory / "results.json"
    if not path.exists():
        return None
    try:
        return read_results(path)
    except ValueError as error:
        raise ConfigError(f"{error}: leave out --resume, or give another --output.") from error


def _methods(text: str) -> tuple[str, ...]:
    return tuple(method_name(name) for name in text.split(",") if name.strip())


def _batch_size(text: str | None) -> int | None:
    if text is None or text == "full":
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"The batch size must be a number or full, not {text!r}.") from None


def _learning_rates(pairs: list[str]) -> dict[str, float]:
    rates = {}
    for pair in pairs:
        method, _, rate = pair.partition("=")
        try:
            rates[method_name(method)] = float(rate)
        except ValueError:
            raise ConfigError(
                f"A learning rate is given as METHOD=RATE, for example kfac=0.1, not {pair!r}."
            ) from None
    return rates


def _command() -> str:
    return shlex.join(["natgrad", *sys.argv[1:]])

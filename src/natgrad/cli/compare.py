"""``natgrad compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from natgrad.cli.invocation import (
    DataFolderOption,
    DeviceOption,
    Interrupted,
    JsonOption,
    OutputOption,
    command_line,
    configured,
    data_folder,
    make_console,
)
from natgrad.experiments.compare import compare as run_comparison
from natgrad.experiments.config import EVAL_SAMPLES, CompareConfig, ConfigError
from natgrad.experiments.console import ProgressBars, print_results
from natgrad.experiments.data import DATASETS, FILE_DATASETS
from natgrad.experiments.methods import DEFAULT_METHODS, METHODS, OWN_METHODS, method_name
from natgrad.experiments.models import MODELS
from natgrad.experiments.objectives import METRICS, OBJECTIVES
from natgrad.experiments.pages import check_output, write_whole
from natgrad.experiments.report import write_report
from natgrad.experiments.results import Results, read_results
from natgrad.experiments.search import BUDGET
from natgrad.likelihoods.conversion import LIKELIHOODS

__all__ = ["compare"]


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
    config = configured(
        CompareConfig,
        locals(),
        data_dir=data_folder(data_dir, read=data is not None and data in FILE_DATASETS),
        methods=None if methods is None else _methods(methods),
        batch_size=_batch_size(batch_size),
        learning_rates=_learning_rates(learning_rate or []),
    )
    check_output(output)
    path = output / "results.json"
    earlier = read_results(path) if resume and path.exists() else None
    console = make_console()

    def keep(results: Results) -> None:
        write_whole(path, results.to_json().encode())

    with ProgressBars(make_console(stderr=True) if as_json else console) as bars:
        results = run_comparison(config, bars, command_line(), earlier, keep)
    files = write_report(results, output)
    if as_json:
        print(results.to_json(), end="")
    else:
        print_results(console, results)
        console.print(f"Report: {files[0]}", highlight=False)
    if results.interrupted:
        raise Interrupted(f"{output} holds what was measured, --resume goes on from it")
    return 0


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

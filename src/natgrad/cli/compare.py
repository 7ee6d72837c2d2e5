"""``natgrad compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from natgrad.cli.invocation import (
    DATA_FOLDER,
    DEVICE,
    Given,
    Interrupted,
    JsonOption,
    OutputOption,
    command_line,
    configured,
    data_folder,
    make_console,
    options_of,
)
from natgrad.experiments.compare import compare as run_comparison
from natgrad.experiments.config import EVAL_SAMPLES, CompareConfig, ConfigError
from natgrad.experiments.console import ProgressBars, print_results
from natgrad.experiments.data import DATASETS, FILE_DATASETS
from natgrad.experiments.learning_rates import BUDGET
from natgrad.experiments.methods import DEFAULT_METHODS, METHODS, OWN_METHODS, method_name
from natgrad.experiments.models import MODELS
from natgrad.experiments.objectives import METRICS, OBJECTIVES
from natgrad.experiments.pages import check_output, write_whole
from natgrad.experiments.report import write_report
from natgrad.experiments.results import Results, read_results
from natgrad.likelihoods.conversion import LIKELIHOODS


@options_of(
    CompareConfig,
    factory=typer.Argument(
        metavar="[PACKAGE.MODULE:FACTORY]",
        help="A function that returns your model, or your model and its loss "
        "[default: a built-in network].",
    ),
    data=(
        "package.module:loader, a function that returns an iterable of batches, or a "
        "training and a held-out one; or a built-in data set: "
        f"{', '.join(DATASETS)} [default: digits for built-in networks]."
    ),
    data_dir=DATA_FOLDER,
    train_samples=(
        "Training samples of built-in data to use [default: 200 with full batches, else all]."
    ),
    test_samples="Test samples of built-in data to use [default: all].",
    eval_samples=(
        "Samples of your training and of your held-out data, the first ones, on which "
        f"losses are measured [default: {EVAL_SAMPLES}]."
    ),
    model=f"Built-in network: {', '.join(MODELS)} [default: mlp].",
    width="Units or channels of the hidden layers [default: 512 (mlp), 32 (cnn)].",
    depth="Number of weight layers of a built-in network [default: 3].",
    loss=(
        f"Loss: of built-in networks {', '.join(OBJECTIVES)} [default: mse]; of yours a "
        "loss of torch, such as cross_entropy, mse or bce_with_logits, or a likelihood "
        "[default: what the factory gives, or the model computes itself, or cross_entropy "
        "where targets are class labels]."
    ),
    likelihood=(
        f"What the natural methods take your loss for: {', '.join(LIKELIHOODS)} "
        "[default: the likelihood that it is]."
    ),
    metric=(
        f"Metric beside your loss: {', '.join(METRICS)}, or package.module:function of "
        "outputs and targets [default: accuracy where there are classes]."
    ),
    methods=Given(
        str | None,
        (
            f"Methods, separated by commas, of {', '.join(METHODS)} [default: "
            f"{','.join(DEFAULT_METHODS)} for built-in networks, {','.join(OWN_METHODS)} for "
            "yours]."
        ),
        None,
    ),
    steps=(
        "Training steps of every natural method [default: 30 for built-in networks, 200 for yours]."
    ),
    seconds="Seconds of training of every method, and of every trial of a search.",
    first_order_steps=(
        "Training steps of every first-order method "
        "[default: 10 x --steps with full batches, else --steps]."
    ),
    batch_size=Given(
        str | None, "Samples of built-in data per step: a number, or full [default: full].", None
    ),
    damping="Damping of every natural method [default: each method's own].",
    learning_rate=Given(
        list[str] | None,
        "METHOD=RATE, instead of the searched or theoretical one; repeatable.",
        None,
    ),
    fisher=(
        "Fisher type of the natural methods: exact, mc, empirical, improved "
        "[default: exact for the mlp with full batches, else each method's own]."
    ),
    search_steps=(
        f"Steps of each of the {BUDGET} trials that every first-order method has to find "
        "its learning rate [default: as many as it trains]."
    ),
    target_loss="Training loss to reach [default: the best of the first-order methods].",
    eval_every="Steps between evaluations [default: 20 evaluations].",
    quality=typer.Option(
        "--quality/--no-quality",
        help="Measure how close every update is to the exact natural gradient, on built-in "
        "networks [default: measure].",
    ),
    seed="Seed of weights, subset and batches.",
    seeds="Number of seeds, from --seed on; rates are those of the first.",
    device=DEVICE,
    dtype="float32 or float64 [default: float32, for your model as it is].",
)
def compare(
    output: OutputOption = Path("results/compare"),
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Take over the whole runs of an interrupted comparison."),
    ] = False,
    as_json: JsonOption = False,
    **options: Any,
) -> int:
    """Train a network, yours or a built-in one, by every method."""
    config = configured(
        CompareConfig,
        options,
        data_dir=data_folder(options["data_dir"], read=options["data"] in FILE_DATASETS),
        methods=_methods(options["methods"]),
        batch_size=_batch_size(options["batch_size"]),
        learning_rates=_learning_rates(options["learning_rate"] or []),
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


def _methods(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
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

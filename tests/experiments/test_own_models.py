"""`natgrad compare` on a model and data of the user's."""

from __future__ import annotations

import functools
import itertools
import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from natgrad.cli import run
from natgrad.experiments.batches import LoaderBatches
from natgrad.experiments.compare import Observer, compare
from natgrad.experiments.config import CompareConfig, ConfigError
from natgrad.experiments.factories import FactoryError
from natgrad.experiments.objectives import ObjectiveError, choose_objective
from natgrad.experiments.results import read_results
from natgrad.likelihoods import Bernoulli, Categorical, Gaussian, Poisson
from tests.experiments.schema import check

HERE = "tests.experiments.test_own_models"
CPU = torch.device("cpu")


# What a user would write.


def samples(count=24):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 5, generator=generator)
    return inputs, (inputs.sum(1) > 0).long() + (inputs[:, 0] > 1).long()


def model():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))


def plain():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def for_digits():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def with_loss():
    return model(), nn.CrossEntropyLoss(label_smoothing=0.1)


def regression():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)), nn.MSELoss()


class OwnLoss(nn.Module):
    """Called with a dict's entries, gives an object with a loss and logits."""

    def __init__(self):
        super().__init__()
        self.inner = model()

    def forward(self, features, labels=None):
        logits = self.inner(features)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return type("Output", (), {"logits": logits, "loss": loss})()


def loader():
    whole = TensorDataset(*samples(30))
    train, held_out = torch.utils.data.Subset(whole, range(24)), whole
    return DataLoader(train, 8, shuffle=True), DataLoader(held_out, 10)


def shuffling():
    return loader()[0]


def own_generator():
    generator = torch.Generator().manual_seed(5)
    return DataLoader(TensorDataset(*samples()), 8, shuffle=True, generator=generator)


def noisy():
    """Augments by numpy's and Python's random numbers, and can be read only once."""
    inputs, labels = samples()
    for start in (0, 8, 16):
        noise = torch.tensor(np.random.normal(size=(8, 5))).float() * random.random()
        yield inputs[start : start + 8] + noise, labels[start : start + 8]


def pairs():
    inputs, labels = samples()
    return list(zip(inputs.split(8), labels.split(8), strict=True))


def one_batch():
    return samples()


def one_batch_each():
    return samples(), samples(10)


def none_between():
    return [pairs()[0], None, pairs()[1]]


def dicts():
    return [{"features": x, "labels": y} for x, y in pairs()]


def regressions():
    return [(x, x.sum(1, keepdim=True)) for x, _ in pairs()]


instance = DataLoader(TensorDataset(*samples()), 8)
read_once = iter(pairs())
number = 3


def empty():
    return []


def dataset():
    return TensorDataset(*samples())


def singles():
    return [x for x, _ in pairs()]


def arrays():
    return [(x.numpy(), y) for x, y in pairs()]


def narrow():
    return [(x[:, :4], y) for x, y in pairs()]


def far_labels():
    return [(x, y + 7) for x, y in pairs()]


def infinite_inputs():
    return [(x / 0, y) for x, y in pairs()]


def fails():
    raise RuntimeError("the disk\nis on fire.")


def fails_later():
    yield from pairs()[:1]
    raise OSError("the disk is on fire")


def frozen():
    made = model()
    return made.requires_grad_(False)


def with_number():
    return model(), 3


def with_margins():
    return regression()[0], nn.SoftMarginLoss()


def nothing_right(outputs, targets):
    raise KeyError("nothing")


def first_output(outputs, targets):
    return outputs[:, 0].mean()


# End to end.


def compared(factory="model", data="loader", **options):
    """The results without a report, as JSON values."""
    results = compare(CompareConfig(factory=f"{HERE}:{factory}", data=f"{HERE}:{data}", **options))
    values = json.loads(results.to_json())
    check(values)
    return values


def command(tmp_path, *options, factory="model", data="loader"):
    arguments = [f"{HERE}:{factory}", f"--data={HERE}:{data}", f"--output={tmp_path / 'out'}"]
    return run(["compare", *arguments, *options])


def stored(tmp_path):
    values = json.loads((tmp_path / "out" / "results.json").read_text())
    check(values)
    return values


SHORT = ("--steps=4", "--search-steps=2")


def test_a_model_and_data_of_ones_own_are_compared(tmp_path, capsys):
    assert command(tmp_path, "--methods=KFAC,AdamW,sgd", *SHORT) == 0
    printed = capsys.readouterr().out
    found = stored(tmp_path)
    assert [method["name"] for method in found["methods"]] == ["kfac", "adamw", "sgd"]
    for method in found["methods"]:
        assert method["status"] == "completed", method["message"]
        assert method["title"] in printed
        assert method["batch"]["step"] == [0, 1, 2, 3]
        assert method["train"]["step"] == method["test"]["step"] == [0, 1, 2, 3, 4]
    assert len({method["train"]["loss"][0] for method in found["methods"]}) == 1
    kfac, *first_order = found["methods"]
    assert (kfac["learning_rate"], kfac["learning_rate_source"]) == (1.5, "default")
    for method in first_order:
        assert method["learning_rate_source"] == "search"
        assert 5 <= len(method["search"]["trials"]) <= 9 and method["search"]["steps"] == 2
    assert found["data"]["train_samples"] == 24 and found["data"]["test_samples"] == 30
    assert found["data"]["classes"] == 3
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{HERE}:model" in page and f"{HERE}:loader" in page
    assert (tmp_path / "out" / "test-accuracy-steps.png").exists()


RATES = {"sgd": 0.1, "adamw": 0.01}


def test_the_batch_curve_is_that_of_a_plain_loop():
    options = dict(methods=("sgd",), learning_rates=RATES, steps=4, seed=3)
    found = compared("plain", "pairs", **options)["methods"][0]
    torch.manual_seed(3)
    network = plain()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    inputs, labels = samples()
    before = (network(inputs).argmax(1) == labels).float().mean().item()
    losses = []
    for batch, truth in itertools.islice(itertools.cycle(pairs()), 4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(batch), truth)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = nn.functional.cross_entropy(network(inputs), labels).item()
    assert found["batch"]["loss"] == pytest.approx(losses, rel=1e-5)
    assert found["train"]["accuracy"][0] == pytest.approx(before)
    assert found["train"]["loss"][-1] == pytest.approx(after, rel=1e-5)
    assert found["test"]["loss"] == []


@pytest.mark.parametrize(
    ("factory", "data", "options"),
    [
        ("with_loss", "shuffling", {}),
        ("model", "noisy", {}),
        ("model", "one_batch", {"loss": "categorical"}),
        ("model", "one_batch_each", {"loss": "CrossEntropyLoss", "metric": "none"}),
        ("model", "instance", {"metric": f"{HERE}:first_output"}),
        ("OwnLoss", "dicts", {}),
        ("OwnLoss", "dicts", {"loss": "cross_entropy"}),
        ("regression", "regressions", {"metric": "mean_absolute_error"}),
        ("with_margins", "regressions", {"likelihood": "gaussian"}),
    ],
)
def test_whatever_form_model_and_data_have(factory, data, options):
    options = dict(methods=("kfac", "adamw"), learning_rates=RATES, steps=3, **options)
    found = compared(factory, data, **options)
    for method in found["methods"]:
        assert method["status"] == "completed", method["message"]
        metrics = method["train"]["accuracy"]
        assert (found["metric"] == "none") == (metrics == [None] * len(metrics))


def test_built_in_data_serve_for_models_of_ones_own():
    config = CompareConfig(
        factory=f"{HERE}:for_digits",
        data="digits",
        methods=("kfac",),
        batch_size=20,
        train_samples=60,
        test_samples=30,
        steps=3,
    )
    results = compare(config)
    check(json.loads(results.to_json()))
    assert results.methods[0].status == "completed" and results.methods[0].batch is not None
    assert results.data["title"] == "scikit-learn digits" and results.data["classes"] == 10


def test_a_budget_in_seconds():
    found = compared(methods=("kfac", "sgd"), seconds=0.05)
    assert found["methods"][1]["search"]["seconds"] == 0.05
    for method in found["methods"]:
        assert method["steps"] is None
        last = method["batch"]["seconds"][-1]  # When the last step began.
        assert method["train"]["step"][-1] >= 1 and last < 0.05 <= method["seconds"]
        assert method["train"]["step"] == method["test"]["step"]


def test_seeds_differ_in_weights_and_batches_and_are_those_of_runs_alone():
    options = dict(methods=("kfac", "sgd"), learning_rates=RATES, steps=4)
    together = compared(seeds=3, **options)["methods"]
    for method in together:
        assert [run["seed"] for run in method["repeats"]] == [1, 2]
        curves = [method["batch"]["loss"], *(run["batch"]["loss"] for run in method["repeats"])]
        assert len({curve[0] for curve in curves}) == 3
    for method, alone in zip(together, compared(seed=2, **options)["methods"], strict=True):
        assert method["repeats"][1]["batch"]["loss"] == alone["batch"]["loss"]


@pytest.mark.usefixtures("undrawn")
def test_json_is_printed_alone(tmp_path, capsys):
    assert command(tmp_path, "--methods=kfac", "--steps=2", "--json") == 0
    captured = capsys.readouterr()
    assert captured.out == (tmp_path / "out" / "results.json").read_text()
    assert "K-FAC: completed" in captured.err


# Interruptions.


class Stop(Observer):
    """Presses Ctrl-C when a number of steps is taken, in searches and runs together."""

    def __init__(self, at):
        self.steps, self.at = 0, at

    def step(self, taken, loss, metric):
        self.steps += 1
        if self.steps == self.at:
            raise KeyboardInterrupt


class Counter(Observer):
    """Adds up what has begun."""

    begun = 0.0

    def begin(self, method, budget, searching):
        self.begun += budget


def test_what_is_to_come_is_told_before(tmp_path):
    config = CompareConfig(
        factory=f"{HERE}:model", data=f"{HERE}:loader", methods=("sgd", "kfac", "adamw"), steps=2,
        seeds=2, search_steps=1, learning_rates={"adamw": 0.01},
    )  # fmt: skip
    counter = Counter()
    results = compare(config, counter)
    assert counter.total == counter.begun == 3 * 2 * 2 + 9
    results.methods[1].repeats.clear()
    results.methods[2].status = "interrupted"
    counter = Counter()
    compare(config, counter, earlier=results)
    assert counter.total == counter.begun == 2 + 2 * 2


def curves(results):
    return [
        (method.name, method.learning_rate, [run.batch.loss for run in method.runs])
        for method in results.methods
    ]


def test_an_interrupted_comparison_goes_on_where_it_was(tmp_path):
    config = CompareConfig(
        factory=f"{HERE}:model", data=f"{HERE}:loader", methods=("sgd", "kfac"), steps=3, seeds=2
    )
    whole, counted = Stop(None), compare(config, Stop(None))
    reference = compare(config, whole)
    assert curves(counted) == curves(reference) and not reference.interrupted
    for at in (5, 9 * 3 + 2, whole.steps - 4, whole.steps - 1):
        kept: list[str] = []
        keep = functools.partial(lambda kept, results: kept.append(results.to_json()), kept)
        stopped = compare(config, Stop(at), keep=keep)
        assert stopped.interrupted
        (tmp_path / "results.json").write_text(stopped.to_json())
        rest = Stop(None)
        resumed = compare(config, rest, earlier=read_results(tmp_path / "results.json"))
        assert curves(resumed) == curves(reference) and not resumed.interrupted
        assert rest.steps < whole.steps - (at // 3 - 1) * 3
        (tmp_path / "results.json").write_text(kept[-1])  # A kill leaves what was kept.
        resumed = compare(config, earlier=read_results(tmp_path / "results.json"))
        assert curves(resumed) == curves(reference)


def test_resuming_another_comparison_is_refused(tmp_path, capsys):
    config = CompareConfig(
        factory=f"{HERE}:model", data=f"{HERE}:loader", methods=("kfac",), steps=2
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text(compare(config).to_json())
    assert command(tmp_path, "--methods=kfac", "--steps=3", "--resume") == 2
    assert "its config differs in steps" in capsys.readouterr().err
    (tmp_path / "out" / "results.json").write_text("{}")
    assert command(tmp_path, "--methods=kfac", "--steps=3", "--resume") == 2
    assert "does not hold results of natgrad compare" in capsys.readouterr().err


def test_results_survive_their_file(tmp_path):
    results = compare(
        CompareConfig(
            factory=f"{HERE}:regression", data=f"{HERE}:regressions", methods=("sgd",), steps=2
        )
    )
    (tmp_path / "results.json").write_text(results.to_json())
    again = read_results(tmp_path / "results.json")
    assert again.to_json() == results.to_json()
    assert np.isnan(again.methods[0].train.accuracy).all()


# Wrong input.


@pytest.mark.parametrize(
    ("factory", "data", "options", "message"),
    [
        ("absent", "pairs", [], "has no attribute 'absent'"),
        ("number", "pairs", [], "neither a model nor a function"),
        ("fails", "pairs", [], "fails() fails: the disk is on fire"),
        ("pairs", "pairs", [], "returns list, but must return a torch.nn.Module"),
        ("with_number", "pairs", [], "returns a tuple of Sequential, int"),
        ("frozen", "pairs", [], "must be one number that depends on the model"),
        ("model", "absent", [], "has no attribute 'absent'"),
        ("model", "fails", [], "fails() fails: the disk is on fire (tests/experiments/test_own"),
        ("model", "none_between", [], "yields NoneType, but must yield pairs"),
        ("model", "number", [], "gives int, but must give an iterable of batches"),
        ("model", "empty", [], "gives no batches"),
        ("model", "dataset", [], "gives a Dataset, which yields samples"),
        ("model", "singles", [], "yields a tensor of shape (8, 5), but must yield pairs"),
        ("model", "arrays", [], "yields inputs ndarray, but they must be tensors"),
        ("model", "read_once", [], "can be read only once"),
        ("model", "narrow", [], "The model fails on the first batch: mat1 and mat2"),
        ("model", "far_labels", [], "fails on outputs of shape (8, 3) and type float32"),
        ("model", "infinite_inputs", [], "is nan on the first batch"),
        ("plain", "regressions", [], "The loss cannot be told from outputs of shape (8, 3)"),
        ("with_margins", "regressions", [], "give --likelihood (Likelihoods are known for"),
        ("model", "pairs", ["--loss=hinge"], "Unknown loss 'hinge'"),
        ("model", "pairs", ["--likelihood=cauchy"], "Unknown likelihood 'cauchy'"),
        ("model", "pairs", ["--metric=f1"], "Unknown metric 'f1'"),
        ("model", "pairs", [f"--metric={HERE}:nothing_right"], "The metric nothing_right fails"),
        ("model", "pairs", ["--methods=adam"], "Unknown method 'adam'"),
        ("model", "pairs", ["--steps=3", "--seconds=3"], "in steps or in seconds, not in both"),
        ("model", "pairs", ["--batch-size=3"], "your loader decides it"),
        ("model", "pairs", ["--width=3"], "describes a built-in network"),
        ("model", "pairs", ["--quality"], "for built-in networks only"),
        ("model", "pairs", ["--eval-samples=0"], "must be greater than 0"),
    ],
)
def test_wrong_input_ends_with_one_sentence_and_writes_nothing(
    tmp_path, capsys, factory, data, options, message
):
    assert command(tmp_path, *options, factory=factory, data=data) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("natgrad: ") and message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factory": "a:b"}, "give --data package.module:loader"),
        ({"data": "a:b"}, "take a model of your own"),
        ({"metric": "accuracy"}, "--metric is for a model of your own"),
        ({"eval_samples": 3}, "built-in data use all"),
        ({"seconds": 3.0, "quality": True}, "in steps, not in seconds"),
        ({"seeds": 0}, "seeds must be greater than 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        CompareConfig(**options)


@pytest.mark.usefixtures("undrawn")
def test_a_loader_that_fails_on_the_way_fails_the_runs_only(tmp_path):
    with pytest.raises(OSError, match="on fire"):
        list(fails_later())
    assert command(tmp_path, "--methods=kfac", "--eval-samples=4", data="fails_later") == 0
    method = stored(tmp_path)["methods"][0]
    assert method["status"] == "failed" and "the disk is on fire" in method["message"]
    assert len(method["batch"]["step"]) == 1


# Batches.


@pytest.mark.parametrize("name", ["loader", "shuffling", "own_generator", "noisy", "pairs"])
def test_batches_are_the_same_for_the_same_seed_whatever_the_model_draws(name):
    torch.manual_seed(0)
    batches = LoaderBatches(f"{HERE}:{name}", CPU)
    assert batches.epoch == 3
    outside = torch.get_rng_state()
    first = [x for x, _ in itertools.islice(batches.training(4), 9)]
    assert torch.equal(torch.get_rng_state(), outside)
    second = []
    for x, _ in itertools.islice(batches.training(4), 9):
        torch.rand(3), np.random.rand(), random.random()
        second.append(x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = [x for x, _ in itertools.islice(batches.training(5), 9)]
    if name == "pairs":
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    else:
        assert not torch.equal(first[0], other[0])
        assert not torch.equal(first[0], first[3])
    every = samples(30)[0][:24] if name in ("loader", "shuffling") else samples()[0]
    if name != "noisy":
        for epoch in (first[:3], first[3:6], first[6:]):
            assert torch.equal(torch.cat(epoch).sort(0)[0], every.sort(0)[0])


def test_losses_are_measured_on_the_first_batches_with_so_many_samples():
    batches = LoaderBatches(f"{HERE}:pairs", CPU, samples=10)
    assert [len(x) for x, _ in batches.measured()] == [8, 8]
    assert batches.describe()["train_samples"] == 16
    assert list(batches.held_out()) == []
    for (x, _), (expected, _) in zip(batches.measured(), pairs()[:2], strict=True):
        assert torch.equal(x, expected)


def test_dtypes_and_structure_of_batches():
    batches = LoaderBatches(f"{HERE}:dicts", CPU, torch.float64)
    inputs, labels = next(batches.training(0))
    assert inputs["features"].dtype == torch.float64 and inputs["labels"] is labels
    with pytest.raises(FactoryError, match="gives no batches"):
        LoaderBatches(f"{HERE}:empty", CPU)


# Objectives.


def chosen(outputs, targets, **options):
    return choose_objective(Fixed(outputs), (torch.ones(len(outputs), 1), targets), **options)


class Fixed(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.outputs = nn.Parameter(outputs)

    def forward(self, inputs):
        return self.outputs * 1


OUTPUTS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [0.0, 1.0, 0.5], [1.0, 0.0, 0.0]])
LABELS = torch.tensor([0, 1, 1, -100])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mse", Gaussian), ("MSELoss", Gaussian), ("gaussian", Gaussian),
        ("mse_loss", Gaussian), ("bce_with_logits", Bernoulli), ("poisson", Poisson),
        ("poisson_nll", Poisson),
    ],
)  # fmt: skip
def test_losses_are_found_by_name(name, kind):
    targets = torch.ones(4, 3)
    assert isinstance(chosen(OUTPUTS, targets, loss=name).likelihood, kind)


def test_accuracy_counts_what_is_not_ignored():
    objective = chosen(OUTPUTS, LABELS)
    assert isinstance(objective.likelihood, Categorical)
    assert objective.metric(OUTPUTS, LABELS) == pytest.approx(2 / 3)
    expected = nn.functional.cross_entropy(OUTPUTS, LABELS)
    assert objective(OUTPUTS, LABELS).item() == pytest.approx(expected.item(), rel=1e-6)
    tokens, words = torch.randn(2, 4, 3), torch.tensor([[0, 1, 2, -100], [1, 1, -100, -100]])
    objective = chosen(tokens, words, loss="categorical")
    known = [tokens[i, t].argmax() == words[i, t] for i, t in (words >= 0).nonzero()]
    assert objective.metric(tokens, words) == pytest.approx(float(sum(known)) / 5)
    pixels, truth = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    share = (pixels.argmax(1) == truth).float().mean().item()
    assert chosen(pixels, truth).metric(pixels, truth) == pytest.approx(share)
    truth[:, 0] = 255
    objective = chosen(pixels, truth, loss=nn.CrossEntropyLoss(ignore_index=255))
    share = (pixels.argmax(1) == truth)[:, 1:].float().mean().item()
    assert objective.metric(pixels, truth) == pytest.approx(share)
    logits, bits = torch.tensor([[1.0], [-2.0], [3.0]]), torch.tensor([[1.0], [1.0], [0.0]])
    assert chosen(logits, bits, loss="bernoulli").metric(logits, bits) == pytest.approx(1 / 3)


def test_classes_are_last_where_labels_fit_nowhere_else():
    tokens, words = torch.randn(2, 4, 3), torch.tensor([[0, 1, 2, -100], [1, 1, -100, -100]])
    objective = chosen(tokens, words)
    expected = nn.functional.cross_entropy(tokens.flatten(0, 1), words.flatten())
    assert objective(tokens, words).item() == pytest.approx(expected.item(), rel=1e-6)
    both = torch.randn(2, 3, 3), torch.randint(0, 3, (2, 3))
    assert chosen(*both)(*both).item() == pytest.approx(nn.functional.cross_entropy(*both).item())


class LossInDict(OwnLoss):
    """Gives a plain dict."""

    def forward(self, features, labels=None):
        made = super().forward(features, labels)
        return {"loss": made.loss, "logits": made.logits}


def test_the_loss_of_a_model_may_be_an_entry_of_a_dict():
    network = LossInDict()
    network.eval()
    features, labels = samples()
    batch = {"features": features, "labels": labels}
    objective = choose_objective(network, (batch, labels))
    assert objective.function is None and isinstance(objective.likelihood, Categorical)
    outputs, loss = objective.forward(network, batch, labels)
    expected = nn.functional.cross_entropy(network.inner(features), labels)
    assert loss.item() == pytest.approx(expected.item()) and outputs.shape == (24, 3)


def test_a_model_whose_own_loss_says_nothing_of_its_likelihood_is_refused():
    network = OwnLoss()
    batch = {"features": torch.ones(2, 5), "labels": torch.ones(2, 3) / 3}
    with pytest.raises(ObjectiveError, match="computes its own loss.*give --likelihood"):
        choose_objective(network, (batch, batch["labels"]))
    objective = choose_objective(network, (batch, batch["labels"]), likelihood="categorical")
    assert objective.function is None and objective.title == "the model's own"

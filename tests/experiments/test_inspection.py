from collections import Counter

import pytest
import torch
from torch import nn

import natgrad
from natgrad.experiments import inspection
from natgrad.experiments.factories import FactoryError, find, load_model
from natgrad.experiments.inspection import (
    InspectionError,
    example_input,
    fisher_spectrum,
    inspect_model,
    shared_positions,
)

FACTORIES = """
import torch
from torch import nn

def plain():
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3, bias=False))

def convolutional():
    layers = nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(6, 10)), torch.randn(2, 3, 9, 11)

def precise():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Tanh(), nn.Linear(3, 5)).double()

def frozen():
    return precise().requires_grad_(False)

def batches():
    torch.manual_seed(1)
    return [(torch.randn(6, 4).double(), torch.randint(0, 5, (6,))) for _ in range(4)]

class Language(nn.Module):
    # Shifts its labels by itself, as causal language models do.

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)

    def forward(self, tokens, labels=None, scale=torch.ones(1)):
        logits = self.head(torch.tanh(self.table(tokens)))
        if labels is None:
            return {"logits": logits}
        kept = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return {"loss": scale.mean() * nn.functional.cross_entropy(*kept), "logits": logits}

def language():
    torch.manual_seed(0)
    return Language(), {"tokens": torch.zeros(2, 6, dtype=torch.long)}

def texts():
    torch.manual_seed(1)
    tokens = torch.randint(0, 5, (12, 6))
    return [{"tokens": one, "labels": one} for one in tokens.split(4)]

def scaled_texts():
    return [{**one, "scale": torch.full((4,), 2.0)} for one in texts()]

def real_targets():
    return [(torch.randn(6, 4).double(), torch.randn(6, 5).double())]

class Box:
    inner = staticmethod(plain)

ready = plain()
number = 3

def fails():
    raise RuntimeError("there are no\\nweights here.")

def returns_number():
    return 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    name = f"factories_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    return name


@pytest.mark.parametrize("attribute", ["plain", "Box.inner", "ready"])
def test_models_are_found(factories, attribute):
    model, criterion, example = load_model(f"{factories}:{attribute}")
    assert isinstance(model[0], nn.Linear)
    assert criterion is None
    assert example is None


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        (":absent", "no attribute 'absent'"),
        (":number", "neither a model nor a function"),
        (":fails", r"fails: there are no weights here \(factories_\w+.py, line \d+\).$"),
        (":returns_number", "returns int, but must return"),
        ("", "package.module:factory"),
        (":", "package.module:factory"),
    ],
)
def test_what_is_no_model_is_refused(factories, attribute, message):
    with pytest.raises(FactoryError, match=message):
        load_model(factories + attribute)


def test_a_module_that_does_not_import_is_refused(factories, tmp_path):
    (tmp_path / "broken_module.py").write_text("1 / 0")
    with pytest.raises(FactoryError, match="broken_module cannot be imported: division by"):
        load_model("broken_module:model")
    with pytest.raises(FactoryError, match="No module named 'absent_module'"):
        load_model("absent_module:model")
    with pytest.raises(FactoryError, match="looked for in .* and in the environment's packages"):
        load_model("absent_module.part:model")
    (tmp_path / "needy_module.py").write_text("import absent_package")
    with pytest.raises(FactoryError, match=r"'absent_package' \(needy_module.py, line 1\).$"):
        load_model("needy_module:model")


def test_positions_are_the_pixels_of_the_output(factories):
    model, _, example = load_model(f"{factories}:convolutional")
    assert shared_positions(model, example) == {"0": 4 * 5, "4": 1}
    assert model.training
    with pytest.raises(InspectionError, match="fails on the example"):
        shared_positions(model, (torch.randn(2, 3),))


def test_a_shared_layer_counts_every_use():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, inputs):
            return self.layer(self.layer(inputs))

    assert shared_positions(Twice(), (torch.randn(3, 7, 4),)) == {"layer": 14}


def test_sizes_are_those_of_the_factors(factories):
    model, *_ = load_model(f"{factories}:plain")
    summary = inspect_model(model, "kfac", "categorical", "mc", samples=10)
    assert [layer.parameters for layer in summary.layers] == [24, 12]
    assert summary.covered == summary.parameters == 36
    assert "6 x 6" in summary.layers[0].factors and "4 x 4" in summary.layers[0].factors
    assert "4 x 4" in summary.layers[1].factors and "3 x 3" in summary.layers[1].factors


def test_more_positions_cost_more(factories):
    model, _, example = load_model(f"{factories}:convolutional")
    positions = shared_positions(model, example)
    alone = inspect_model(model, "kfac", "categorical", "mc", samples=10)
    model, *_ = load_model(f"{factories}:convolutional")
    shared = inspect_model(model, "kfac", "categorical", "mc", 10, positions)
    assert shared.refresh > alone.refresh
    assert shared.backward > alone.backward


@pytest.mark.parametrize(
    ("structure", "likelihood", "fisher"),
    [("cubic", "gaussian", "mc"), ("kfac", "cauchy", "mc"), ("kfac", "gaussian", "true")],
)
def test_unknown_options_are_refused(structure, likelihood, fisher):
    with pytest.raises(InspectionError):
        inspect_model(nn.Linear(2, 2), structure, likelihood, fisher, samples=1)


def test_example_inputs():
    (example,) = example_input("3,32,16")
    assert example.shape == (2, 3, 32, 16)
    for text in ("", "3,x", "3,,4", "-1", "0"):
        with pytest.raises(InspectionError, match="such as 3,32,32"):
            example_input(text)


@pytest.mark.parametrize("structure", ["full", "kfac"])
@pytest.mark.parametrize("estimated", [False, True])
def test_spectra_are_those_of_the_matrix(factories, structure, estimated, monkeypatch):
    if estimated:
        monkeypatch.setattr(inspection, "FEW_ENOUGH", 0)
    model, *_ = load_model(f"{factories}:precise")
    batches = find(f"{factories}:batches")()
    found = fisher_spectrum(
        model, f"{factories}:batches", structure, "categorical", "exact", samples=15, number=4
    )
    assert model.training
    matrix = natgrad.fisher_matrix(model.eval(), batches[:3], structure=structure)
    values, vectors = torch.linalg.eigh(matrix.to_dense())
    assert (found.samples, found.parameters) == (18, 35)  # Whole batches, of 15 samples or more.
    assert found.trace == pytest.approx(float(values.sum()), rel=1e-9)
    for number, one in enumerate(found.top, start=1):
        assert one.value == pytest.approx(float(values[-number]), rel=1e-9)
        first = float(vectors[:15, -number].square().sum())
        assert one.layer == ("0" if first > 0.5 else "3")
        assert one.share == pytest.approx(max(first, 1 - first), rel=1e-6)
    positive = values[values > values[-1] * torch.finfo(torch.float64).eps * 35]
    exponents = positive.log10().floor().int().tolist()
    seen = {k: count for k, count in found.decades.items() if count > 0}
    if not estimated:
        assert seen == pytest.approx(Counter(exponents))
        for damping, dimension in found.effective_dimension.items():
            expected = float((values / (values + damping)).sum())
            assert dimension == pytest.approx(expected, rel=1e-6)
    assert set(seen) == set(exponents)
    assert sum(found.decades.values()) + found.rest == pytest.approx(35, rel=1e-9)
    dimensions = list(found.effective_dimension.values())
    assert dimensions == sorted(dimensions) and 0 < dimensions[0] < dimensions[-1] < 35


def test_spectra_that_cannot_be_had_are_refused(factories):
    model, *_ = load_model(f"{factories}:precise")
    options = {"samples": 10, "structure": "full", "likelihood": "categorical", "fisher": "exact"}
    with pytest.raises(FactoryError, match="returns int|gives int"):
        fisher_spectrum(model, f"{factories}:number", **options)
    wrong, *_ = load_model(f"{factories}:plain")
    with pytest.raises(InspectionError):
        fisher_spectrum(wrong, f"{factories}:batches", **options)
    with pytest.raises(InspectionError):
        fisher_spectrum(load_model(f"{factories}:frozen").model, f"{factories}:batches", **options)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_labels_that_a_language_model_shifts_are_shifted(factories, fisher):
    model, _, example = load_model(f"{factories}:language")
    assert shared_positions(model, example) == {"table": 6, "head": 6}
    pairs = [
        (one["tokens"], torch.cat([one["labels"][:, 1:], torch.full((4, 1), -100)], 1))
        for one in find(f"{factories}:texts")()
    ]
    expected = natgrad.fisher_matrix(model, pairs, "categorical", "full", fisher).trace()
    arguments = ("full", "categorical", fisher)
    found = fisher_spectrum(model, f"{factories}:texts", *arguments, samples=12)
    assert found.trace == pytest.approx(float(expected), rel=1e-5)


def test_a_loss_of_a_model_that_is_not_that_of_its_labels_is_refused(factories):
    model, *_ = load_model(f"{factories}:language")
    with pytest.raises(InspectionError, match="give pairs of inputs and targets"):
        fisher_spectrum(
            model, f"{factories}:scaled_texts", "full", "categorical", "empirical", samples=12
        )


def test_real_targets_are_no_class_probabilities(factories):
    model, *_ = load_model(f"{factories}:precise")
    with pytest.raises(InspectionError, match="take likelihood='gaussian'"):
        fisher_spectrum(
            model, f"{factories}:real_targets", "full", "categorical", "exact", samples=6
        )

import math

import pytest
import torch
from torch import nn

from natgrad.experiments.batches import TensorBatches
from natgrad.experiments.data import Dataset
from natgrad.experiments.memory import PeakMemory
from natgrad.experiments.models import build_model
from natgrad.experiments.objectives import OBJECTIVES, accuracy
from natgrad.experiments.training import Schedule, evaluate, train


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(30, 1, 3, 3, generator=generator)
    labels = (inputs.sum((1, 2, 3)) > 0).long()
    return Dataset("toy", inputs[:20], labels[:20], inputs[20:], labels[20:], 2)


def whole(data, loss="mse"):
    """Full batches."""
    return TensorBatches(data, OBJECTIVES[loss].encode, None)


def linear_model(lr):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2))
    return model, torch.optim.SGD(model.parameters(), lr=lr)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_full_batch_curve_is_the_loss_before_each_step(data, loss):
    objective = OBJECTIVES[loss]
    model, optimizer = linear_model(0.1)
    run = train(model, optimizer, objective, whole(data, loss), Schedule(4, frozenset({0, 2})))
    assert run.status == "completed"
    assert run.train.step == [0, 1, 2, 3, 4]
    assert run.test.step == [0, 2, 4]
    assert run.batch is None

    model, _ = linear_model(0.1)
    targets = objective.encode(data.train_labels, 2)
    for step in range(5):
        value = objective(model(data.train_inputs), targets)
        assert run.train.loss[step] == pytest.approx(value.item(), rel=1e-5)
        gradients = torch.autograd.grad(value, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient


def test_seconds_and_steps_never_decrease(data):
    model, optimizer = linear_model(0.1)
    run = train(model, optimizer, OBJECTIVES["mse"], whole(data), Schedule(9, frozenset({0, 3})))
    assert run.train.seconds == sorted(run.train.seconds)
    assert run.train.seconds[0] == 0.0 < run.train.seconds[1]
    assert run.train.seconds[-1] == run.seconds
    assert 0 < run.milliseconds_per_step < 1000 * run.seconds


def test_mini_batches_cover_an_epoch_and_keep_the_last_smaller_one(data):
    seen = []

    class Recorder(nn.Linear):
        def forward(self, inputs):
            if self.training:
                seen.append(inputs.flatten(1))
            return super().forward(inputs.flatten(1))

    model = Recorder(9, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = Schedule(6, evaluations=frozenset({0, 3}), seed=1)
    batches = TensorBatches(data, OBJECTIVES["mse"].encode, batch_size=8)
    run = train(model, optimizer, OBJECTIVES["mse"], batches, schedule)
    assert [len(batch) for batch in seen] == [8, 8, 4, 8, 8, 4]
    every = data.train_inputs.flatten(1)
    for epoch in (seen[:3], seen[3:]):
        epoch = torch.cat(epoch)
        assert torch.equal(epoch[epoch[:, 0].argsort()], every[every[:, 0].argsort()])
    assert not torch.equal(seen[0], seen[3])
    assert run.batch.step == [0, 1, 2, 3, 4, 5]
    assert run.train.step == [0, 3, 6]


def test_divergence_ends_the_run(data):
    model, optimizer = linear_model(1e9)
    run = train(model, optimizer, OBJECTIVES["mse"], whole(data), Schedule(50, frozenset({0})))
    assert run.status == "diverged"
    assert len(run.train.step) < 10
    assert math.isnan(run.final_loss)


def test_a_failing_optimizer_is_recorded(data):
    model, optimizer = linear_model(0.1)

    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("the matrix is singular")

    optimizer.register_step_pre_hook(fail)
    run = train(model, optimizer, OBJECTIVES["mse"], whole(data), Schedule(5))
    assert run.status == "failed"
    assert "the matrix is singular" in run.message


def test_interrupt_keeps_what_is_there(data):
    def stop(step, loss, accuracy):
        if step == 3:
            raise KeyboardInterrupt

    model, optimizer = linear_model(0.1)
    schedule = Schedule(50, frozenset({0}))
    run = train(model, optimizer, OBJECTIVES["mse"], whole(data), schedule, stop)
    assert run.status == "interrupted"
    assert run.train.step == [0, 1, 2, 3]
    assert run.test.step == [0, 3]


def test_evaluation_in_chunks_equals_evaluation_at_once(data):
    model, _ = linear_model(0.1)
    model.append(nn.Dropout(0.5))
    objective = OBJECTIVES["cross_entropy"]
    chunks = zip(data.train_inputs.split(7), data.train_labels.split(7), strict=True)
    model[-1].eval()
    loss, correct = evaluate(model, objective, chunks)
    assert model.training and not model[-1].training
    outputs = model.eval()(data.train_inputs)
    assert loss == pytest.approx(objective(outputs, data.train_labels).item(), rel=1e-6)
    assert correct == pytest.approx(accuracy(outputs, data.train_labels))


def test_mlp_starts_with_activations_of_mean_square_one():
    model = build_model("mlp", (1, 8, 8), 10, width=2000, depth=4, seed=0)
    inputs = torch.randn(50, 1, 8, 8)
    inputs *= 8 / inputs.flatten(1).norm(dim=1)[:, None, None, None]
    with torch.no_grad():
        for layer in model:
            inputs = layer(inputs)
            if isinstance(layer, nn.ReLU):
                assert inputs.square().mean().item() == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("depth", [2, 3, 5])
def test_models_have_the_depth_asked_for_and_depend_on_the_seed_alone(name, depth):
    state = torch.random.get_rng_state()
    model = build_model(name, (3, 32, 32), 7, width=6, depth=depth, seed=5)
    assert torch.equal(state, torch.random.get_rng_state())
    weights = [p for p in model.parameters() if p.dim() > 1]
    assert len(weights) == depth
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    torch.manual_seed(123)
    again = build_model(name, (3, 32, 32), 7, width=6, depth=depth, seed=5)
    other = build_model(name, (3, 32, 32), 7, width=6, depth=depth, seed=6)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert not torch.equal(weights[0], next(other.parameters()))


def test_unknown_models_and_sizes_are_refused():
    for name, width, depth in (("vit", 4, 3), ("mlp", 0, 3), ("mlp", 4, 0), ("cnn", 4, 1)):
        with pytest.raises(ValueError, match="model|width|depth"):
            build_model(name, (1, 8, 8), 10, width=width, depth=depth, seed=0)


def peak_of_ones(elements, times):
    """The least of three peaks: threads that other tests left behind hold memory, too, at times."""
    peaks = []
    for _ in range(3):
        with PeakMemory(torch.device("cpu")) as peak:
            for _ in range(times):
                torch.ones(elements)
        if peak.bytes is None:
            pytest.skip("this system does not tell")
        peaks.append(peak.bytes)
    return min(peaks)


def test_peak_memory_counts_what_was_held_at_once():
    assert peak_of_ones(30_000_000, times=1) == pytest.approx(120e6, rel=0.1)
    assert peak_of_ones(20_000_000, times=5) == pytest.approx(80e6, rel=0.1)

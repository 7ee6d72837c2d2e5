"""A plain Accelerate loop."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from tests.ecosystem.loops import (
    REPRESENTATIVES,
    assert_curvature_everywhere,
    batches,
    images,
    make,
    network,
    train,
)
from tests.state import flat


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """Where these tests run, and not by every process."""
    global accelerate
    accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _fresh_state():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def run(model, optimizer, scheduler, data, *, accumulate=1, clip=None, **options):
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, **options
    )
    loader = DataLoader(data, batch_size=None)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return accelerator


@pytest.mark.parametrize("name", [n for n in REPRESENTATIVES if n != "egn"])
@pytest.mark.parametrize("way", ["plain", "accumulation", "clipping"])
def test_accelerate_is_the_plain_loop(name, way):
    data = batches(8)
    accumulate = 2 if way == "accumulation" else 1
    clip = 0.5 if way == "clipping" else None
    models = [network() for _ in range(2)]
    optimizers = [make(name, model) for model in models]
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5) for o in optimizers]
    train(models[0], optimizers[0], data, accumulate=accumulate, clip=clip, scheduler=schedulers[0])
    run(models[1], optimizers[1], schedulers[1], data, accumulate=accumulate, clip=clip)
    assert torch.equal(flat(models[0]), flat(models[1]))
    assert_curvature_everywhere(optimizers[1])


def test_bfloat16_mixed_precision():
    model = network(dtype=torch.float32)
    x, y = images(32, dtype=torch.float32)
    first = float(functional.cross_entropy(model(x), y).detach())
    optimizer = make("kfac", model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    run(model, optimizer, scheduler, [(x, y)] * 30, mixed_precision="bf16")
    assert float(functional.cross_entropy(model(x).float(), y).detach()) < 0.5 * first
    assert_curvature_everywhere(optimizer)


class WithLoss(torch.nn.Module):
    """Returns its loss beside its output, as models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        )

    def forward(self, x, y):
        out = self.layers(x)
        return {"loss": functional.cross_entropy(out.float(), y), "logits": out}


def test_a_loss_inside_of_an_output_that_is_cast_afterwards_is_seen():
    """Mixed precision of Accelerate casts what the model returns."""
    torch.manual_seed(1)
    x, y = torch.randn(16, 6), torch.arange(16) % 3
    models = [WithLoss() for _ in range(2)]
    optimizers = [make("kfac", model) for model in models]
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = models[0](x, y)["loss"]
        loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer = accelerator.prepare(models[1], optimizers[1])
    for _ in range(4):
        accelerator.backward(model(x, y)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    assert_curvature_everywhere(optimizers[1])
    assert torch.equal(flat(models[0]), flat(models[1]))


@pytest.mark.parametrize("name", ["kfac", "exact", "thermodynamic", "padam"])
def test_save_state_and_load_state(name, tmp_path):
    data = batches(6)
    straight = network()
    optimizer = make(name, straight)
    train(straight, optimizer, data)

    model = network()
    optimizer = make(name, model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    run(model, optimizer, schedule, data[:3]).save_state(str(tmp_path))
    other = network(seed=5)
    optimizer = make(name, other, seed=9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    accelerator = accelerate.Accelerator(cpu=True)
    other, optimizer, schedule = accelerator.prepare(other, optimizer, schedule)
    accelerator.load_state(str(tmp_path))
    train(other, optimizer, data[3:])
    assert torch.equal(flat(straight), flat(other))

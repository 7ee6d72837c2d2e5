"""Lightning trains exactly as the plain loop does."""

from __future__ import annotations

import copy
import gc
import importlib
from types import ModuleType

import pytest
import torch

from tests.ecosystem.loops import (
    assert_curvature_everywhere,
    batches,
    cross_entropy,
    make,
    network,
    train,
)
from tests.state import flat


@pytest.fixture(scope="module")
def modules() -> ModuleType:
    """Loaded where a test needs them, and not by every process."""
    pytest.importorskip("lightning")
    found = importlib.import_module("tests.ecosystem.lightning_modules")
    gc.freeze()
    return found


WAYS = ("plain", "accumulation", "clipping", "scheduler", "everything", "by hand")


@pytest.mark.parametrize(
    ("name", "way"),
    # One optimizer meets every way, the others those that hold all ways together.
    [("kfac", way) for way in WAYS]
    + [(n, way) for n in ("exact", "fngd", "padam") for way in ("everything", "by hand")],
)
def test_lightning_is_the_plain_loop(name, way, modules):
    plain, wrapped = network(), network()
    data = batches(8)
    accumulate = 2 if way in ("accumulation", "everything") else 1
    clip = 0.5 if way in ("clipping", "everything") else None
    schedule = way in ("scheduler", "everything")
    optimizer = make(name, plain)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5) if schedule else None
    train(plain, optimizer, data, accumulate=accumulate, clip=clip, scheduler=scheduler)

    module = (modules.ByHand if way == "by hand" else modules.Classifier)(wrapped, name, schedule)
    trainer = modules.fit(module, data, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    assert torch.equal(flat(plain), flat(wrapped))
    assert not torch.equal(flat(plain), flat(network()))
    inner = trainer.optimizers[0]
    assert name == "padam" or inner.preconditioner.observer.steps == len(data) // accumulate
    assert_curvature_everywhere(inner)


def test_lightning_with_a_line_search_is_the_plain_loop(modules):
    plain, wrapped = network(), network()
    data = batches(8)
    train(plain, make("egn", plain), data)
    trainer = modules.fit(modules.LineSearch(wrapped, "egn"), data)
    assert torch.equal(flat(plain), flat(wrapped))
    assert trainer.optimizers[0].preconditioner.observer.steps == len(data)


# Of every kind of state: averages, inverse factors, rows, noise, coefficients, no curvature.
@pytest.mark.parametrize("name", ["kfac", "singd", "exact", "thermodynamic", "fngd", "padam"])
def test_resuming_in_the_middle_of_an_epoch(name, tmp_path, modules):
    data = batches(7)
    whole, parted = network(), network()
    modules.fit(modules.Classifier(whole, name, True), data, max_epochs=2)

    saver = modules.lightning.pytorch.callbacks.ModelCheckpoint(
        dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1
    )
    with pytest.raises(modules.Stop):
        modules.fit(
            modules.Crashing(parted, name, True), data, max_epochs=2,
            enable_checkpointing=True, callbacks=[saver],
        )  # fmt: skip
    last = sorted(tmp_path.glob("*.ckpt"), key=lambda p: p.stat().st_mtime)[-1]
    assert torch.load(last, weights_only=True)["global_step"] == 4
    fresh = network(seed=3)
    modules.fit(modules.Classifier(fresh, name, True), data, max_epochs=2, checkpoint=last)
    assert torch.equal(flat(fresh), flat(whole))


def test_loss_falls_with_bfloat16_precision(modules):
    net = network(dtype=torch.float32)
    x, y = batches(1, 32, torch.float32)[0]
    first = float(cross_entropy(copy.deepcopy(net), (x, y)).detach())
    modules.fit(modules.Classifier(net), [(x, y)] * 30, precision="bf16-mixed")
    assert float(cross_entropy(net, (x, y)).detach()) < 0.5 * first
    assert all(p.dtype == torch.float32 for p in net.parameters())

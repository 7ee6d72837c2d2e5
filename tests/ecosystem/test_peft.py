"""Low-rank adapters: only they are preconditioned, as dense Kronecker factors say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from tests import dense
from tests.ecosystem.loops import assert_curvature_everywhere
from tests.methods import make_optimizer, measures
from tests.state import flat

DAMPING, LR = 0.05, 0.3


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """Where these tests run, and not by every process: loading takes a second."""
    global peft
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def adapted(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["first", "second"], lora_dropout=dropout
    )
    model = peft.get_peft_model(Net(), config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:  # These start at zero, where A has no gradient.
                p.copy_(torch.randn_like(p))
    return model


def data(samples: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (samples,), generator=generator)


def dense_steps(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return every adapter's K-FAC direction from plain hooks, in the exact Fisher type."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad:

            def keep(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                inputs[name], outputs[name] = args[0].detach(), output

            handles.append(module.register_forward_hook(keep))
    z = model(x)
    for handle in handles:
        handle.remove()
    p = z.detach().softmax(1)
    names = list(outputs)
    factors = {name: torch.zeros(outputs[name].shape[1:] * 2).double() for name in names}
    for column in range(3):
        root = p.sqrt()[:, column, None] * (torch.eye(3).double()[column] - p)
        # diag(√p) − p √pᵀ, column c: √p_c (e_c − p)
        found = torch.autograd.grad(z, [outputs[n] for n in names], root, retain_graph=True)
        for name, delta in zip(names, found, strict=True):
            factors[name] += delta.T @ delta / len(x)
    loss = functional.cross_entropy(z, y)
    result = {}
    for name in names:
        weight = model.get_submodule(name).weight
        (gradient,) = torch.autograd.grad(loss, [weight], retain_graph=True)
        a, b = inputs[name].T @ inputs[name] / len(x), factors[name]
        pi = ((a.trace() / len(a)) / (b.trace() / len(b))).sqrt()
        left = b + DAMPING**0.5 / pi * torch.eye(len(b)).double()
        right = a + DAMPING**0.5 * pi * torch.eye(len(a)).double()
        result[name + ".weight"] = torch.linalg.solve(left, gradient) @ torch.linalg.inv(right)
    return result


def options() -> dict[str, Any]:
    return {
        "lr": LR, "damping": DAMPING, "fisher": "exact", "kl_clip": None, "momentum": 0.0,
        "factors": 1, "inverses": 1, "decay": 0.0,
    }  # fmt: skip


def test_steps_of_adapters_are_those_of_dense_factors():
    model = adapted()
    x, y = data()
    optimizer = make_optimizer(natgrad.KFAC, model, **options())
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n for n in trainable) and len(trainable) == 4
    assert {n for g in optimizer.param_groups for n in [id(p) for p in g["params"]]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    for _ in range(3):
        twin = copy.deepcopy(model)
        expected = dense_steps(twin, x, y)
        assert set(expected) == trainable
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            moved = before[name] - parameter.detach()
            if name in expected:
                dense.assert_same(moved, LR * expected[name], 1e-9)
            else:
                assert not moved.any(), name
    assert_curvature_everywhere(optimizer)


@pytest.mark.parametrize("optimizer_type", [natgrad.KFAC, natgrad.EKFAC, natgrad.DiagonalNGD])
def test_adapters_of_a_language_model(optimizer_type):
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=0, eos_token_id=0,
        initializer_range=0.3,  # Frozen weights so large that adapters can change the logits.
    )  # fmt: skip
    lora = peft.LoraConfig(
        r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1
    )
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    ids = (torch.arange(13).unsqueeze(1) + 2 * torch.arange(6)) % 13  # Every token tells the next.
    optimizer = optimizer_type(model, **({} if measures(optimizer_type) else {"lr": 0.02}))
    assert not optimizer.preconditioner.capture.uncovered
    assert all("lora_" in name for name in optimizer.preconditioner.capture.blocks)
    first = float(model.eval()(input_ids=ids, labels=ids).loss.detach())
    model.train()
    for _ in range(20):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    # Gradient descent at this rate only gets to about 0.88.
    assert float(model.eval()(input_ids=ids, labels=ids).loss.detach()) < 0.75 * first
    assert_curvature_everywhere(optimizer)
    for name, parameter in model.named_parameters():
        assert name not in frozen or torch.equal(frozen[name], parameter)


def test_adapters_can_be_merged_saved_and_loaded(tmp_path):
    model = adapted()
    x, y = data()
    optimizer = make_optimizer(natgrad.KFAC, model, **options())
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    expected = model(x).detach()
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Net().double(), tmp_path).double()
    torch.testing.assert_close(loaded(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)
    assert flat(model).isfinite().all()

"""Mixtures of experts of Hugging Face Transformers, whose experts are stacked in one parameter."""

from __future__ import annotations

import pytest
import torch

from natgrad import Capture
from natgrad.jacobians import StackedJacobian

SIZES = {
    "vocab_size": 20,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 3,
}


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_rows_of_stacked_experts(implementation):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("transformers.integrations.moe")
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES))
    model.set_experts_implementation(implementation)
    tokens = torch.randint(0, 20, (4, 6))
    vectors = torch.randn(2, 4, 6, 20)
    experts = [n for n, _ in model.named_parameters() if "experts" in n]
    assert len(experts) == 2
    with Capture(model, lambda out: out.logits) as capture:
        for _ in range(2):  # With the checks, and after them.
            out = model(input_ids=tokens).logits
            rows = capture.pull_back(out, vectors)
        assert not capture.sources.direct
        for name in experts:
            assert isinstance(rows[name], StackedJacobian)
    parameters = dict(model.named_parameters())
    for k, vector in enumerate(vectors):
        for n in range(4):
            wanted = torch.autograd.grad(
                (out[n] * vector[n]).sum(), [parameters[e] for e in experts], retain_graph=True
            )
            for name, gradient in zip(experts, wanted, strict=True):
                own = rows[name].per_sample_gradients(n, n + 1)[0, k]
                torch.testing.assert_close(own, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_experts_with_biases():
    """Their names differ in ``_bias`` alone, ``up_proj`` and ``up_proj_bias``."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("transformers.models.gpt_oss")
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**SIZES, head_dim=16, num_experts_per_tok=2)
    model = transformers.GptOssForCausalLM(config)
    with Capture(model) as capture:
        held = [n for block in capture.blocks.values() for n in block.layout.names]
        assert sorted(held) == sorted(n for n, _ in model.named_parameters())
        out = model(input_ids=torch.randint(0, 20, (4, 6))).logits
        vector = torch.randn(out.shape)
        rows = capture.pull_back(out, vector[None])
        experts = {n: p for n, p in model.named_parameters() if "experts" in n}
        assert len(experts) == 4 and set(experts) <= set(rows)
        assert not set(experts) & set(capture.sources.direct)
    for n in range(4):
        wanted = torch.autograd.grad(
            (out[n] * vector[n]).sum(), list(experts.values()), retain_graph=True
        )
        for name, gradient in zip(experts, wanted, strict=True):
            own = rows[name].per_sample_gradients(n, n + 1)[0, 0].view_as(gradient)
            torch.testing.assert_close(own, gradient, rtol=1e-3, atol=1e-6)

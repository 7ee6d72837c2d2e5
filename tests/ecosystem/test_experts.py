"""Mixtures of experts of Hugging Face Transformers, whose experts are stacked in one parameter."""

from __future__ import annotations

import pytest
import torch

from natgrad import Capture
from natgrad.jacobians import StackedJacobian


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_rows_of_stacked_experts(implementation):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("transformers.integrations.moe")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    model = transformers.MixtralForCausalLM(config)
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

"""Linear layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from natgrad.capture.kinds import (
    BlockRecord,
    LayerCall,
    LayerKind,
    fold_gradients,
    fold_inputs,
    parameter_shapes,
    register_kind,
    register_named_kind,
)
from natgrad.distributed.shards import features_gathered, is_sharded, whole
from natgrad.jacobians import LayerJacobian
from natgrad.layouts import BlockLayout

__all__ = ["LinearKind", "TransposedLinearKind"]


class LinearKind(LayerKind):
    """``y = s (x Wᵀ) + s_b b`` with constants that are 1 for :class:`torch.nn.Linear`."""

    def sample_dims(self, dims: int) -> range:
        """Return all but the last: ``(..., d_out)``."""
        return range(dims - 1)

    def scales(self, module: nn.Module) -> tuple[float, float]:
        """Return ``(s, s_b)``."""
        return 1.0, 1.0

    def jacobian(self, block: BlockRecord) -> LayerJacobian:
        """Form rows from the layer's inputs and its outputs' gradients."""
        weight_scale, bias_scale = self.scales(block.calls[0][0].module)
        rows: list[tuple[Tensor, Tensor]] = []
        for call, delta in block.single_outputs():
            parameter = next(call.module.parameters(recurse=False), None)
            inputs = whole(call.inputs[0])  # Both may be in shards, in tensor parallelism.
            delta = features_gathered(delta, block.layout.d_out, parameter)
            d = fold_gradients(delta, block.samples, block.layout.d_out)
            if block.layout.d_in:
                a = fold_inputs(inputs, block.samples, inputs.shape[-1])
            else:  # A lone bias; a layer without inputs has nothing to fold.
                a = inputs.new_zeros(block.samples, d.shape[2], 0)
            if weight_scale != 1.0:
                a = a * weight_scale
            rows.append((a.unsqueeze(2), d.unsqueeze(3)))
        return block.linear(rows, bias_scale)

    def observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> list[LayerCall]:
        """Record a call, of which tensor parallelism may have left features in shards, no more."""
        calls = super().observe(module, args, kwargs, output)
        inputs: Tensor = calls[0].inputs[0]
        if is_sharded(inputs) and inputs.shape[:-1] != output.shape[:-1]:
            raise ValueError(
                f"outputs {tuple(output.shape)} of {module}, with inputs {tuple(inputs.shape)}, "
                "are spread over processes by another dimension than that of features, and natgrad "
                "needs all of it in each: leave output_layouts of the layer as they are by default"
            )
        return calls


class TransposedLinearKind(LinearKind):
    """``y = x W + b``, the weight stored as ``(in, out)``: the "Conv1D" of GPT-2."""

    def layout(
        self, module: nn.Module, names: tuple[str, ...], qualified: tuple[str, ...]
    ) -> BlockLayout:
        """Return one group of ``out_features × in_features``, stored transposed."""
        shapes = parameter_shapes(module, names)
        has_weight = "weight" in names
        d_in = shapes[0][0] if has_weight else 0
        d_out = shapes[0][-1]
        return BlockLayout(
            qualified, shapes, 1, d_out, d_in, has_weight, "bias" in names, has_weight
        )


register_kind(LinearKind(), nn.Linear)
register_named_kind(TransposedLinearKind(), "transformers.pytorch_utils", "Conv1D")

"""Linear layers."""

from __future__ import annotations

from torch import Tensor, nn

from natgrad.capture.kinds import (
    BlockRecord,
    LayerKind,
    fold_gradients,
    fold_inputs,
    parameter_shapes,
    register_kind,
    register_named_kind,
)
from natgrad.jacobians import LayerJacobian
from natgrad.layouts import BlockLayout


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
            inputs: Tensor = call.inputs[0]
            d = fold_gradients(delta, block.samples, block.layout.d_out)
            if block.layout.d_in:
                a = fold_inputs(inputs, block.samples, inputs.shape[-1])
            else:  # A lone bias; a layer without inputs has nothing to fold.
                a = inputs.new_zeros(block.samples, d.shape[2], 0)
            if weight_scale != 1.0:
                a = a * weight_scale
            rows.append((a.unsqueeze(2), d.unsqueeze(3)))
        return block.linear(rows, bias_scale)


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

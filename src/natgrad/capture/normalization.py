"""Normalisation layers: per channel, a scale and a shift of the normalised input.

Each channel is a linear map of one input, ``y_j = γ_j x̂_j + β_j``, so a layer is ``d`` groups of
``1 × 1`` matrices with a bias. BatchNorm in training mode couples samples through its statistics;
natgrad treats these as constants of the batch, which makes per-sample rows well defined. The
pull-back through such a layer is replaced accordingly (see :func:`fix_statistics`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from natgrad.capture.hooks import holds_statistics
from natgrad.capture.kinds import (
    BlockRecord,
    LayerCall,
    LayerKind,
    fold_gradients,
    fold_inputs,
    parameter_shapes,
    register_kind,
)
from natgrad.jacobians import LayerJacobian, LinearJacobian
from natgrad.layouts import BlockLayout

__all__ = ["NormalizationKind", "batch_norms", "batch_statistics", "fix_statistics"]


class NormalizationKind(LayerKind):
    """Layers that normalise and then scale and shift each channel.

    Args:
        normalize: ``normalize(call, inputs)`` returns the normalised input without the affine.
        channels_first: Channels are dimension 1 (batch and group norm), else the last ones.
        by_rows: Every row ``(..., channels)`` is normalised for itself, so that ``normalize`` may
            be given just the positions that are needed.
    """

    def __init__(
        self,
        normalize: Callable[[LayerCall, Tensor], Tensor],
        channels_first: bool,
        by_rows: bool,
    ) -> None:
        self.normalize = normalize
        self.channels_first = channels_first
        self.by_rows = by_rows

    def sample_dims(self, dims: int) -> range:
        """Return the first where channels are the second, else all but the last."""
        return range(1) if self.channels_first else range(dims - 1)

    def observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> list[LayerCall]:
        """Keep the batch's statistics beside the input."""
        calls = super().observe(module, args, kwargs, output)
        if batch_norms(module):
            layer, call = cast(nn.BatchNorm2d, module), calls[0]
            call.options["statistics"] = batch_statistics(layer, call.inputs[0], call.outputs[0])
        return calls

    def layout(
        self, module: nn.Module, names: tuple[str, ...], qualified: tuple[str, ...]
    ) -> BlockLayout:
        """Return one ``1 × 1`` matrix per channel."""
        shapes = parameter_shapes(module, names)
        channels = int(torch.Size(shapes[0]).numel())
        has_weight = "weight" in names
        return BlockLayout(
            qualified, shapes, channels, 1, int(has_weight), has_weight, "bias" in names
        )

    def jacobian(self, block: BlockRecord) -> LayerJacobian:
        """Form rows from output gradients and, when first needed, normalised inputs."""
        layout, samples = block.layout, block.samples
        calls, gradients = zip(*block.single_outputs(), strict=True)
        deltas = []
        for gradient in gradients:
            rows = gradient.movedim(2, -1) if self.channels_first else gradient
            deltas.append(fold_gradients(rows, samples, layout.groups).unsqueeze(-1))
        delta = deltas[0] if len(deltas) == 1 else torch.cat(deltas, dim=2)
        make = partial(self._inputs, calls, layout, samples)
        return LinearJacobian(layout, make, delta, skip_silent=block.skip_silent)

    def _inputs(
        self,
        calls: Sequence[LayerCall],
        layout: BlockLayout,
        samples: int,
        chosen: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor:
        """Return normalised inputs ``(N, T, channels, 1)``, of all samples or some."""
        joined = []
        for call in calls:
            values = call.inputs[0]
            if not self.by_rows:
                values = self.normalize(call, values)
            if self.channels_first:
                values = values.movedim(1, -1)
            values = fold_inputs(values, samples, layout.groups)
            values = values if chosen is None else values[chosen]
            if positions is not None and len(calls) == 1:
                values = values[:, positions]
            joined.append(self.normalize(call, values) if self.by_rows else values)
        rows = joined[0]
        if len(joined) > 1:
            rows = torch.cat(joined, dim=1)
            rows = rows if positions is None else rows[:, positions]
        return rows.unsqueeze(-1)[..., : layout.d_in]


def batch_norms(module: nn.Module) -> bool:
    """Return whether a module normalises with statistics of the present batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (
        module.training or module.running_mean is None
    )


def fix_statistics(module: nn.Module, inputs: Tensor, output: Tensor) -> None:
    """Make natgrad's pull-back through a batch norm treat the batch statistics as constants.

    The batch norm is in training mode; the user's own backward pass is left as it is.
    """
    node = output.grad_fn
    if node is None or "BatchNorm" not in type(node).__name__:
        return
    layer = cast(nn.BatchNorm2d, module)
    _, scale = batch_statistics(layer, inputs.detach(), output)
    if layer.weight is not None:
        scale = scale * layer.weight.detach()
    scale = scale.to(inputs.dtype).view(1, -1, *([1] * (inputs.dim() - 2)))

    def replace(
        grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...] | None:
        if not holds_statistics() or grad_inputs[0] is None or grad_outputs[0] is None:
            return None
        return (grad_outputs[0] * scale, *grad_inputs[1:])

    node.register_hook(cast(Any, replace))


def batch_statistics(
    layer: nn.BatchNorm2d, inputs: Tensor, output: Tensor
) -> tuple[Tensor, Tensor]:
    """Return mean and inverse standard deviation of a batch, ``(channels,)`` each.

    PyTorch keeps them for the backward pass; else they are computed anew.
    """
    node = output.grad_fn
    mean = getattr(node, "_saved_result1", None)
    inverse_std = getattr(node, "_saved_result2", None)
    if mean is not None and inverse_std is not None and inverse_std.shape == (inputs.shape[1],):
        return mean.detach(), inverse_std.detach()
    values = inputs.float() if inputs.dtype in (torch.float16, torch.bfloat16) else inputs
    dims = [0, *range(2, inputs.dim())]
    variance, mean = torch.var_mean(values, dims, unbiased=False)
    return mean, (variance + layer.eps).rsqrt()


def _normalize_batch(call: LayerCall, rows: Tensor) -> Tensor:
    module = cast(nn.BatchNorm2d, call.module)
    if "statistics" in call.options:
        mean, inverse_std = call.options["statistics"]
    else:
        mean = cast(Tensor, module.running_mean)
        inverse_std = (cast(Tensor, module.running_var) + module.eps).rsqrt()
    normalised: Tensor = (rows - mean) * inverse_std
    return normalised


def _normalize_layer(call: LayerCall, rows: Tensor) -> Tensor:
    return functional.layer_norm(rows, rows.shape[-1:], eps=cast(nn.LayerNorm, call.module).eps)


def _normalize_rms(call: LayerCall, rows: Tensor) -> Tensor:
    return functional.rms_norm(rows, rows.shape[-1:], eps=cast(nn.RMSNorm, call.module).eps)


def _normalize_group(call: LayerCall, inputs: Tensor) -> Tensor:
    module = cast(nn.GroupNorm, call.module)
    return functional.group_norm(inputs, module.num_groups, eps=module.eps)


def _normalize_instance(call: LayerCall, inputs: Tensor) -> Tensor:
    module = cast(nn.InstanceNorm2d, call.module)
    own = module.training or not module.track_running_stats
    return functional.instance_norm(
        inputs,
        module.running_mean,
        module.running_var,
        use_input_stats=own,
        momentum=0.0,
        eps=module.eps,
    )


register_kind(
    NormalizationKind(_normalize_batch, channels_first=True, by_rows=True),
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
)
register_kind(NormalizationKind(_normalize_layer, channels_first=False, by_rows=True), nn.LayerNorm)
register_kind(NormalizationKind(_normalize_rms, channels_first=False, by_rows=True), nn.RMSNorm)
register_kind(NormalizationKind(_normalize_group, channels_first=True, by_rows=False), nn.GroupNorm)
register_kind(
    NormalizationKind(_normalize_instance, channels_first=True, by_rows=False),
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)

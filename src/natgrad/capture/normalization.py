"""Normalisation layers: per channel, a scale and a shift of the normalised input.

Each channel is a linear map of one input, ``y_j = γ_j x̂_j + β_j``, so a layer is ``d`` groups of
``1 × 1`` matrices with a bias. BatchNorm in training mode couples samples through its statistics;
natgrad treats these as constants of the batch, which makes per-sample rows well defined. The
pull-back through such a layer is replaced accordingly (see :func:`fix_statistics`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from natgrad.capture.hooks import is_pulling_back
from natgrad.capture.kinds import (
    LayerCall,
    LayerKind,
    concatenate_positions,
    fold_gradients,
    fold_inputs,
    register_kind,
)
from natgrad.jacobians import LayerJacobian, LinearJacobian
from natgrad.layouts import BlockLayout

__all__ = ["NormalizationKind", "batch_norms", "fix_statistics"]


class NormalizationKind(LayerKind):
    """Layers that normalise and then scale and shift each channel.

    Args:
        normalize: ``normalize(module, inputs)`` returns the normalised input without the affine.
        channels_first: Channels are dimension 1 (batch and group norm), else the last ones.
    """

    def __init__(self, normalize: Callable[[Any, Tensor], Tensor], channels_first: bool) -> None:
        self.normalize = normalize
        self.channels_first = channels_first

    def layout(
        self, module: nn.Module, names: tuple[str, ...], qualified: tuple[str, ...]
    ) -> BlockLayout:
        """Return one ``1 × 1`` matrix per channel."""
        shapes = tuple(tuple(module.get_parameter(name).shape) for name in names)
        channels = int(torch.Size(shapes[0]).numel())
        has_weight = "weight" in names
        return BlockLayout(
            qualified, shapes, channels, 1, int(has_weight), has_weight, "bias" in names
        )

    def jacobian(
        self,
        layout: BlockLayout,
        names: tuple[str, ...],
        calls: list[tuple[LayerCall, list[Tensor | None]]],
        samples: int,
        skip_silent: bool,
    ) -> LayerJacobian:
        """Form rows from normalised inputs and output gradients."""
        channels = layout.groups
        rows: list[tuple[Tensor, Tensor]] = []
        for call, gradients in calls:
            (delta,) = gradients
            assert delta is not None
            normalized = self.normalize(call.module, call.inputs[0])
            if self.channels_first:
                normalized = normalized.movedim(1, -1)
                delta = delta.movedim(2, -1)
            a = fold_inputs(normalized, samples, channels).unsqueeze(-1)[..., : layout.d_in]
            d = fold_gradients(delta, samples, channels).unsqueeze(-1)
            rows.append((a, d))
        inputs, deltas = concatenate_positions(rows)
        return LinearJacobian(layout, inputs, deltas, skip_silent=skip_silent)


def batch_norms(module: nn.Module) -> bool:
    """Return whether a module normalises with statistics of the present batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (
        module.training or module.running_mean is None
    )


def fix_statistics(module: nn.Module, inputs: Tensor, output: Tensor) -> None:
    """Make natgrad's pull-back through a batch norm treat the batch statistics as constants.

    The user's own backward pass is left as it is.

    Args:
        module: A batch norm in training mode.
        inputs: Its input.
        output: Its output, just computed.
    """
    node = output.grad_fn
    if node is None or "BatchNorm" not in type(node).__name__:
        return
    layer = cast(nn.BatchNorm2d, module)
    dims = [0, *range(2, inputs.dim())]
    values = inputs.detach()
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    variance = values.var(dims, unbiased=False)
    scale = (variance + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight.detach()
    scale = scale.to(inputs.dtype).view(1, -1, *([1] * (inputs.dim() - 2)))

    def replace(
        grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...] | None:
        if not is_pulling_back() or grad_inputs[0] is None or grad_outputs[0] is None:
            return None
        return (grad_outputs[0] * scale, *grad_inputs[1:])

    node.register_hook(cast(Any, replace))


def _normalize_batch(module: nn.BatchNorm2d, inputs: Tensor) -> Tensor:
    if batch_norms(module):
        return functional.batch_norm(inputs, None, None, training=True, eps=module.eps)
    mean, variance = cast(Tensor, module.running_mean), cast(Tensor, module.running_var)
    return functional.batch_norm(inputs, mean, variance, training=False, eps=module.eps)


def _normalize_layer(module: nn.LayerNorm, inputs: Tensor) -> Tensor:
    return functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)


def _normalize_rms(module: nn.RMSNorm, inputs: Tensor) -> Tensor:
    return functional.rms_norm(inputs, cast(Any, module.normalized_shape), eps=module.eps)


def _normalize_group(module: nn.GroupNorm, inputs: Tensor) -> Tensor:
    return functional.group_norm(inputs, module.num_groups, eps=module.eps)


def _normalize_instance(module: nn.InstanceNorm2d, inputs: Tensor) -> Tensor:
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
    NormalizationKind(_normalize_batch, channels_first=True),
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
)
register_kind(NormalizationKind(_normalize_layer, channels_first=False), nn.LayerNorm)
register_kind(NormalizationKind(_normalize_rms, channels_first=False), nn.RMSNorm)
register_kind(NormalizationKind(_normalize_group, channels_first=True), nn.GroupNorm)
register_kind(
    NormalizationKind(_normalize_instance, channels_first=True),
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)

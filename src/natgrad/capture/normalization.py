"""Normalisation layers: per channel, a scale and a shift of the normalised input.

Each channel is a linear map of one input, ``y_j = γ_j x̂_j + β_j``, so a layer is ``d`` groups of
``1 × 1`` matrices with a bias. BatchNorm in training mode couples samples through its statistics;
natgrad treats these as constants of the batch, which makes per-sample rows well defined. The
pull-back through such a layer is replaced accordingly (see :func:`fix_statistics`), also where a
subclass does more than to normalise, as to apply an activation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node
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
from natgrad.capture.rerun import rerun
from natgrad.jacobians import LayerJacobian, LinearJacobian
from natgrad.layouts import BlockLayout

#: Up to so many operations are looked through for a batch norm that is not the last of its module.
INNER_OPERATIONS = 16


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
            node = _batch_norm_node(layer, call.outputs[0])
            call.options["statistics"] = batch_statistics(layer, call.inputs[0], node)
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
        return LinearJacobian(layout, make, delta, partial=block.partial)

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


class InnerBatchNormKind(NormalizationKind):
    """Batch norms with a forward of their own, which goes on where the norm ends.

    The gradient of the norm's output is had inside of the module's graph.
    """

    def observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> list[LayerCall]:
        """Record the norm, if it is found."""
        layer = cast(nn.BatchNorm2d, module)
        if not (args and isinstance(output, Tensor) and output.shape == args[0].shape):
            return []
        node = _batch_norm_node(layer, output)
        if node is None:
            return []
        options: dict[str, Any] = {"edge": GradientEdge(node, 0)}
        call = LayerCall(module, "", (args[0].detach(),), (output,), options)
        if batch_norms(module):
            call.options["statistics"] = batch_statistics(layer, args[0], node)
        return [call]


def kind_within(module: nn.Module) -> LayerKind | None:
    """Return the kind of a batch norm that has a forward of its own, or None."""
    return _INNER if isinstance(module, nn.modules.batchnorm._BatchNorm) else None


def _batch_norm_node(layer: nn.BatchNorm2d, output: Tensor) -> Node | None:
    """Return the node of a batch norm in the graph of its module's output, or None."""
    start = output.grad_fn
    if start is None or _is_batch_norm(start):
        return start
    if type(layer).forward is getattr(nn.modules.batchnorm._BatchNorm, "forward"):  # noqa: B009
        return None
    weight, waiting = layer.weight, [start]
    for _ in range(INNER_OPERATIONS):
        if not waiting:
            break
        node = waiting.pop(0)
        if _is_batch_norm(node):
            own = getattr(node, "_saved_weight", None)
            same = own is None if weight is None else own is not None
            if same and (own is None or own.data_ptr() == weight.data_ptr()):
                return node
            continue
        waiting += [one for one, _ in node.next_functions if one is not None]
    return None


def _is_batch_norm(node: Node) -> bool:
    return "BatchNorm" in type(node).__name__


def batch_norms(module: nn.Module) -> bool:
    """Return whether a module normalises with statistics of the present batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (
        module.training or module.running_mean is None
    )


def run_outside_graph(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Return the output of a batch norm anew if a compiled graph hides the norm, else None."""
    node = output.grad_fn if isinstance(output, Tensor) else None
    if not type(node).__name__.startswith("CompiledFunction"):
        return None
    return rerun(module, {}, args, recorded=True)


def fix_statistics(module: nn.Module, inputs: Tensor, output: Tensor) -> None:
    """Make natgrad's pull-back through a batch norm treat the batch statistics as constants.

    The batch norm is in training mode; the user's own backward pass is left as it is.
    """
    layer = cast(nn.BatchNorm2d, module)
    node = _batch_norm_node(layer, output) if isinstance(output, Tensor) else None
    if node is None:
        return
    _, scale = batch_statistics(layer, inputs.detach(), node)
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
    layer: nn.BatchNorm2d, inputs: Tensor, node: Node | None
) -> tuple[Tensor, Tensor]:
    """Return mean and inverse standard deviation of a batch, ``(channels,)`` each.

    PyTorch keeps them for the backward pass, at the norm's node; else they are computed anew.
    """
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


def _negative_part(call: LayerCall, rows: Tensor) -> Tensor:
    return rows.clamp(max=0.0)


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


GROUP_NORM = NormalizationKind(_normalize_group, channels_first=True, by_rows=False)
_INNER = InnerBatchNormKind(_normalize_batch, channels_first=True, by_rows=True)

register_kind(
    NormalizationKind(_normalize_batch, channels_first=True, by_rows=True),
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
)
# ``y = max(0, x) + w min(0, x)``, with one w or one per channel.
register_kind(NormalizationKind(_negative_part, channels_first=True, by_rows=True), nn.PReLU)
register_kind(NormalizationKind(_normalize_layer, channels_first=False, by_rows=True), nn.LayerNorm)
register_kind(NormalizationKind(_normalize_rms, channels_first=False, by_rows=True), nn.RMSNorm)
register_kind(GROUP_NORM, nn.GroupNorm)
register_kind(
    NormalizationKind(_normalize_instance, channels_first=True, by_rows=False),
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)

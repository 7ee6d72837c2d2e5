"""Convolutions and transposed convolutions of any dimension, with groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from natgrad.capture.hooks import outside_graphs
from natgrad.capture.kinds import (
    BlockRecord,
    LayerCall,
    LayerKind,
    fold_gradients,
    is_data,
    of_samples,
    parameter_shapes,
    register_kind,
)
from natgrad.capture.rerun import rerun, whole_values
from natgrad.jacobians import LayerJacobian, LinearJacobian
from natgrad.jacobians.layer import at_least_float32
from natgrad.layouts import BlockLayout


def patches(
    images: Tensor,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    positions: tuple[int, ...] | None = None,
) -> Tensor:
    """Return a view of all windows, ``(N, C, *positions, *kernel_size)``, without a copy.

    The images ``(N, C, *spatial)`` are padded already; as many positions as fit by default.
    """
    images = images.contiguous()
    spatial = images.shape[2:]
    if positions is None:
        positions = _positions(spatial, kernel_size, stride, dilation)
    steps = images.stride()
    return images.as_strided(
        (*images.shape[:2], *positions, *kernel_size),
        (
            *steps[:2],
            *(step * s for step, s in zip(steps[2:], stride, strict=True)),
            *(step * d for step, d in zip(steps[2:], dilation, strict=True)),
        ),
    )


def _positions(
    spatial: Sequence[int],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, ...]:
    """Return how many windows fit into images along each dimension."""
    return tuple(
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(spatial, kernel_size, stride, dilation, strict=True)
    )


def _window_rows(
    windows: Tensor, samples: int, groups: int, positions: Tensor | None = None
) -> Tensor:
    """Rearrange ``(N·r, C, *positions, *kernel)`` to ``(N, T, G, C/G · kernel)``.

    Where ``r`` is 1, only some of the ``T`` positions may be copied.
    """
    dims = (windows.dim() - 2) // 2
    if positions is not None and windows.shape[0] == samples:
        places = []  # torch.unravel_index would wait for the device.
        for size in reversed(windows.shape[2 : 2 + dims]):
            places.append(positions % size)
            positions = positions // size
        index: Any = (slice(None), slice(None), *reversed(places))
        windows = windows[index]  # (N, C, T', *kernel)
        dims, positions = 1, None
    moved = windows.movedim(1, 1 + dims)  # (N·r, *positions, C, *kernel)
    features = moved.shape[1 + dims :].numel()
    rows = moved.reshape(samples, -1, groups, features // groups)
    return rows if positions is None else rows[:, positions]


class ConvolutionKind(LayerKind):
    """Conv1d, Conv2d and Conv3d: linear maps of patches, shared over output positions."""

    def layout(
        self, module: nn.Module, names: tuple[str, ...], qualified: tuple[str, ...]
    ) -> BlockLayout:
        """Return one matrix per convolution group, ``C_out/G × C_in/G·kernel``."""
        convolution = cast(nn.Conv2d, module)
        shapes = parameter_shapes(module, names)
        has_weight = "weight" in names
        groups = convolution.groups
        d_in = convolution.weight[0].numel() if has_weight else 0
        return BlockLayout(
            qualified,
            shapes,
            groups,
            convolution.out_channels // groups,
            d_in,
            has_weight,
            "bias" in names,
        )

    def jacobian(self, block: BlockRecord) -> LayerJacobian:
        """Form rows; patches are built only when first needed."""
        layout, samples = block.layout, block.samples
        calls, gradients = zip(*block.single_outputs(), strict=True)
        deltas = [_channels_last(gradient, samples, layout.groups) for gradient in gradients]
        delta = deltas[0] if len(deltas) == 1 else torch.cat(deltas, dim=2)
        inputs = ConvolutionInputs(calls, layout, samples)
        return LinearJacobian(layout, inputs, delta, partial=block.partial)


class InnerConvolutionKind(ConvolutionKind):
    """Convolutions with a forward of their own, as one that pads before or crops after."""

    records_inside: ClassVar[bool] = True

    def recorder(
        self, module: nn.Module, record: Callable[[LayerCall], None]
    ) -> RecordConvolutions:
        """Return a mode that records what is convolved with the module's weight."""
        return RecordConvolutions(module, record)


class RecordConvolutions(TorchFunctionMode):
    """Record every convolution with the weight of a module.

    Args:
        module: The module.
        record: Receives one call per convolution.
    """

    def __init__(self, module: nn.Module, record: Callable[[LayerCall], None]) -> None:
        super().__init__()
        self.module = module
        self.record = record

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function, and record it if it is such a convolution."""
        output = func(*args, **(kwargs or {}))
        if func in _CONVOLVE:
            self._convolved(output, *args, **(kwargs or {}))
        return output

    @outside_graphs
    def _convolved(
        self,
        output: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> None:
        own = cast(nn.Conv2d, self.module)
        if weight is own.weight and isinstance(output, Tensor) and output.requires_grad:
            layer = convolution_like(weight, stride, padding, dilation, groups)
            options = {"convolution": layer, "has_bias": bias is own.bias}
            of_data = is_data(input)
            self.record(LayerCall(own, "", (input.detach(),), (output,), options, of_data=of_data))


def convolution_like(
    weight: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> nn.Module:
    """Return a layer without memory that convolves as a call of a function does."""
    steps = [tuple(v) if isinstance(v, list) else v for v in (stride, padding, dilation)]
    layer: nn.Module = _layer(tuple(weight.shape), *steps, groups)
    return layer


@cache
def _layer(shape: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: int) -> Any:
    kind = _CONVOLUTIONS[len(shape) - 3]
    steps = (stride, padding, dilation, groups)
    return kind(shape[1] * groups, shape[0], shape[2:], *steps, bias=False, device="meta")


def convolution_within(module: nn.Module) -> LayerKind | None:
    """Return the kind of a convolution that has a forward of its own, or None.

    It is tried on random images.
    """
    if not isinstance(module, _CONVOLUTIONS):
        return None
    weight, calls = module.weight, list[LayerCall]()
    pairs = zip(weight.shape[2:], module.dilation, module.stride, strict=True)
    shape = (2, module.in_channels, *(d * (k - 1) + 1 + 2 * s for k, d, s in pairs))
    try:
        with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            images = torch.randn(shape, dtype=weight.dtype, device=weight.device)
            held = whole_values(module)
            held["weight"].requires_grad_()
            with RecordConvolutions(module, calls.append):
                rerun(module, held, (images,), recorded=True)
    except Exception:  # It takes other inputs.
        return None
    return _INNER if [call.options["has_bias"] for call in calls] == [True] else None


@dataclass(frozen=True)
class ConvolutionInputs:
    """What convolutions read: patches where they are needed, products with kernels without them.

    Attributes:
        calls: The calls.
        layout: The block's layout.
        samples: ``N``.
    """

    calls: Sequence[LayerCall]
    layout: BlockLayout
    samples: int

    def __call__(self, chosen: Tensor | None, positions: Tensor | None) -> Tensor:
        """Return patches ``(N, T, G, d_in)``, of all samples and positions or of some."""
        rows = []
        count = self.samples if chosen is None else len(chosen)
        few = positions if len(self.calls) == 1 else None
        for call in self.calls:
            windows = _windows(call, of_samples(call.inputs[0], self.samples, chosen))
            row = _window_rows(windows, count, self.layout.groups, few)
            rows.append(row if self.layout.has_weight else row[..., :0])
        if len(rows) == 1:
            return rows[0]
        joined = torch.cat(rows, dim=1)
        return joined if positions is None else joined[:, positions]

    def mean(self) -> Tensor:
        """Return the mean patch of every sample, ``(N, 1, G, d_in)``, without making any."""
        total, number = 0.0, 0
        for call in self.calls:
            module = _convolution(call)
            sums = _padded(module, at_least_float32(call.inputs[0]))
            steps = module.kernel_size, module.stride, module.dilation
            places = _positions(sums.shape[2:], *steps)
            number += prod(places) * (len(sums) // self.samples)
            for kernel, stride, dilation, count in zip(*steps, places, strict=True):
                # One dimension of the images makes way for one of the patch, behind the others.
                starts, reach = range(0, kernel * dilation, dilation), stride * (count - 1) + 1
                ranges = (sums[:, :, start : start + reach : stride] for start in starts)
                sums = torch.stack([one.sum(2) for one in ranges], -1)
            sums = sums.unflatten(0, (self.samples, -1)).sum(1)
            total = total + sums.view(self.samples, 1, self.layout.groups, -1)
        mean = cast(Tensor, total) / number
        return mean if self.layout.has_weight else mean[..., :0]

    def sample_gradients(self, output_gradients: Tensor, start: int) -> Tensor:
        """Return ``Σ_t δ_nkt a_ntᵀ`` without patches, ``(n, K, G, d_out, d_in)``, from a sample on.

        Each channel of each sample is convolved with its ``δ``, ``(n, K, T, G, d_out)``. Patches
        take the memory of the images times the entries of a kernel, and pay only where many outputs
        read them.
        """
        n, groups = len(output_gradients), self.layout.groups
        total, first = output_gradients.new_zeros(()), 0
        for call in self.calls:
            module = _convolution(call)
            images = _padded(module, at_least_float32(call.inputs[0]))
            images = images.unflatten(0, (self.samples, -1))[start : start + n]
            repeats, channels, *spatial = images.shape[1:]
            places = _positions(spatial, module.kernel_size, module.stride, module.dilation)
            here = slice(first, first := first + repeats * prod(places))
            delta = output_gradients[:, :, here].unflatten(2, (repeats, *places))
            delta = delta.movedim((1, -2, -1), (2, 3, 4))  # (n, r, K, G, d_out, *positions)
            filters = delta.movedim(3, 2).unsqueeze(3)  # (n, r, G, 1, K, d_out, *positions)
            filters = filters.repeat_interleave(channels // groups, 3)
            # What steps from patch to patch were, steps within the filter are now.
            found = _CONVOLVE[len(places) - 1](
                images.reshape(1, -1, *spatial), filters.flatten(0, 5).unsqueeze(1), None,
                module.dilation, 0, module.stride, n * repeats * channels,
            )  # fmt: skip
            kernel: Any = (..., *(slice(size) for size in module.kernel_size))
            found = found[kernel].reshape(*filters.shape[:6], -1)
            found = found.sum(1)  # (n, G, C/G, K, d_out, kernel)
            total = total + found.permute(0, 3, 1, 4, 2, 5).flatten(-2)
        return total

    def products(self, matrices: Tensor) -> Tensor:
        """Return ``V a``, ``(c, G, N, T, d_out)``, for matrices ``(c, G, d_out, d_in)``."""
        c, groups, d_out, _ = matrices.shape
        rows = []
        for call in self.calls:
            module = _convolution(call)
            convolve = _CONVOLVE[len(module.kernel_size) - 1]
            kernels = matrices.transpose(0, 1).reshape(-1, *module.weight.shape[1:])
            images = _padded(module, at_least_float32(call.inputs[0]))
            found = convolve(
                images, kernels, None, module.stride, 0, module.dilation, module.groups
            )
            rows.append(found.movedim(1, -1).reshape(self.samples, -1, groups, c, d_out))
        joined = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        return joined.permute(3, 2, 0, 1, 4)


_CONVOLVE: tuple[Any, ...] = (
    nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d,
)  # fmt: skip


def _windows(call: LayerCall, images: Tensor) -> Tensor:
    """Return a view of all windows that a call's kernels meet on images, :func:`patches`."""
    module = _convolution(call)
    return patches(_padded(module, images), module.kernel_size, module.stride, module.dilation)


def _convolution(call: LayerCall) -> nn.Conv2d:
    """Return a layer that convolves as a call did: mostly its own."""
    return cast(nn.Conv2d, call.options.get("convolution", call.module))


def padding_of(module: nn.Conv2d) -> list[int]:
    """Return how a module pads its inputs now, as :func:`torch.nn.functional.pad` takes it.

    Programs change ``padding`` and ``dilation`` of a layer that is made, as for dilated backbones.
    torch's own list of amounts stays as it was then, and is in use where not zeros are added.
    """
    given: Any = module.padding
    if module.padding_mode != "zeros":
        return module._reversed_padding_repeated_twice
    if given == "same":
        pairs = zip(module.dilation, module.kernel_size, strict=True)
        totals = [step * (size - 1) for step, size in reversed(list(pairs))]
        return [amount for total in totals for amount in (total // 2, total - total // 2)]
    if not isinstance(given, tuple):
        given = (0 if given == "valid" else given,) * len(module.kernel_size)
    return [amount for each in reversed(given) for amount in (each, each)]


def _padded(module: nn.Conv2d, images: Tensor) -> Tensor:
    """Return images with the padding that a module gives them."""
    padding = padding_of(module)
    if not any(padding):
        return images
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return nn.functional.pad(images, padding, mode=mode)


def _channels_last(gradients: Tensor, samples: int, groups: int) -> Tensor:
    """Rearrange ``(K, N·r, C, *spatial)`` to ``(N, K, T, G, C/G)``."""
    channels = gradients.shape[2]
    moved = fold_gradients(gradients.movedim(2, -1), samples, channels)
    grouped: Tensor = moved.unflatten(-1, (groups, channels // groups))
    return grouped


class TransposedConvolutionKind(LayerKind):
    """ConvTranspose1d/2d/3d.

    With its bias it is a convolution of the input with zeros between its entries: a linear map of
    patches, shared over output positions, so that weight and bias are one block. A weight alone
    takes a shorter way: each input position meets a window of output gradients.
    """

    def layout(
        self, module: nn.Module, names: tuple[str, ...], qualified: tuple[str, ...]
    ) -> BlockLayout:
        """Return ``C_out/G × C_in/G·kernel`` per group, stored transposed.

        Of a weight without bias, ``C_out/G·kernel × C_in/G``.
        """
        shapes = parameter_shapes(module, names)
        convolution = cast(nn.ConvTranspose2d, module)
        groups, d_out = convolution.groups, convolution.out_channels // convolution.groups
        if names == ("bias",):
            return BlockLayout(qualified, shapes, groups, d_out, 0, False, True)
        d_in, kernel = convolution.in_channels // groups, convolution.weight[0, 0].numel()
        if names == ("weight",):
            return BlockLayout(
                qualified, shapes, groups, d_out * kernel, d_in, True, False, transposed=True
            )
        return BlockLayout(
            qualified, shapes, groups, d_out, d_in * kernel, transposed=True, kernel=kernel
        )

    def jacobian(self, block: BlockRecord) -> LayerJacobian:
        """Form rows from inputs and windows of output gradients, or from patches of inputs."""
        layout, samples = block.layout, block.samples
        if layout.has_bias:
            return self._by_outputs(block)
        rows: list[tuple[Tensor, Tensor]] = []
        for call, delta in block.single_outputs():
            images = call.inputs[0]
            module = cast(nn.ConvTranspose2d, call.module)
            padding: list[int] = []
            for amount in reversed(cast("tuple[int, ...]", module.padding)):
                padding += [amount, amount]
            directions = delta.shape[0]
            padded = nn.functional.pad(delta.flatten(0, 1), padding)
            windows = patches(
                padded, module.kernel_size, module.stride, module.dilation, images.shape[2:]
            )
            d = _window_rows(windows, directions * samples, layout.groups)
            d = d.unflatten(0, (directions, samples)).transpose(0, 1)
            a = images.movedim(1, -1).reshape(samples, -1, layout.groups, layout.d_in)
            rows.append((a, d))
        return block.linear(rows)

    def _by_outputs(self, block: BlockRecord) -> LayerJacobian:
        layout, samples = block.layout, block.samples
        calls, gradients = zip(*block.single_outputs(), strict=True)
        # Last positions first, as patches come: kernels are applied the other way round.
        flipped = [g.flip(list(range(3, g.dim()))) for g in gradients]
        deltas = [_channels_last(gradient, samples, layout.groups) for gradient in flipped]
        delta = deltas[0] if len(deltas) == 1 else torch.cat(deltas, dim=2)
        spatial = [g.shape[3:] for g in gradients]
        make = partial(_transposed_inputs, calls, spatial, layout, samples)
        return LinearJacobian(layout, make, delta, partial=block.partial)


def _transposed_inputs(
    calls: Sequence[LayerCall],
    spatial: Sequence[torch.Size],
    layout: BlockLayout,
    samples: int,
    chosen: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    """Return patches ``(N, T, G, d_in)`` of some samples and positions, the last position first."""
    rows = []
    count = samples if chosen is None else len(chosen)
    for call, shape in zip(calls, spatial, strict=True):
        module = cast(nn.ConvTranspose2d, call.module)
        images = of_samples(call.inputs[0], samples, chosen)
        spread = images.new_zeros(
            *images.shape[:2],
            *((n - 1) * s + 1 for n, s in zip(images.shape[2:], module.stride, strict=True)),
        )
        every: Any = (..., *(slice(None, None, step) for step in module.stride))
        spread[every] = images
        spread = spread.flip(list(range(2, spread.dim())))
        padding: list[int] = []
        for size, p, k, d, n in zip(
            spread.shape[2:], cast("tuple[int, ...]", module.padding), module.kernel_size,
            module.dilation, shape, strict=True,
        ):  # fmt: skip
            before = d * (k - 1) - p
            padding = [n + p - size, before, *padding]
        windows = patches(
            nn.functional.pad(spread, padding),
            module.kernel_size,
            (1,) * len(shape),
            module.dilation,
            tuple(shape),
        )
        row = _window_rows(windows, count, layout.groups, positions if len(calls) == 1 else None)
        rows.append(row if layout.has_weight else row[..., :0])
    joined = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
    return joined if positions is None or len(calls) == 1 else joined[:, positions]


_CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_INNER = InnerConvolutionKind()
register_kind(ConvolutionKind(), *_CONVOLUTIONS)
register_kind(TransposedConvolutionKind(), *_TRANSPOSED)

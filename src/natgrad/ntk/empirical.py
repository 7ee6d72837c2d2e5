"""The empirical neural tangent kernel of any model natgrad can capture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from natgrad import linalg
from natgrad.arguments import check_choice, check_integer
from natgrad.capture import Capture
from natgrad.capture.evaluation import output_rows
from natgrad.fisher.pieces import piece_of, sample_slices
from natgrad.jacobians import Jacobians, LayerJacobian

Outputs = Literal["full", "classwise", "trace"]

#: Entries of output gradients that one batch of rows may have (2^27 float32 = 512 MiB).
BATCH_ELEMENTS = 2**27

#: Samples that tell how large rows are.
PROBE_SAMPLES = 2


@overload
def empirical_kernel(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    per_layer: Literal[False] = False,
    per_unit: Literal[False] = False,
    outputs: Outputs = "full",
    batch_size: int | None = None,
    output: Callable[[Any], Tensor] | None = None,
) -> Tensor: ...


@overload
def empirical_kernel(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    per_layer: bool = False,
    per_unit: bool = False,
    outputs: Outputs = "full",
    batch_size: int | None = None,
    output: Callable[[Any], Tensor] | None = None,
) -> Tensor | dict[str, Tensor]: ...


def empirical_kernel(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    per_layer: bool = False,
    per_unit: bool = False,
    outputs: Outputs = "full",
    batch_size: int | None = None,
    output: Callable[[Any], Tensor] | None = None,
) -> Tensor | dict[str, Tensor]:
    r"""Return the tangent kernel :math:`J(x_1) J(x_2)^\top` at the model's present parameters.

    There is no factor 1/N in it: the kernel that governs gradient descent on a mean loss over N
    samples is this one divided by N. Jacobian rows stay factored, so no matrix with a row per
    output and a column per parameter is built; a symmetric kernel is computed once per pair.

    Args:
        model: Any module whose trainable parameters natgrad covers, in its present mode; it is
            left as it was.
        x1: N inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments,
            samples along the first dimension of every tensor, or wherever the model takes them.
        x2: N' inputs; None for ``x1`` itself.
        per_layer: Return a dict block name → that layer's share; they sum to the kernel.
        per_unit: Return a dict block name → one share per output unit of the layer,
            ``(units, N·C, N'·C)``; only with ``outputs="full"``.
        outputs: ``"full"`` gives ``(N·C, N'·C)``, row ``n·C + c`` for output c of sample n;
            ``"classwise"`` only the pairs with equal outputs, ``(C, N, N')``; ``"trace"`` their
            sum over c, ``(N, N')``. The last two need neither time nor memory for other pairs.
        batch_size: Samples whose rows are held at a time; as many as fit a budget by default, and
            all where the outputs of one sample depend on others.
        output: Picks the tensor to differentiate out of the model's output.

    Returns:
        The kernel in the dtype of the parameters (at least float32), on the model's device.

    Raises:
        ValueError: If a parameter has no Jacobian rows, the samples do not fit, an option is
            unknown, or the kernel does not fit memory.

    Source: Jacot, Gabriel & Hongler, Neural tangent kernel (2018).
    """
    check_choice("outputs", outputs, "full", "classwise", "trace")
    if per_unit and outputs != "full":
        raise ValueError("per_unit=True gives kernels of all outputs: use outputs='full' with it")
    with Capture(model, output) as capture:
        capture.check_covered()
        left = _RowSource(capture, x1, batch_size)
        right = left if x2 is None else _RowSource(capture, x2, batch_size)
        kernels = _Kernels(left, right, outputs)
        for i, j in kernels.pairs():
            rows = left[i]
            other = rows if right is left and i == j else right[j]
            for name, block in rows.items():
                if name in other:
                    key = name if per_layer or per_unit else ""
                    second = None if other is rows else other[name]
                    kernels.add(key, i, j, _products(block, second, outputs, per_unit))
    if right is left:
        for kernel in kernels.total.values():
            _mirror(kernel)
    if per_layer or per_unit:
        return kernels.total
    if not kernels.total:
        raise ValueError("the output depends on no captured parameter, so there is no kernel")
    return kernels.total[""]


def _products(
    block: LayerJacobian, other: LayerJacobian | None, outputs: Outputs, per_unit: bool
) -> Tensor:
    if per_unit:
        return block.unit_grams(other)
    if outputs == "full":
        return block.gram(other)
    classes = []
    for c in range(block.directions):
        only = torch.zeros(1, block.directions, 1, dtype=block.dtype, device=block.device)
        only[0, c, 0] = 1.0
        left = block.combined(only.expand(block.samples, -1, -1))
        right = None if other is None else other.combined(only.expand(other.samples, -1, -1))
        classes.append(left.gram(right))
    stacked = torch.stack(classes)
    return stacked if outputs == "classwise" else stacked.sum(0)


class _RowSource:
    """Jacobian rows of some inputs, batch by batch; kept while they fit, else made again."""

    def __init__(self, capture: Capture, inputs: Any, batch_size: int | None) -> None:
        self.capture, self.inputs = capture, inputs
        if batch_size is not None:
            check_integer("batch_size", batch_size)
        probes = sample_slices(capture.model, inputs, PROBE_SAMPLES, capture.select)
        values, rows = output_rows(capture, piece_of(inputs, probes[0]))
        self.outputs: int = values[0].numel()
        self._kept: dict[int, Jacobians] = {}
        if probes[0] == slice(None) or rows.samples != probes[0].stop:
            self.samples: int = rows.samples
            self.slices, self._pieces = [slice(0, self.samples)], [slice(None)]
            self._kept[0], self._keep = rows, True
            return
        self.samples = probes[-1].stop
        elements = sum(t.numel() for block in rows.values() for t in block.state().values())
        size = batch_size or max(1, BATCH_ELEMENTS * rows.samples // max(1, elements))
        starts = range(0, self.samples, size)
        self.slices = [slice(start, min(start + size, self.samples)) for start in starts]
        self._pieces = self.slices
        self._keep = elements * self.samples // rows.samples <= 2 * BATCH_ELEMENTS

    def __getitem__(self, index: int) -> Jacobians:
        if index in self._kept:
            return self._kept[index]
        _, rows = output_rows(self.capture, piece_of(self.inputs, self._pieces[index]))
        if not self._keep:
            self._kept.clear()  # The last one is asked for again most often.
        self._kept[index] = rows
        return rows


class _Kernels:
    """Kernels filled in block by block; the mirror image of a symmetric one comes for free."""

    def __init__(self, left: _RowSource, right: _RowSource, outputs: Outputs) -> None:
        if left.outputs != right.outputs:
            raise ValueError(
                f"x1 leads to {left.outputs} outputs per sample and x2 to {right.outputs}: both "
                "must lead to the same number"
            )
        self.left, self.right = left, right
        self.per_sample = left.outputs if outputs == "full" else 1
        self.total: dict[str, Tensor] = {}

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Yield the pairs of batches to multiply."""
        for i in range(len(self.left.slices)):
            first = i if self.left is self.right else 0
            for j in range(first, len(self.right.slices)):
                yield i, j

    def add(self, key: str, i: int, j: int, block: Tensor) -> None:
        """Add the product of batches i and j, ``(..., rows of i, rows of j)``, to a kernel."""
        size = (self.left.samples * self.per_sample, self.right.samples * self.per_sample)
        if block.shape[-2:] == size and key not in self.total:
            self.total[key] = block
            return
        if key not in self.total:
            entries = prod(block.shape[:-2]) * prod(size)
            linalg.check_memory(int(entries**0.5) + 1, 1, block.dtype, block.device)
            self.total[key] = block.new_zeros(*block.shape[:-2], *size)
        rows, columns = self._range(self.left.slices[i]), self._range(self.right.slices[j])
        self.total[key][..., rows, columns] += block
        if self.left is self.right and i != j:
            self.total[key][..., columns, rows] += block.mT

    def _range(self, samples: slice) -> slice:
        return slice(samples.start * self.per_sample, samples.stop * self.per_sample)


def _mirror(kernel: Tensor, step: int = 1024) -> None:
    """Copy the upper triangle of ``(..., R, R)`` to the lower one, in place, in blocks."""
    for start in range(0, kernel.shape[-1], step):
        stop = start + step
        kernel[..., stop:, start:stop] = kernel[..., start:stop, stop:].mT
        diagonal = kernel[..., start:stop, start:stop]
        diagonal.copy_(diagonal.triu() + diagonal.triu(1).mT)

"""Linear networks written out in parameter space: what theory in function space must agree with.

A chain of layers is held as inputs ``h`` and output gradients ``δ`` of every layer, its Jacobian is
``δ hᵀ``, Fisher matrices are dense, and training moves the parameters step by step. Nothing here
imports natgrad.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests import dense

STRUCTURES = ["full", "block_diagonal", "block_tridiagonal", "kfac", "unit_wise", "diagonal"]


@dataclass(frozen=True)
class Layer:
    """One layer: inputs ``(N, d_in)``, bias included, and output gradients ``(N, C, d_out)``.

    Attributes:
        inputs: ``h``, as the weight sees it: scaled, with a column for the bias.
        gradients: ``δ``, of every output.
        fan_in: What traces of ``A`` are divided by.
        units: What traces of ``B`` are divided by.
    """

    inputs: Tensor
    gradients: Tensor
    fan_in: int
    units: int

    def jacobian(self) -> Tensor:
        """Return ``(N·C, d_out·d_in)``."""
        rows = torch.einsum("nci,nj->ncij", self.gradients, self.inputs)
        return rows.flatten(0, 1).flatten(1)

    def cut(self, start: int, stop: int) -> Layer:
        return Layer(self.inputs[start:stop], self.gradients[start:stop], self.fan_in, self.units)


def chain(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Layer]]:
    """Return outputs ``(N, C)`` and layers of a chain of linear layers and activations.

    Layers may be scaled: a layer with ``weight_scale`` c and ``bias_scale`` b computes
    ``c W h + b β``.
    """
    h = x
    inputs, preactivations = [], []
    for module in model.modules():
        if isinstance(module, nn.Flatten):
            h = h.flatten(1)
        elif isinstance(module, nn.Linear):
            scaled = h * getattr(module, "weight_scale", 1.0)
            u = scaled @ module.weight.T
            if module.bias is not None:
                size = getattr(module, "bias_scale", 1.0)
                u = u + size * module.bias
                scaled = torch.cat([scaled, torch.full_like(scaled[:, :1], size)], 1)
            inputs.append(scaled.detach())
            preactivations.append(u)
            h = u
        elif not isinstance(module, nn.Sequential):
            h = module(h)
    layers = []
    for own, u in zip(inputs, preactivations, strict=True):
        gradients = torch.stack(
            [torch.autograd.grad(h[:, c].sum(), u, retain_graph=True)[0] for c in range(h.shape[1])]
        ).transpose(0, 1)
        layers.append(Layer(own, gradients, own.shape[1], gradients.shape[2]))
    return h.detach(), layers


def jacobian(layers: list[Layer]) -> Tensor:
    return torch.cat([layer.jacobian() for layer in layers], 1)


def in_blocks(hessians: Tensor) -> Tensor:
    """Return ``blockdiag(Λ_n)`` for ``(N, C, C)``."""
    return torch.block_diag(*hessians)


def identity(layers: list[Layer], scale: float = 1.0) -> Tensor:
    """Return ``Λ_n = scale · I``, ``(N, C, C)``."""
    n, c = layers[0].gradients.shape[:2]
    return scale * torch.eye(c, dtype=torch.float64).expand(n, c, c)


def pinv(matrix: Tensor) -> Tensor:
    return torch.linalg.pinv(matrix, rtol=1e-11, hermitian=True)


def invert(matrix: Tensor, damping: float) -> Tensor:
    if damping == 0:
        return pinv(matrix)
    return torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=torch.float64))


def groups(layers: list[Layer], structure: str) -> list[Tensor]:
    """Return the indices of layers or, for "unit_wise", of units."""
    result, start = [], 0
    for layer in layers:
        d_out, d_in = layer.gradients.shape[2], layer.inputs.shape[1]
        index = torch.arange(start, start + d_out * d_in)
        start += d_out * d_in
        result += list(index.view(d_out, d_in)) if structure == "unit_wise" else [index]
    return result


def fisher(layers: list[Layer], structure: str, hessians: Tensor) -> Tensor:
    """Return the ``P × P`` matrix of a structure for output Hessians ``(N, C, C)``."""
    samples = len(hessians)
    if structure == "kfac":
        return torch.block_diag(
            *(torch.kron(b.contiguous(), a.contiguous()) for a, b in factors(layers, hessians))
        )
    rows = jacobian(layers)
    exact = rows.T @ in_blocks(hessians) @ rows / samples
    if structure == "full":
        return exact
    if structure == "diagonal":
        return dense.diagonal(exact)
    keep = groups(layers, structure)
    if structure == "block_tridiagonal":
        return dense.block_tridiagonal(exact, keep)
    return dense.block_diagonal(exact, keep)


def factors(layers: list[Layer], hessians: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return K-FAC's ``A = mean hhᵀ`` and ``B = mean Σ δΛδᵀ``."""
    n = len(hessians)
    return [
        (
            layer.inputs.T @ layer.inputs / n,
            torch.einsum("nci,ncd,ndj->ij", layer.gradients, hessians, layer.gradients) / n,
        )
        for layer in layers
    ]


def inverse(layers: list[Layer], structure: str, damping: float, hessians: Tensor) -> Tensor:
    """Return ``(F + λI)⁻¹``; K-FAC's factors are damped by the π rule, "gd" is the identity."""
    if structure == "gd":
        return torch.eye(jacobian(layers).shape[1], dtype=torch.float64)
    if structure in ("full", "block_tridiagonal"):
        return invert(fisher(layers, structure, hessians), damping)
    if structure == "diagonal":
        values = fisher(layers, structure, hessians).diagonal()
        threshold = 1e-11 * values.max() if damping == 0 else 0.0
        kept = values > threshold
        return torch.diag(torch.where(kept, 1 / (torch.where(kept, values, 1) + damping), 0.0))
    if structure != "kfac":
        matrix = fisher(layers, structure, hessians)
        result = torch.zeros_like(matrix)
        for index in groups(layers, structure):
            where = index.unsqueeze(1), index
            result[where] = invert(matrix[where], damping)
        return result
    blocks = []
    for layer, (a, b) in zip(layers, factors(layers, hessians), strict=True):
        pi = ((a.trace() / layer.fan_in) / (b.trace() / layer.units)).sqrt()
        root = math.sqrt(damping)
        blocks.append(torch.kron(invert(b, float(root / pi)), invert(a, float(root * pi))))
    return torch.block_diag(*blocks)


@dataclass
class Linear:
    """A network linear in its parameters: ``f = f_0 + Jθ`` and ``f' = f'_0 + J'θ``."""

    outputs: Tensor
    layers: list[Layer]
    test_outputs: Tensor | None = None
    test_layers: list[Layer] | None = None

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, x_test: Tensor | None = None) -> Linear:
        if x_test is None:
            return cls(*chain(model, x))
        return cls(*chain(model, x), *chain(model, x_test))

    def map(self, structure: str, damping: float) -> tuple[Tensor, Tensor | None]:
        """Return ``J F⁻¹ Jᵀ / N`` and ``J' F⁻¹ Jᵀ / N`` for the squared loss."""
        rows = jacobian(self.layers)
        moved = inverse(self.layers, structure, damping, identity(self.layers)) @ rows.T
        moved = moved / len(self.outputs)
        test = None if self.test_layers is None else jacobian(self.test_layers) @ moved
        return rows @ moved, test

    def train(
        self,
        structure: str,
        steps: int,
        lr: float,
        damping: float,
        gradient: Callable[[Tensor], Tensor],
        hessian: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Move the parameters step by step; return outputs at steps 0 … ``steps``.

        Args:
            structure: Of the Fisher matrix, or "gd".
            steps: How many.
            lr: η.
            damping: λ.
            gradient: Outputs (N, C) → the un-averaged loss's gradient by them, (N, C).
            hessian: Outputs (N, C) → output Hessians (N, C, C).
        """
        rows = jacobian(self.layers)
        test_rows = None if self.test_layers is None else jacobian(self.test_layers)
        theta = torch.zeros(rows.shape[1], dtype=torch.float64)
        inverses: list[tuple[Tensor, Tensor]] = []
        train, test = [], []
        for step in range(steps + 1):
            f = self.outputs + (rows @ theta).view_as(self.outputs)
            train.append(f)
            if test_rows is not None and self.test_outputs is not None:
                moved = (test_rows @ theta).view_as(self.test_outputs)
                test.append(self.test_outputs + moved)
            if step == steps:
                break
            hessians = hessian(f)
            if not inverses or not torch.equal(inverses[0][0], hessians):
                inverses = [(hessians, inverse(self.layers, structure, damping, hessians))]
            descent = rows.T @ gradient(f).flatten() / len(f)
            theta = theta - lr * (inverses[0][1] @ descent)
        return torch.stack(train), torch.stack(test) if test else None


def squared(target: Tensor, scale: float = 1.0) -> tuple[Callable, Callable]:
    """Return gradient and Hessian of ``scale·½‖f − y‖²``."""
    return (
        lambda f: scale * (f - target),
        lambda f: scale * torch.eye(f.shape[1], dtype=f.dtype).expand(len(f), -1, -1),
    )


def cross_entropy(labels: Tensor) -> tuple[Callable, Callable]:
    """Return gradient and Hessian of the cross-entropy with labels (N,)."""

    def gradient(f: Tensor) -> Tensor:
        p = f.exp() / f.exp().sum(1, keepdim=True)
        return p - nn.functional.one_hot(labels, f.shape[1]).to(f.dtype)

    def hessian(f: Tensor) -> Tensor:
        p = f.exp() / f.exp().sum(1, keepdim=True)
        return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)

    return gradient, hessian


def roots(hessians: Tensor) -> Tensor:
    """Return the symmetric ``Λ_n^½``."""
    values, vectors = torch.linalg.eigh(hessians)
    values = torch.where(values > 1e-12 * values.amax(-1, keepdim=True), values, 0.0)
    return (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT


# -- infinite width --------------------------------------------------------------------------------


def relu_kernels(
    x: Tensor, depth: int, weight: float, bias: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Return ``Q_1 … Q_L`` and ``B_1 … B_L`` of a ReLU network, entry by entry."""
    n = len(x)
    q = weight * x @ x.T / x.shape[1] + bias
    qs, slopes = [q], []
    for _ in range(depth - 1):
        value, slope = torch.zeros(n, n).double(), torch.zeros(n, n).double()
        for i in range(n):
            for j in range(n):
                size = math.sqrt(float(q[i, i] * q[j, j]))
                angle = 0.0 if i == j else math.acos(min(1.0, max(-1.0, float(q[i, j]) / size)))
                turned = math.sin(angle) + (math.pi - angle) * math.cos(angle)
                value[i, j] = size * turned / (2 * math.pi)
                slope[i, j] = (math.pi - angle) / (2 * math.pi)
        slopes.append(slope)
        q = weight * value + bias
        qs.append(q)
    bs = [torch.ones(n, n).double()]
    for slope in reversed(slopes):
        bs.insert(0, weight * slope * bs[0])
    return qs, bs


def symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def infinite(
    x: Tensor,
    x_test: Tensor,
    widths: tuple[int, ...],
    weight: float,
    bias: float,
    outputs: Tensor | None = None,
    test_outputs: Tensor | None = None,
) -> Linear:
    """Return a linear network whose kernels are those of an infinitely wide ReLU network.

    Layers have ``h = Q^½`` and, for each output apart, ``δ = B^½``, over training and test samples
    together, so ``h hᵀ = Q`` and ``δ δᵀ = B ⊗ I``.
    """
    both = torch.cat([x, x_test])
    qs, bs = relu_kernels(both, len(widths) - 1, weight, bias)
    n, total, c = len(x), len(both), widths[-1]
    layers = []
    for index, (q, b) in enumerate(zip(qs, bs, strict=True)):
        gradients = torch.einsum(
            "nu,cd->ncdu", symmetric_root(b), torch.eye(c, dtype=torch.float64)
        ).flatten(2)
        layers.append(
            Layer(symmetric_root(q), gradients, widths[index] + (bias > 0), widths[index + 1])
        )
    zeros = torch.zeros(total, c, dtype=torch.float64)
    return Linear(
        zeros[:n] if outputs is None else outputs,
        [layer.cut(0, n) for layer in layers],
        zeros[n:] if test_outputs is None else test_outputs,
        [layer.cut(n, total) for layer in layers],
    )

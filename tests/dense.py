"""The dense reference: Fisher matrices written out by autograd, in float64.

Nothing here imports natgrad. Jacobians come from one backward pass per output, output Hessians from
differentiating torch's own losses twice, Kronecker factors from sums over samples, vectors
and positions of inputs and output gradients recorded with plain forward hooks. Everything is slow
and meant for models of a few hundred parameters.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# -- calling models --------------------------------------------------------------------------------


def call(model: nn.Module, x: Any, output: Callable[[Any], Tensor] | None = None) -> Tensor:
    """Run a model on a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(x, dict):
        result = model(**x)
    elif isinstance(x, tuple):
        result = model(*x)
    else:
        result = model(x)
    return result if output is None else output(result)


def with_fixed_statistics(model: nn.Module, x: Any) -> nn.Module:
    """Copy a model and replace training-mode batch norms by evaluation-mode ones.

    Their running statistics are the mean and the biased variance of what they see for this input.
    """
    model = copy.deepcopy(model)
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None)
    ]

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        dims = [d for d in range(args[0].dim()) if d != 1]
        module.running_mean = args[0].detach().mean(dims)
        module.running_var = args[0].detach().var(dims, unbiased=False)
        module.track_running_stats = True
        module.eval()

    if not norms:
        return model
    handles = [norm.register_forward_pre_hook(record) for norm in norms]
    with torch.no_grad():
        call(model, x)
    for handle in handles:
        handle.remove()
    return model


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name, in the order of ``model.parameters()``."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def indices(model: nn.Module) -> dict[str, Tensor]:
    """Return where each parameter's entries lie in the flat vector, in the parameter's shape."""
    start, result = 0, {}
    for name, p in parameters(model).items():
        result[name] = torch.arange(start, start + p.numel()).reshape(p.shape)
        start += p.numel()
    return result


def jacobian(
    model: nn.Module, x: Any, output: Callable[[Any], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the output (N, ...) and its Jacobian (N, ..., P), one backward pass per entry."""
    model = with_fixed_statistics(model, x)
    leaves = list(parameters(model).values())
    z = call(model, x, output)
    rows = []
    for entry in z.flatten():
        gradients = torch.autograd.grad(entry, leaves, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros(p.numel(), dtype=z.dtype) if g is None else g.flatten()
                    for g, p in zip(gradients, leaves, strict=True)
                ]
            )
        )
    return z.detach(), torch.stack(rows).reshape(*z.shape, -1)


def rows(jac: Tensor, vectors: Tensor) -> Tensor:
    """Return ``J_nᵀ v_kn`` for vectors (K, N, ...), as (N, K, P)."""
    n, p = jac.shape[0], jac.shape[-1]
    return torch.einsum("nip,kni->nkp", jac.reshape(n, -1, p), vectors.reshape(len(vectors), n, -1))


# -- losses ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """An un-averaged loss of a batch, a function (z, y), and what its mean divides by."""

    total: Callable[[Tensor, Tensor], Tensor]
    count: Callable[[Tensor, Tensor], float]


def _samples(z: Tensor, y: Tensor) -> float:
    return float(len(z))


def gaussian(variance: float = 1.0) -> Loss:
    """Squared error over 2·variance."""
    return Loss(lambda z, y: functional.mse_loss(z, y, reduction="sum") / (2 * variance), _samples)


def mse() -> Loss:
    """``nn.MSELoss()`` times the number of samples."""
    return Loss(lambda z, y: functional.mse_loss(z, y) * len(z), _samples)


def bernoulli() -> Loss:
    """Binary cross-entropy with logits."""
    return Loss(
        lambda z, y: functional.binary_cross_entropy_with_logits(z, y, reduction="sum"), _samples
    )


def poisson() -> Loss:
    """Poisson negative log-likelihood of log rates."""
    return Loss(
        lambda z, y: functional.poisson_nll_loss(z, y, log_input=True, reduction="sum"), _samples
    )


def categorical(class_dim: int = 1, **options: Any) -> Loss:
    """``functional.cross_entropy`` with its options and any class dimension."""

    def total(z: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(z.movedim(class_dim, 1), y, reduction="sum", **options)

    def count(z: Tensor, y: Tensor) -> float:
        mean = functional.cross_entropy(z.movedim(class_dim, 1), y, **options)
        return float(total(z, y) / mean)

    return Loss(total, count)


def output_gradient(loss: Loss, z: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of the un-averaged loss, of the output's shape."""
    z = z.detach().requires_grad_()
    return torch.autograd.grad(loss.total(z, y), z)[0]


def output_hessian(loss: Loss, z: Tensor, y: Tensor) -> Tensor:
    """Return the Hessian of the un-averaged loss with respect to the whole output, (N·D, N·D)."""
    flat = torch.autograd.functional.hessian(lambda v: loss.total(v, y), z.detach())
    return flat.reshape(z.numel(), z.numel())


def fisher_vectors(loss: Loss, z: Tensor, y: Tensor, kind: str) -> Tensor:
    """Return vectors (K, N, ...) whose pull-backs make up the Fisher matrix.

    For "exact" they are eigenvectors of each sample's output Hessian times the root of the
    eigenvalue; for "empirical" the gradients.
    """
    if kind == "empirical":
        return output_gradient(loss, z, y).unsqueeze(0)
    n = len(z)
    blocks = output_hessian(loss, z, y).reshape(n, z.numel() // n, n, z.numel() // n)
    values, vectors = torch.linalg.eigh(torch.stack([blocks[i, :, i] for i in range(n)]))
    values = torch.where(values > 1e-13 * values.max(), values, 0)
    roots = vectors * values.sqrt().unsqueeze(1)
    roots[roots.abs() < 1e-13] = 0
    return roots.permute(2, 0, 1).reshape(-1, *z.shape)


def fisher(
    model: nn.Module,
    x: Any,
    y: Tensor,
    loss: Loss,
    kind: str = "exact",
    *,
    vectors: Tensor | None = None,
    output: Callable[[Any], Tensor] | None = None,
    computed: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the P × P Fisher matrix.

    Args:
        model: The model.
        x: Its input.
        y: Targets.
        loss: One of the losses above.
        kind: "exact" (JᵀΛJ), "empirical" (outer products of per-sample gradients), or "mc" with
            given output vectors.
        vectors: Output vectors (K, N, ...) for "mc", scaled so that products add up.
        output: Picks the output tensor.
        computed: What :func:`jacobian` returned, if it is known already.
    """
    z, jac = computed if computed is not None else jacobian(model, x, output)
    count = loss.count(z, y)
    if kind == "exact":
        flat = jac.reshape(-1, jac.shape[-1])
        return flat.T @ output_hessian(loss, z, y) @ flat / count
    if kind == "empirical":
        vectors = output_gradient(loss, z, y).unsqueeze(0)
    assert vectors is not None
    pulled = rows(jac, vectors).flatten(0, 1)
    return pulled.T @ pulled / count


# -- block masks -----------------------------------------------------------------------------------


def block_diagonal(matrix: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """Keep the entries between indices of the same group."""
    result = torch.zeros_like(matrix)
    for group in groups:
        g = group.flatten()
        result[g.unsqueeze(1), g] = matrix[g.unsqueeze(1), g]
    return result


def block_tridiagonal(matrix: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """Keep the entries between indices of the same or of neighbouring groups."""
    result = block_diagonal(matrix, groups)
    for left, right in itertools.pairwise(groups):
        for a, b in ((left.flatten(), right.flatten()), (right.flatten(), left.flatten())):
            result[a.unsqueeze(1), b] = matrix[a.unsqueeze(1), b]
    return result


def diagonal(matrix: Tensor) -> Tensor:
    """Keep the diagonal."""
    return torch.diag(matrix.diagonal())


# -- blocks of a model -----------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockSpec:
    """One block as a test expects it.

    Attributes:
        names: Qualified parameter names.
        layer: Qualified name of the layer, for Kronecker factors.
        unit: What an output unit is: "rows" (first dimension of every parameter), "columns" (second
            dimension of the weight), "entries", "transposed" (an output channel of a transposed
            convolution, and a kernel entry if it has no bias), or "whole" (the block is one unit).
    """

    names: tuple[str, ...]
    layer: str = ""
    unit: str = "rows"


def block_indices(model: nn.Module, specs: Sequence[BlockSpec]) -> list[Tensor]:
    """Return the flat indices of each block."""
    where = indices(model)
    return [torch.cat([where[name].flatten() for name in spec.names]) for spec in specs]


def unit_indices(model: nn.Module, specs: Sequence[BlockSpec]) -> list[Tensor]:
    """Return the flat indices of each output unit of each block."""
    where = indices(model)
    result = []
    for spec in specs:
        parts = [where[name] for name in spec.names]
        if spec.unit == "whole":
            result.append(torch.cat([part.flatten() for part in parts]))
            continue
        if spec.unit == "columns":
            parts = [part.movedim(1, 0) for part in parts]
        elif spec.unit == "entries":
            parts = [part.flatten() for part in parts]
        elif spec.unit == "transposed":
            parts = [augmented_indices(model, spec).flatten(0, 1)]
        for unit in range(len(parts[0])):
            result.append(torch.cat([part[unit].flatten() for part in parts]))
    return result


def unit_wise(matrix: Tensor, model: nn.Module, specs: Sequence[BlockSpec]) -> Tensor:
    """Keep the entries between parameters of the same output unit."""
    return block_diagonal(matrix, unit_indices(model, specs))


def structured(
    matrix: Tensor, structure: str, model: nn.Module, specs: Sequence[BlockSpec]
) -> Tensor:
    """Apply the mask of a structure (any but "kfac") to a dense Fisher matrix."""
    if structure == "full":
        return matrix
    if structure == "diagonal":
        return diagonal(matrix)
    if structure == "unit_wise":
        return unit_wise(matrix, model, specs)
    blocks = block_indices(model, specs)
    if structure == "block_diagonal":
        return block_diagonal(matrix, blocks)
    return block_tridiagonal(matrix, blocks)


# -- Kronecker factors -----------------------------------------------------------------------------


@dataclass
class Recorded:
    """A layer's calls in one forward pass: inputs, and output gradients (K, ...) per vector."""

    inputs: list[Tensor]
    gradients: list[Tensor]


def record(
    model: nn.Module,
    x: Any,
    vectors: Tensor,
    layers: Sequence[str],
    output: Callable[[Any], Tensor] | None = None,
) -> tuple[nn.Module, dict[str, Recorded]]:
    """Record layers' inputs and pull vectors (K, N, ...) back to their outputs."""
    model = with_fixed_statistics(model, x)
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def hook(name: str) -> Callable[..., Tensor]:
        def keep(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
            inputs[name].append(args[0].detach())
            outputs[name].append(result)
            return result.clone()  # what follows may work in place

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in layers]
    z = call(model, x, output)
    for handle in handles:
        handle.remove()
    result = {}
    for name in layers:
        gradients = [
            torch.stack(
                [
                    torch.autograd.grad(
                        z, out, v, retain_graph=True, allow_unused=True, materialize_grads=True
                    )[0]
                    for v in vectors
                ]
            )
            for out in outputs[name]
        ]
        result[name] = Recorded(inputs[name], gradients)
    return model, result


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


def _corners(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(size) for size in shape))


def _windows(
    images: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int],
    positions: Sequence[int],
) -> Tensor:  # fmt: skip
    """Cut windows out of (N, C, ...) one by one: (N, T, C, K) with K kernel entries."""
    result = []
    for corner in _corners(positions):
        entries = []
        for offset in _corners(kernel):
            at = tuple(
                c * s + o * d for c, s, o, d in zip(corner, stride, offset, dilation, strict=True)
            )
            entries.append(images[(slice(None), slice(None), *at)])
        result.append(torch.stack(entries, -1))
    return torch.stack(result, 1)


def _padded(layer: Any, images: Tensor) -> Tensor:
    """Pad images as a convolution does."""
    dims = images.dim() - 2
    kernel, dilation = _tuple(layer.kernel_size, dims), _tuple(layer.dilation, dims)
    if layer.padding == "valid":
        sides = [(0, 0)] * dims
    elif layer.padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in _tuple(layer.padding, dims)]
    amounts = [amount for side in reversed(sides) for amount in side]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return functional.pad(images, amounts, mode=mode) if any(amounts) else images


def _channels_last(tensor: Tensor, lead: int, groups: int) -> Tensor:
    """(*lead, C, ...) to (*lead, T, G, C/G)."""
    moved = tensor.movedim(lead, -1)
    return moved.reshape(*tensor.shape[:lead], -1, groups, tensor.shape[lead] // groups)


def pairs(layer: nn.Module, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer's inputs (N, T, G, d_in) and output gradients (K, N, T, G, d_out).

    Args:
        layer: The layer.
        x: Input of one call, (N, ...).
        delta: Output gradients, (K, N, ...).
    """
    n, k = len(x), len(delta)
    if isinstance(layer, nn.Embedding):
        a = functional.one_hot(x, layer.num_embeddings).to(delta.dtype)
        if layer.padding_idx is not None:
            delta = delta * (x != layer.padding_idx).unsqueeze(-1)
        return a.reshape(n, -1, 1, a.shape[-1]), delta.reshape(k, n, -1, 1, delta.shape[-1])
    if isinstance(layer, nn.Linear):
        return x.reshape(n, -1, 1, x.shape[-1]), delta.reshape(k, n, -1, 1, delta.shape[-1])
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        if layer.bias is not None:
            return _stamped(layer, x), _channels_last(delta, 2, layer.groups)
        dims = x.dim() - 2
        amounts = [p for p in reversed(_tuple(layer.padding, dims)) for _ in range(2)]
        padded = functional.pad(delta.flatten(0, 1), amounts)
        cut = _windows(padded, layer.kernel_size, layer.stride, layer.dilation, x.shape[2:])
        d = cut.reshape(k, n, cut.shape[1], layer.groups, -1)
        return _channels_last(x, 1, layer.groups), d
    if isinstance(layer, nn.modules.conv._ConvNd):
        cut = _windows(
            _padded(layer, x), layer.kernel_size, layer.stride, layer.dilation, delta.shape[3:]
        )
        a = cut.reshape(n, cut.shape[1], layer.groups, -1)
        return a, _channels_last(delta, 2, layer.groups)
    plain = copy.deepcopy(layer)
    for name, parameter in plain.named_parameters():
        nn.init.constant_(parameter, float(name == "weight"))
    with torch.no_grad():
        normalized = plain(x)
    if not isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        normalized, delta = normalized.movedim(1, -1), delta.movedim(2, -1)
        width = normalized.shape[-1]
    else:
        width = int(torch.Size(layer.normalized_shape).numel())
    return normalized.reshape(n, -1, width, 1), delta.reshape(k, n, -1, width, 1)


def _stamped(layer: Any, x: Tensor) -> Tensor:
    """Return what every kernel entry alone makes of every channel, (N, T, G, C/G · kernel)."""
    transposed = (functional.conv_transpose1d, functional.conv_transpose2d,
                  functional.conv_transpose3d)[x.dim() - 3]  # fmt: skip
    size = int(torch.Size(layer.kernel_size).numel())
    kernels = torch.eye(size, dtype=x.dtype).reshape(1, size, *layer.kernel_size)
    options = (layer.stride, layer.padding, layer.output_padding, 1, layer.dilation)
    images = transposed(x.flatten(0, 1).unsqueeze(1), kernels, None, *options)
    moved = images.reshape(*x.shape[:2], size, -1).permute(0, 3, 1, 2)
    return moved.reshape(len(x), moved.shape[1], layer.groups, -1)


def augmented_indices(model: nn.Module, spec: BlockSpec) -> Tensor:
    """Return the flat index of every entry of the matrices [W | b], (G, d_out, d_in + bias)."""
    where = indices(model)
    layer = model.get_submodule(spec.layer)
    groups = getattr(layer, "groups", 1)
    parts = []
    for name in spec.names:
        index, local = where[name], name.rsplit(".", 1)[-1]
        if local == "bias" or isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
            flat = index.reshape(-1)
            parts.append(_norm_or_bias(layer, flat, groups))
        elif isinstance(layer, nn.Embedding):
            parts.append(index.T.unsqueeze(0))
        elif isinstance(layer, nn.modules.conv._ConvTransposeNd):
            if len(spec.names) == 1:
                parts.append(index.reshape(groups, layer.in_channels // groups, -1).mT)
                continue
            d_in, d_out = layer.in_channels // groups, layer.out_channels // groups
            parts.append(index.reshape(groups, d_in, d_out, -1).transpose(1, 2).flatten(2))
        elif index.dim() == 1:
            parts.append(index.reshape(-1, 1, 1))
        else:
            parts.append(index.reshape(groups, len(index) // groups, -1))
    return torch.cat(parts, -1)


def _norm_or_bias(layer: nn.Module, flat: Tensor, groups: int) -> Tensor:
    if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
        return flat.reshape(groups, -1, 1)
    return flat.reshape(-1, 1, 1)


def kfac_factors(
    layer: nn.Module,
    recorded: Recorded,
    count: float,
    *,
    weight: bool = True,
    bias: bool = True,
    sharing: str = "expand",
    partial: Tensor | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Return one pair (A, B) per group by sums over samples, vectors and positions.

    Args:
        layer: The layer.
        recorded: Its inputs and output gradients.
        count: What the mean over events divides by.
        weight: Whether the weight is trained.
        bias: Whether there is a trained bias.
        sharing: "expand", "reduce" or "split".
        partial: Samples of which an event is ignored, (N,): their positions that no vector reaches
            are not in A.
    """
    both = [pairs(layer, x, d) for x, d in zip(recorded.inputs, recorded.gradients, strict=True)]
    a = torch.cat([pair[0] for pair in both], 1)
    delta = torch.cat([pair[1] for pair in both], 2)
    if sharing == "split" and isinstance(layer, nn.Embedding):
        sharing = "expand"
    if not weight:
        a = a[..., :0]
    if bias:
        a = torch.cat([a, torch.ones_like(delta[0, ..., :1])], -1)
    return [
        (factor_a, factor_b / count)
        for factor_a, factor_b in (
            second_moments(a[:, :, g], delta[:, :, :, g], sharing, partial)
            for g in range(a.shape[2])
        )
    ]


def second_moments(
    a: Tensor, delta: Tensor, sharing: str = "expand", partial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the mean of ``a aᵀ`` and the sum of ``δ δᵀ`` of one group.

    Args:
        a: Inputs, (N, T, d_in + bias).
        delta: Output gradients, (K, N, T, d_out).
        sharing: "expand", "reduce" or "split", which has the partial traces of the sum of the
            products of means and of deviations, and of a single unit the exact block.
        partial: Samples, (N,), whose positions that no vector reaches are not in the mean.
    """
    if sharing == "split" and a.shape[1] > 1 and delta.shape[3] == 1:
        rows = torch.einsum("nti,knto->kni", a, delta)
        inputs = torch.einsum("kni,knj->ij", rows, rows) / len(a)
        return inputs, torch.full((1, 1), float(len(a)), dtype=a.dtype)
    if sharing == "split" and a.shape[1] > 1:
        mean, total, _ = shared(a, delta, "reduce", partial)
        counted = shared(a, delta, "expand", partial)[2]
        number = counted.sum(1)[:, None, None]
        # An unbiased covariance divides by T - 1.
        delta_rest = (delta - total / number.clamp(min=1)) * (
            number / (number - 1).clamp(min=1)
        ).sqrt()
        rest = (a - mean) * counted.unsqueeze(-1), delta_rest * counted.unsqueeze(-1)
        inputs = torch.einsum("nti,ntj->ij", rest[0], rest[0]) / counted.sum()
        both = [
            second_moments(a, delta, "reduce", partial),
            (inputs, torch.einsum("knto,kntp->op", rest[1], rest[1])),
        ]
        trace = sum(x.trace() * y.trace() for x, y in both)
        merged = sum(x * y.trace() for x, y in both) / torch.where(trace == 0, 1.0, trace)
        return merged, sum(y * x.trace() for x, y in both)
    a, delta, counted = shared(a, delta, sharing, partial)
    inputs = torch.einsum("nt,nti,ntj->ij", counted, a, a) / counted.sum()
    return inputs, torch.einsum("knto,kntp->op", delta, delta)


def shared(
    a: Tensor, delta: Tensor, sharing: str = "expand", partial: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, output gradients and which positions count, (N, T), in a setting.

    "reduce" leaves one position: the mean input over those that count, the summed gradient.
    """
    loud = (delta != 0).any(3).any(0)
    loud = torch.ones_like(loud) if partial is None else loud | ~partial[:, None]
    counted = loud.to(a.dtype)
    if sharing in ("expand", "split"):
        return a, delta, counted
    mean = torch.einsum("nt,nti->ni", counted, a) / counted.sum(1, keepdim=True).clamp(min=1)
    return mean.unsqueeze(1), delta.sum(2, keepdim=True), loud.any(1, keepdim=True).to(a.dtype)


def kron(size: int, where: Tensor, factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Place ``B ⊗ A`` of every group at its entries, (G, d_out, d_in + bias), of a P × P matrix."""
    result = torch.zeros(size, size, dtype=factors[0][0].dtype)
    for group, (a, b) in zip(where, factors, strict=True):
        index = group.flatten()
        result[index.unsqueeze(1), index] = torch.kron(b.contiguous(), a.contiguous())
    return result


def kfac_pairs(
    model: nn.Module,
    x: Any,
    y: Tensor,
    loss: Loss,
    specs: Sequence[BlockSpec],
    kind: str = "exact",
    *,
    vectors: Tensor | None = None,
    sharing: str = "expand",
    partial: Tensor | None = None,
    output: Callable[[Any], Tensor] | None = None,
) -> list[tuple[Tensor, list[tuple[Tensor, Tensor]]]]:
    """Return, per block, the indices (G, d_out, d_in + bias) and the pairs (A, B) of its groups."""
    with torch.no_grad():
        z = call(with_fixed_statistics(model, x), x, output)
    if vectors is None:
        vectors = fisher_vectors(loss, z, y, kind)
    count = loss.count(z, y)
    layers = list(dict.fromkeys(spec.layer for spec in specs))
    fixed, recorded = record(model, x, vectors, layers, output)
    result = []
    for spec in specs:
        if not recorded[spec.layer].inputs:
            continue
        layer = fixed.get_submodule(spec.layer)
        factors = kfac_factors(
            layer,
            recorded[spec.layer],
            count,
            weight=any(not name.endswith("bias") for name in spec.names),
            bias=any(name.endswith("bias") for name in spec.names),
            sharing=sharing,
            partial=partial,
        )
        result.append((augmented_indices(model, spec), factors))
    return result


def kfac(
    model: nn.Module,
    x: Any,
    y: Tensor,
    loss: Loss,
    specs: Sequence[BlockSpec],
    kind: str = "exact",
    **options: Any,
) -> Tensor:
    """Return the P × P K-FAC matrix; blocks whose unit is "whole" are kept exactly."""
    size = sum(p.numel() for p in parameters(model).values())
    total = torch.zeros(size, size, dtype=torch.float64)
    factored = [spec for spec in specs if spec.unit != "whole"]
    if len(factored) < len(specs):
        whole = [spec for spec in specs if spec.unit == "whole"]
        exact = fisher(model, x, y, loss, kind, output=options.get("output"))
        total += block_diagonal(exact, block_indices(model, whole))
    for where, factors in kfac_pairs(model, x, y, loss, factored, kind, **options):
        total += kron(size, where, factors)
    return total


def pi_damped_inverse(
    size: int,
    pairs_of_blocks: Sequence[tuple[Tensor, Sequence[tuple[Tensor, Tensor]]]],
    damping: float,
) -> Tensor:
    """Return the P × P inverse of ``(B + √λ/π I) ⊗ (A + π√λ I)``, π² = mean(A_ii) / mean(B_jj)."""
    total = torch.zeros(size, size, dtype=torch.float64)
    for where, factors in pairs_of_blocks:
        inverses = []
        for a, b in factors:
            pi = (a.diagonal().mean() / b.diagonal().mean()).sqrt()
            damped_a = a + pi * damping**0.5 * torch.eye(len(a), dtype=a.dtype)
            damped_b = b + damping**0.5 / pi * torch.eye(len(b), dtype=b.dtype)
            inverses.append((torch.linalg.inv(damped_a), torch.linalg.inv(damped_b)))
        total += kron(size, where, inverses)
    return total


# -- comparing -------------------------------------------------------------------------------------


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Assert that two tensors agree to a relative error in the largest entry and in the norm."""
    assert actual.shape == expected.shape, (tuple(actual.shape), tuple(expected.shape))
    assert actual.dtype == torch.float64, actual.dtype
    error = torch.linalg.vector_norm((actual - expected).flatten())
    scale = torch.linalg.vector_norm(expected.flatten())
    assert error <= tolerance * scale, f"relative error {float(error / scale):.3g}"

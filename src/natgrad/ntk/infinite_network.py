r"""A fully connected network of infinite width in function space.

For every layer the limit knows ``Q_l`` (inner products of inputs, bias included) and ``B_l`` (of
output gradients); ``Θ_l = Q_l ∘ B_l / N`` governs gradient descent, exact and layer-wise natural
gradients, ``Q_l`` and ``B_l`` apart govern K-FAC (Karakida & Osawa 2020).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from natgrad import linalg
from natgrad.arguments import check_damping
from natgrad.capture.evaluation import undisturbed
from natgrad.likelihoods import Likelihood
from natgrad.ntk.coefficients import isotropic_constant
from natgrad.ntk.conditions import related_samples
from natgrad.ntk.dynamics import NetworkInFunctionSpace
from natgrad.ntk.infinite import InfiniteKernel, infinite_kernel
from natgrad.ntk.networks import Architecture
from natgrad.operators.block_tridiagonal import BlockElimination, tridiagonal_coefficients


@dataclass(frozen=True)
class _Layer:
    """One layer's kernels between training inputs, and from others to them (None without).

    With roots S of the output Hessian the gradients are ``Sᵀδ``; ``gradients`` is then
    ``SᵀBS`` (N·K, N·K) and ``left``/``cross`` are ``BS`` and ``B'S``. Without, all are per output.
    """

    inputs: Tensor
    cross_inputs: Tensor | None
    gradients: Tensor
    left: Tensor
    cross: Tensor | None
    outputs: int
    columns: int
    fan_in: int
    units: int

    def kernel(self, name: str) -> Tensor:
        """Return the Hadamard product of inputs with ``gradients``, ``left`` or ``cross``."""
        values = getattr(self, name)
        inputs = self.cross_inputs if name == "cross" else self.inputs
        assert inputs is not None
        rows = self.columns if name == "gradients" else self.outputs
        found: Tensor = _repeat_for_outputs(inputs, rows, self.columns) * values
        return found


class InfiniteNetwork(NetworkInFunctionSpace):
    """The infinite-width limit of a fully connected network in NTK parameterisation.

    Args:
        network: A model whose limit to take, as :class:`natgrad.ntk.MLP`, or an
            :class:`~natgrad.ntk.networks.Architecture`. A model also gives the outputs training
            starts from; those of an architecture are zero, the mean over random weights.
        x: Training inputs, ``(N, …)``.
        x_test: Further inputs, or None.

    Attributes:
        kernel: The kernels between training inputs.
        test_kernel: Those from test to training inputs, or None.

    Raises:
        ValueError: If the model is not a chain that has a known limit, or the inputs do not fit;
            see :func:`infinite_kernel`.
    """

    def __init__(
        self, network: Architecture | nn.Module, x: Tensor, x_test: Tensor | None = None
    ) -> None:
        model = network if isinstance(network, nn.Module) else None
        if isinstance(network, nn.Module):
            network = Architecture.of(network)
        self.architecture: Architecture = network
        self.kernel: InfiniteKernel = infinite_kernel(network, x)
        self.test_kernel: InfiniteKernel | None = (
            None if x_test is None else infinite_kernel(network, x_test, x)
        )
        _warn_if_singular(self.kernel.total, x)
        self.outputs: Tensor = self._initial(model, x)
        self.test_outputs: Tensor | None = None if x_test is None else self._initial(model, x_test)

    def _initial(self, model: nn.Module | None, x: Tensor) -> Tensor:
        if model is None:
            shape = (len(x), self.architecture.outputs)
            return torch.zeros(shape, dtype=torch.float64, device=x.device)
        with undisturbed(model), torch.no_grad():
            dtype = next(model.parameters()).dtype
            outputs: Tensor = model(x.to(dtype)).double()
            return outputs

    def maps(self, structure: str, damping: float = 0.0) -> tuple[Tensor, Tensor | None]:
        """Return K ``(N, N)`` and K' ``(N', N)``, the same for every output.

        See :meth:`NetworkInFunctionSpace.maps`. Unit-wise natural gradients have a limit at zero
        damping only, ``K = αI``, and only on the training inputs: on others what one unit does
        depends on the ratio of its output gradients, which has no mean.
        """
        check_damping(damping)
        if structure == "unit_wise":
            return self._unit_wise(damping), None
        return self._solve(structure, damping, self._layers(None), self.samples)

    def change(
        self,
        structure: str,
        damping: float,
        likelihood: Likelihood,
        outputs: Tensor,
        target: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the outputs' change; see :meth:`NetworkInFunctionSpace.change`."""
        check_damping(damping)
        samples, classes = outputs.shape
        count = float(likelihood.count(outputs, target))
        gradient = likelihood.gradient(outputs, target)
        if structure == "gd":
            train, test = self._solve("gd", damping, self._layers(None), count)
            return -train @ gradient, None if test is None else -test @ gradient
        if structure == "unit_wise":
            raise ValueError(
                "unit-wise natural gradients have an infinite-width limit for the squared loss "
                "only: use natgrad.ntk.LinearizedNetwork, or output_damping"
            )
        roots = likelihood.root_vectors(outputs, target).permute(1, 2, 0)  # (N, C, K)
        coordinates = likelihood.root_inverse_apply(outputs, gradient, target).reshape(-1, 1)
        train, test = self._solve(structure, damping, self._layers(roots), count)
        change = -(train @ coordinates).view(samples, classes)
        return change, None if test is None else -(test @ coordinates).view(-1, classes)

    def _layers(self, roots: Tensor | None) -> list[_Layer]:
        """Return every layer's kernels, its gradients multiplied by the roots ``(N, C, K)``."""
        layers = []
        test = self.test_kernel
        widths = self.architecture.widths
        for index in range(self.kernel.depth):
            gradients = left = self.kernel.backward[index]
            cross = None if test is None else test.backward[index]
            outputs = columns = 1
            if roots is not None:
                outputs, columns = roots.shape[1:]
                left = _times_roots(left, roots)
                cross = None if cross is None else _times_roots(cross, roots)
                weighted = torch.einsum("nck,nm,mcj->nkmj", roots, gradients, roots)
                gradients = weighted.reshape(left.shape[1], left.shape[1])
            layers.append(
                _Layer(
                    self.kernel.preactivation[index],
                    None if test is None else test.preactivation[index],
                    gradients,
                    left,
                    cross,
                    outputs,
                    columns,
                    widths[index] + int(self.architecture.bias_variances[index] > 0),
                    widths[index + 1],
                )
            )
        return layers

    def _solve(
        self, structure: str, damping: float, layers: list[_Layer], count: float
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``J(F + λI)⁻¹Ĵᵀ/count`` on training and test rows, ``Ĵ = SᵀJ``."""
        if structure == "kfac":
            return self._kfac(damping, layers, count)
        grams = [layer.kernel("gradients") / count for layer in layers]
        # What every Ĵ_lᵀ is multiplied by, (N·K, N·K).
        if structure == "gd":
            inner = [torch.eye(len(grams[0]), dtype=torch.float64, device=grams[0].device)]
        elif structure == "full":
            inner = [_inverse(torch.stack(grams).sum(0), damping)]
        elif structure == "block_diagonal":
            inner = [_inverse(gram, damping) for gram in grams]
        elif structure == "block_tridiagonal":
            inner = _tridiagonal(grams, damping)
        else:
            raise ValueError(
                f"structure {structure!r} has no known infinite-width limit: use "
                "natgrad.ntk.LinearizedNetwork, which has a map for every structure"
            )
        if len(inner) == 1:
            inner = inner * len(layers)
        train = [layer.kernel("left") @ m / count for layer, m in zip(layers, inner, strict=True)]
        if self.test_kernel is None:
            return _sum(train), None
        test = [layer.kernel("cross") @ m / count for layer, m in zip(layers, inner, strict=True)]
        return _sum(train), _sum(test)

    def _kfac(
        self, damping: float, layers: list[_Layer], count: float
    ) -> tuple[Tensor, Tensor | None]:
        """Return K-FAC's map, π rule: ``Q(Q/N + ρ_A)⁻¹ ∘ BS(SᵀBS/count + ρ_B)⁻¹ / count``."""
        train, test = [], []
        for layer in layers:
            inputs, gradients = layer.inputs / self.samples, layer.gradients / count
            # Per output, C equal blocks make up the trace of the output factor.
            repeats = self.architecture.outputs if layer.outputs == 1 else 1
            mean_a = float(inputs.trace()) / layer.fan_in
            mean_b = float(gradients.trace()) * repeats / layer.units
            pi = (mean_a / mean_b) ** 0.5
            inverse_a = _inverse(inputs, pi * damping**0.5)
            inverse_b = _inverse(gradients, damping**0.5 / pi)
            shape = layer.outputs, layer.columns
            part = _repeat_for_outputs(layer.inputs @ inverse_a, *shape) * (layer.left @ inverse_b)
            train.append(part / count)
            if layer.cross_inputs is not None and layer.cross is not None:
                moved = _repeat_for_outputs(layer.cross_inputs @ inverse_a, *shape)
                test.append(moved * (layer.cross @ inverse_b) / count)
        return _sum(train), _sum(test) if test else None

    def _unit_wise(self, damping: float) -> Tensor:
        if damping > 0 or self.test_kernel is not None:
            raise ValueError(
                "unit-wise natural gradients have an infinite-width limit at zero damping and on "
                "training inputs only: use natgrad.ntk.LinearizedNetwork, which takes damping and "
                "test inputs"
            )
        hidden = self.architecture.widths[1:-1]
        alpha = isotropic_constant(
            "unit_wise",
            self.architecture.depth,
            self.samples,
            outputs=self.architecture.outputs,
            width=sum(hidden) // max(1, len(hidden)),
            active_fraction=self.architecture.activation.active_fraction,
        )
        return alpha * torch.eye(self.samples, dtype=torch.float64, device=self.outputs.device)


def _warn_if_singular(kernel: Tensor, x: Tensor) -> None:
    """Say which samples make the kernel singular; its pseudo-inverse is used at zero damping."""
    values = torch.linalg.eigvalsh(kernel)
    equal, aligned = related_samples(x.detach())
    diagonal = kernel.diagonal()
    # Parallel inputs have parallel rows where nothing but their direction matters.
    parallel = [
        (i, j) for i, j in aligned if kernel[i, j] ** 2 >= (1.0 - 1e-6) * diagonal[i] * diagonal[j]
    ]
    singular = float(values[0]) <= len(values) * torch.finfo(values.dtype).eps * float(values[-1])
    if not (singular or equal or parallel):
        return
    pairs = [f"samples {i} and {j} are equal" for i, j in equal[:3]]
    pairs += [f"samples {i} and {j} are parallel or opposite" for i, j in parallel[:3]]
    warnings.warn(
        "the tangent kernel of the training inputs is singular, so the theory's condition of full "
        f"rank does not hold ({'; '.join(pairs) or 'no two inputs are parallel'}); at zero damping "
        "its pseudo-inverse is used, and residuals outside its range stay as they are",
        stacklevel=3,
    )


def _sum(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0)


def _repeat_for_outputs(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Return ``matrix ⊗ 1``: every entry repeated for ``rows × columns`` outputs."""
    if rows == columns == 1:
        return matrix
    return matrix.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def _times_roots(gradients: Tensor, roots: Tensor) -> Tensor:
    """Return ``(B ⊗ I_C) S``, ``(N'·C, N·K)``."""
    product = torch.einsum("nm,mck->ncmk", gradients, roots)
    return product.flatten(2, 3).flatten(0, 1)


def _inverse(matrix: Tensor, damping: float) -> Tensor:
    """Return ``(M + λI)⁻¹``, or the pseudo-inverse at λ = 0."""
    if damping > 0:
        return linalg.inverse(linalg.add_to_diagonal(matrix, damping))
    values, vectors = linalg.eigh(matrix)
    return (vectors * linalg.inverse_on_range(values)) @ vectors.T


def _tridiagonal(grams: list[Tensor], damping: float) -> list[Tensor]:
    """Return the layers' parts of ``((Σ ⊗ I)Θ + λI)⁻¹(1 ⊗ I)``; ``c_l Θ_l⁺`` at λ = 0."""
    if damping == 0:
        shares = tridiagonal_coefficients(len(grams)).tolist()
        return [c * _inverse(gram, 0.0) for c, gram in zip(shares, grams, strict=True)]
    eye = torch.eye(grams[0].shape[0], dtype=grams[0].dtype, device=grams[0].device)
    try:
        elimination = BlockElimination(grams, damping)
    except linalg.FactorizationError as error:
        raise ValueError(str(error)) from error
    return list(elimination.solve(eye.expand(len(grams), *eye.shape)))

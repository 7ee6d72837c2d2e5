r"""KPSVD: every layer's block as the nearest sum of Kronecker products.

.. math:: F_l \approx \sum_{r=1}^R B_r \otimes A_r, \qquad
          \text{least } \Bigl\|F_l - \sum_r B_r \otimes A_r\Bigr\|_F
          \text{ over symmetric } A_r, B_r

Rearranged so that ``B ⊗ A`` becomes ``vec(A) vec(B)ᵀ`` (Van Loan & Pitsianis 1993), the block is
``Z`` with ``Z vec(V) = vec(Σ MᵀVM)/count`` and ``Zᵀ vec(U) = vec(Σ MUMᵀ)/count`` for per-sample
gradients ``M``, so the leading singular pairs follow from products with the rows (Koroko et al.
2022). ``Z`` is never formed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.curvature.base import GradientSource, check_choice, refuse_options
from natgrad.curvature.cost import Cost, Workload
from natgrad.curvature.factors import pi_shifts
from natgrad.curvature.function_space import map_by_columns
from natgrad.curvature.kfac import DampingRule, KroneckerPart
from natgrad.curvature.kronecker_svd import Product, deflation, lanczos, symmetric
from natgrad.curvature.partitioned import CurvaturePart, PartitionedFisher
from natgrad.curvature.registry import register_structure
from natgrad.jacobians import Jacobians, LayerJacobian, LinearJacobian
from natgrad.layouts import BlockLayout, ParameterLayout
from natgrad.linalg import FactorizationError

__all__ = ["KPSVDFisher", "KroneckerSumPart", "SVDMethod"]

SVDMethod = Literal["deflation", "lanczos"]


class KroneckerSumPart(CurvaturePart):
    """One layer's leading Kronecker products.

    Over one update they are the truncated singular value decomposition of the rearranged block,
    among symmetric factors (without shared positions all others vanish). The rows are gone
    afterwards, so a further update decomposes the discounted sum of products so far *plus* the new
    rows, and truncates again. Groups have ``R`` products each; blocks between them are zero.

    The first product of one update is positive semi-definite, for ``R = 1`` of any number of
    updates; later ones are indefinite.

    Args:
        name: Block name.
        layout: Its layout.
        parameters: Order, dtype and device of all parameters.
        rank: Number of products ``R``.
        method: ``"deflation"`` finds one product after the other by power iteration, ``"lanczos"``
            all at once in a Krylov space, with full orthogonalisation.
        damping_rule: ``"tikhonov"`` inverts ``F_l + λI``: in the eigenbases for ``R = 1``, else
            through the dense block, ``P_l × P_l``. ``"pi"`` inverts
            ``(B_1 + √λ/π I) ⊗ (A_1 + π√λ I) + B_2 ⊗ A_2`` with
            ``π² = (tr A_1 / d_a) / (tr B_1 / d_g)`` by diagonalising both sides simultaneously.
        tolerance: Singular pairs are found once ``‖Zᵀu − σv‖`` is below this times the largest σ.
        max_iterations: Most iterations, for each product in ``"deflation"``.
    """

    def __init__(
        self,
        name: str,
        layout: BlockLayout,
        parameters: ParameterLayout,
        rank: int = 1,
        method: SVDMethod = "lanczos",
        damping_rule: DampingRule = "tikhonov",
        tolerance: float = 1e-12,
        max_iterations: int = 1000,
    ) -> None:
        self.name = name
        self.layout = layout
        self.parameters = parameters
        self.names, self.sizes, self.numel = layout.names, layout.sizes, layout.numel
        self.rank, self.method, self.damping_rule = rank, method, damping_rule
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self.count = 0.0
        self.inputs: Tensor | None = None  # Σ B_r ⊗ A_r is a sum over rows, (R, G, d, d) each.
        self.outputs: Tensor | None = None
        self._discount = 1.0  # Still to be applied to that sum.
        self._inverse: tuple[Tensor, ...] | None = None
        self._warned = False

    # Accumulation.

    def update(self, jacobians: Jacobians, count: Tensor | float) -> None:
        """Decompose what there is plus new rows; rows that are not finite are left out."""
        if self.name not in jacobians:
            self.count += float(count)
            return
        rows = jacobians[self.name]
        if not rows.is_finite():
            return
        forward, adjoint = self._products(rows)
        layout = self.layout
        eye = torch.eye(layout.d_out, dtype=rows.dtype, device=rows.device)
        start = eye.expand(layout.groups, -1, -1)
        decompose = deflation if self.method == "deflation" else lanczos
        try:
            inputs, outputs = decompose(
                forward, adjoint, start, self.rank, self.tolerance, self.max_iterations
            )
        except torch.linalg.LinAlgError:  # Products of finite rows may overflow.
            return
        if not bool(torch.isfinite(inputs).all() & torch.isfinite(outputs).all()):
            return
        self.count += float(count)
        self.inputs, self.outputs = inputs, outputs
        self._discount = 1.0

    def _products(self, rows: LayerJacobian) -> tuple[Product, Product]:
        """Return ``V ↦ Σ MᵀVM`` and ``U ↦ Σ MUMᵀ``, the discounted products so far included."""
        old_a, old_b, discount = self.inputs, self.outputs, self._discount

        def forward(v: Tensor) -> Tensor:
            result = _contract_outputs(rows, v)
            if old_a is not None and old_b is not None:
                weights = discount * (old_b * v).sum((-2, -1))
                result = result + torch.einsum("rg,rgij->gij", weights, old_a)
            return symmetric(result)

        def adjoint(u: Tensor) -> Tensor:
            result = _contract_inputs(rows, u)
            if old_a is not None and old_b is not None:
                weights = discount * (old_a * u).sum((-2, -1))
                result = result + torch.einsum("rg,rgop->gop", weights, old_b)
            return symmetric(result)

        return forward, adjoint

    def discount(self, factor: float) -> None:
        """Discount counts at once, products with the next update; with 0 forget them."""
        self.count *= factor
        self._discount *= factor
        if factor == 0.0:
            self.inputs = self.outputs = None
            self._discount = 1.0

    def kronecker_pairs(self) -> tuple[Tensor, Tensor]:
        """Return ``A``, ``(R, G, d_in + bias, d_in + bias)``, and ``B``, ``(R, G, d_out, d_out)``.

        The largest product comes first; ``‖A_r‖ = ‖B_r‖``. Zero where nothing was seen yet.
        """
        if self.inputs is None or self.outputs is None:
            d_in, d_out, groups = self.layout.d_augmented, self.layout.d_out, self.layout.groups
            zeros = self.parameters.zeros
            return zeros(self.rank, groups, d_in, d_in), zeros(self.rank, groups, d_out, d_out)
        if self.count == 0:
            return torch.zeros_like(self.inputs), torch.zeros_like(self.outputs)
        scale = (self._discount / self.count) ** 0.5
        return self.inputs * scale, self.outputs * scale

    # The matrix.

    def matvec(self, columns: Tensor) -> Tensor:
        """Return ``Σ_r B_r V A_r`` for ``(P_l, k)``."""
        a, b = self.kronecker_pairs()
        matrices = self.layout.matrix(columns.T)
        result = torch.zeros_like(matrices)
        for left, right in zip(b, a, strict=True):
            result = result + left @ matrices @ right
        return self.layout.flat(result).T

    def solver(self, damping: float) -> Callable[[Tensor], Tensor]:
        """Invert by the damping rule; zero damping is the pseudo-inverse in both.

        Raises:
            FactorizationError: If ``"pi"`` meets a damped matrix that is not positive definite.
            ValueError: If the dense block is needed and does not fit memory.
        """
        inverse = self._inverse_of(damping)
        return lambda columns: self._apply(inverse, columns)

    def _inverse_of(self, damping: float, positive: bool = False) -> tuple[Tensor, ...]:
        """Return ``(K_b, K_a, scale)`` or the dense inverse ``(P_l, P_l)``.

        With ``positive`` a damped matrix that is not positive definite is an error.
        """
        if self.damping_rule == "pi" and damping > 0:
            return self._simultaneous(damping)
        if self.rank == 1:
            return self._leading(damping)
        values, vectors = self._dense_spectrum()
        if damping > 0:
            if positive and not bool((values + damping > 0).all()):
                raise FactorizationError("the damped sum of products is not positive definite")
            return ((vectors / (values + damping)) @ vectors.mT,)
        return (torch.linalg.pinv(self.to_dense(), hermitian=True),)

    def _dense_spectrum(self) -> tuple[Tensor, Tensor]:
        a, _ = self.kronecker_pairs()
        linalg.check_memory(self.numel, 3, a.dtype, a.device)
        return linalg.eigh(symmetric(self.to_dense()))

    def _leading(self, damping: float) -> tuple[Tensor, Tensor, Tensor]:
        """Invert ``B_1 ⊗ A_1 + λI`` in the eigenbases, negative eigenvalues cut to 0."""
        a, b = self.kronecker_pairs()
        (values_a, basis_a), (values_b, basis_b) = linalg.eigh(a[0]), linalg.eigh(b[0])
        values_a, values_b = values_a.clamp(min=0.0), values_b.clamp(min=0.0)
        if damping > 0:
            scale = 1.0 / (values_b.unsqueeze(-1) * values_a.unsqueeze(-2) + damping)
        else:
            inverse_a, inverse_b = map(linalg.inverse_on_range, (values_a, values_b))
            scale = inverse_b.unsqueeze(-1) * inverse_a.unsqueeze(-2)
        return basis_b, basis_a, scale

    def _simultaneous(self, damping: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``K_b``, ``K_a`` that turn the damped sum into a diagonal matrix, and 1 over it.

        ``KᵀX̂_1K = I`` and ``KᵀX_2K`` diagonal on each side.

        Raises:
            FactorizationError: If the damped sum is not positive definite.
        """
        a, b = self.kronecker_pairs()
        shift_a, shift_b = pi_shifts(a[0], b[0], damping)
        basis_a, values_a = _joint_basis(a, shift_a)
        basis_b, values_b = _joint_basis(b, shift_b)
        total = 1.0 + values_b.unsqueeze(-1) * values_a.unsqueeze(-2)
        if not bool((total > torch.finfo(total.dtype).eps ** 0.5).all()):
            raise FactorizationError("the damped sum of products is not positive definite")
        return basis_b, basis_a, 1.0 / total

    def _apply(self, inverse: tuple[Tensor, ...], columns: Tensor) -> Tensor:
        if len(inverse) == 1:
            return inverse[0] @ columns
        left, right, scale = inverse
        matrices = (left.mT @ self.layout.matrix(columns.T) @ right) * scale
        return self.layout.flat(left @ matrices @ right.mT).T

    def function_space_map(
        self, rows: Jacobians, other: Jacobians, damping: float
    ) -> dict[str, Tensor]:
        """Return ``J'(F_l + λI)⁻¹Jᵀ`` by the damping rule, by columns."""
        return map_by_columns(self.name, rows, other, self.solver(damping))

    def trace(self) -> Tensor:
        """Return ``Σ_r tr A_r tr B_r``."""
        a, b = (x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in self.kronecker_pairs())
        return (a * b).sum()

    def diagonal(self) -> Tensor:
        """Return the diagonal."""
        a, b = (x.diagonal(dim1=-2, dim2=-1) for x in self.kronecker_pairs())
        return self.layout.flat((b.unsqueeze(-1) * a.unsqueeze(-2)).sum(0))

    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues; some may be negative, and ``R > 1`` needs the dense block.

        Raises:
            ValueError: If that does not fit memory.
        """
        if self.rank > 1:
            return self._dense_spectrum()[0]
        a, b = self.kronecker_pairs()
        values_a, values_b = (linalg.eigh(x[0])[0].clamp(min=0.0) for x in (a, b))
        return (values_b.unsqueeze(-1) * values_a.unsqueeze(-2)).flatten()

    def logdet(self, damping: float) -> Tensor:
        """Return ``log det(F_l + damping I)``; NaN where that is not positive definite."""
        values = self.eigenvalues()
        rounding = len(values) * torch.finfo(values.dtype).eps * values.abs().amax()
        values = torch.where(values.abs() <= rounding, 0.0, values)
        return (values + damping).log().sum()

    def to_dense(self) -> Tensor:
        """Return the block in flat parameter order."""
        a, _ = self.kronecker_pairs()
        return self.matvec(torch.eye(self.numel, dtype=a.dtype, device=a.device))

    # Training.

    def refresh(self, damping: float) -> None:
        """Factorise; with the first product alone where the damped sum is not positive definite.

        That is said in one warning. Zero damping is the pseudo-inverse.
        """
        if self.inputs is None or self.count == 0:
            return
        try:
            self._inverse = self._inverse_of(damping, positive=True)
        except FactorizationError as error:
            self._inverse = self._leading(damping)
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"the curvature of {self.name!r}: {error}; its first product alone is used",
                    stacklevel=3,
                )

    def precondition(self, source: GradientSource) -> dict[str, Tensor]:
        """Return the natural gradient of the part's parameters."""
        if self._inverse is None:
            return {name: source.gradients[name] for name in self.names}
        gradient = self.layout.gather([source.gradients[name] for name in self.names])
        column = gradient.to(self._inverse[0].dtype).unsqueeze(1)
        flat = self._apply(self._inverse, column)[:, 0]
        return dict(zip(self.names, self.layout.scatter(flat), strict=True))

    def cost(self, workload: Workload) -> Cost:
        """Return the cost of the products; an update is stated for ten iterations."""
        layout = self.layout
        d_in, d_out, groups = layout.d_augmented, layout.d_out, layout.groups
        rows = float(workload.samples * workload.directions)
        if workload.positions.get(self.name, 1) == 1:
            product = rows * groups * (d_in**2 + d_out**2)
        else:
            product = rows * groups * d_in * d_out * (d_in + d_out)
        entries = groups * (d_in**2 + d_out**2)
        dense = self.rank > 1 and self.damping_rule == "tikhonov"
        kept = self.numel**2 if dense else entries + groups * d_in * d_out
        factorise = float(self.numel) ** 3 if dense else groups * float(d_in**3 + d_out**3)
        step = float(self.numel**2) if dense else 2.0 * groups * d_in * d_out * (d_in + d_out)
        memory = self.parameters.dtype.itemsize * (self.rank * entries + kept)
        factors = ", ".join(f"{d} x {d}" for d in (d_in, d_out))
        prefix = "" if self.rank * groups == 1 else f"{self.rank * groups} of "
        return Cost(prefix + factors, memory, 20 * product + factorise, step)

    def state_dict(self) -> dict[str, Any]:
        """Return products, count and inverse."""
        return {
            "count": self.count,
            "discount": self._discount,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "inverse": None if self._inverse is None else list(self._inverse),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore them."""
        self.count, self._discount = state["count"], state["discount"]
        for key in ("inputs", "outputs"):
            value = state[key]
            setattr(self, key, None if value is None else value.to(device))
        inverse = state["inverse"]
        self._inverse = None if inverse is None else tuple(t.to(device) for t in inverse)


@register_structure
class KPSVDFisher(PartitionedFisher):
    """The nearest sum of Kronecker products per layer; memory ``R (d_a² + d_g²)``.

    Options: ``rank``, ``method``, ``damping_rule``, ``tolerance`` and ``max_iterations`` of
    :class:`KroneckerSumPart`. Layers with a factor larger than ``max_factor_size`` get the factors
    of K-FAC, the large one as its diagonal.
    """

    structure: ClassVar[str] = "kpsvd"
    training_options: ClassVar[Mapping[str, Any]] = {
        "damping_rule": "pi",
        "tolerance": 1e-4,
        "max_iterations": 20,
    }

    def make_parts(
        self,
        rank: int = 1,
        method: SVDMethod = "lanczos",
        damping_rule: DampingRule = "tikhonov",
        tolerance: float = 1e-12,
        max_iterations: int = 1000,
        max_factor_size: int | None = 8192,
        **options: Any,
    ) -> dict[str, CurvaturePart]:
        """Return one part per block.

        Raises:
            ValueError: If an option has an unknown value, or the rank is above 2 with ``"pi"``.
            TypeError: If an option is unknown.
        """
        refuse_options(self.structure, options)
        check_choice("method", method, "deflation", "lanczos")
        check_choice("damping_rule", damping_rule, "tikhonov", "pi")
        if rank < 1 or max_iterations < 1:
            raise ValueError("rank and max_iterations must be at least 1")
        if rank > 2 and damping_rule == "pi":
            raise ValueError(f"damping_rule 'pi' inverts ranks 1 and 2, got rank={rank}")
        parts: dict[str, CurvaturePart] = {}
        for name, block in self.blocks.items():
            if max_factor_size is not None and max_factor_size < max(
                block.d_augmented, block.d_out
            ):
                parts[name] = KroneckerPart(
                    name, block, self.layout, "expand", damping_rule, max_factor_size
                )
            else:
                parts[name] = KroneckerSumPart(
                    name, block, self.layout, rank, method, damping_rule, tolerance, max_iterations
                )
        return parts


# Products with the rows of each group; U is (G, d_in + bias, d_in + bias), V (G, d_out, d_out).


def _contract_outputs(rows: LayerJacobian, v: Tensor) -> Tensor:
    """Return ``Σ_nk MᵀVM``."""
    if type(rows) is LinearJacobian and rows.positions == 1:
        delta = rows.output_gradients[:, :, 0]  # (N, K, G, d_out)
        weights = (torch.einsum("nkgo,gop->nkgp", delta, v) * delta).sum((1, 3))
        return _weighted_moment(rows.augmented_inputs()[:, 0], weights)
    total = v.new_zeros(v.shape[0], rows.layout.d_augmented, rows.layout.d_augmented)
    for start, stop in rows.chunks():
        m = rows.per_sample_gradients(start, stop).flatten(0, 1).transpose(0, 1)  # (G, R, o, i)
        applied = v.unsqueeze(1) @ m
        total = total + m.flatten(1, 2).mT @ applied.flatten(1, 2)
    return total


def _contract_inputs(rows: LayerJacobian, u: Tensor) -> Tensor:
    """Return ``Σ_nk MUMᵀ``."""
    if type(rows) is LinearJacobian and rows.positions == 1:
        a = rows.augmented_inputs()[:, 0]  # (N, G, d_in + bias)
        weights = (torch.einsum("ngi,gij->ngj", a, u) * a).sum(2)
        delta = rows.output_gradients[:, :, 0]
        weights = weights.unsqueeze(1).expand(delta.shape[:3]).flatten(0, 1)
        return _weighted_moment(delta.flatten(0, 1), weights)
    total = u.new_zeros(u.shape[0], rows.layout.d_out, rows.layout.d_out)
    for start, stop in rows.chunks():
        m = rows.per_sample_gradients(start, stop).flatten(0, 1).permute(1, 0, 3, 2)
        applied = u.unsqueeze(1) @ m
        total = total + m.flatten(1, 2).mT @ applied.flatten(1, 2)
    return total


def _weighted_moment(x: Tensor, weights: Tensor) -> Tensor:
    """Return ``Σ_r w_rg x_rg x_rgᵀ`` for ``x`` (R, G, d) and ``w`` (R, G)."""
    grouped = x.transpose(0, 1)
    return (grouped * weights.T.unsqueeze(-1)).mT @ grouped


def _joint_basis(factors: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``K`` with ``Kᵀ(X_1 + shift I)K = I``, and ``KᵀX_2K`` as its diagonal, 0 for one X.

    Args:
        factors: ``X``, ``(R, G, d, d)`` with R at most 2.
        shift: What is added to the first, ``(G,)``.

    Raises:
        FactorizationError: If the first is then not positive definite.
    """
    values, vectors = linalg.eigh(factors[0])
    damped = values + shift.unsqueeze(-1)
    if not bool((damped > 0).all()):
        raise FactorizationError("the first damped factor is not positive definite")
    whitening = vectors * damped.rsqrt().unsqueeze(-2)
    if len(factors) == 1:
        return whitening, torch.zeros_like(values)
    second, rotation = linalg.eigh(symmetric(whitening.mT @ factors[1] @ whitening))
    return whitening @ rotation, second

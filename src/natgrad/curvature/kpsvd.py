r"""KPSVD: every layer's block as the nearest sum of Kronecker products.

.. math:: F_l \approx \sum_{r=1}^R B_r \otimes A_r, \qquad
          \text{least } \Bigl\|F_l - \sum_r B_r \otimes A_r\Bigr\|_F
          \text{ over symmetric } A_r, B_r

Rearranged so that ``B ⊗ A`` becomes ``vec(A) vec(B)ᵀ`` (Van Loan & Pitsianis 1993), the block is
``Z`` with ``Z vec(V) = vec(Σ MᵀVM)/count`` and ``Zᵀ vec(U) = vec(Σ MUMᵀ)/count`` for per-sample
gradients ``M``, so the leading singular pairs follow from products with the rows (Koroko et al.
2022). ``Z`` is never formed. The nearest single product is known as KFOC (Schnaus et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeGuard

import torch
from torch import Tensor
from typing_extensions import Self

from natgrad.arguments import check_choice, check_integer
from natgrad.curvature.cost import Cost, Elements, Workload, factored_elements
from natgrad.curvature.kfac import KroneckerFactors
from natgrad.curvature.kronecker_svd import deflation, lanczos, symmetric_part
from natgrad.curvature.structure import Part, Structure, register_structure
from natgrad.jacobians import (
    CHUNK_ELEMENTS,
    FIRST_DRAW,
    Draw,
    Jacobians,
    LayerJacobian,
    LinearJacobian,
)
from natgrad.jacobians.packing import pack_layer, unpack_layer
from natgrad.layouts import ParameterLayout
from natgrad.operators import Operator
from natgrad.operators.kronecker_sum import KroneckerSumOperator
from natgrad.statistics import Statistics

SVDMethod = Literal["deflation", "lanczos"]

#: Rows of the passes of a step wait for each other up to so many entries per layer (2^24 float32 =
#: 64 MiB).
WAITING_ELEMENTS = 2**24


@dataclass(frozen=True, eq=False)
class ProductStatistics(Statistics):
    """Leading Kronecker products of a sum over rows, un-normalised, and rows still to be added.

    Over one update they are the truncated singular value decomposition of the rearranged block,
    among symmetric factors (without shared positions all others vanish). The rows are gone
    afterwards, so a further update decomposes the decayed products so far *plus* the new rows, and
    truncates again. Groups have ``R`` products each; blocks between them are zero.

    The first product of one update is positive semi-definite, for ``R = 1`` of any number of
    updates; later ones are indefinite.

    Attributes:
        inputs: ``(R, G, d_in + bias, d_in + bias)``; None before the first decomposition.
        outputs: ``(R, G, d_out, d_out)``.
        waiting: Rows not decomposed yet.
        rank: R.
        method: ``"lanczos"`` or ``"deflation"``.
        tolerance: See :class:`KroneckerProducts`.
        max_iterations: See :class:`KroneckerProducts`.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None
    waiting: tuple[LayerJacobian, ...] = ()
    rank: int = 1
    method: SVDMethod = "lanczos"
    tolerance: float = 1e-12
    max_iterations: int = 1000

    def followed_by(self, other: Self, decay: float = 1.0) -> Self:
        """Return the leading products of ``decay · self + other``.

        What cannot be decomposed, as products of finite rows may overflow, is left out.
        """
        if decay == 0:
            return other
        own = self.settled().scaled(decay)
        found = own._with_products_of(other)._decomposed(other.waiting)
        return own if found is None else replace(found, count=own.count + other.count)

    def joined(self, other: Self) -> Self:
        """Return the sum with another pass of the same step, decomposed together with it later.

        Of very many rows the leading products are all that is kept meanwhile.
        """
        if _elements(self.waiting) + _elements(other.waiting) > WAITING_ELEMENTS:
            return self.followed_by(other)
        found, waiting = self._with_products_of(other), self.waiting + other.waiting
        return replace(found, count=self.count + other.count, waiting=waiting)

    def _with_products_of(self, other: Self) -> Self:
        """Return the products of both."""
        pairs = [
            (one.inputs, one.outputs)
            for one in (self, other)
            if one.inputs is not None and one.outputs is not None
        ]
        if not pairs:
            return self
        inputs, outputs = (torch.cat(found) for found in zip(*pairs, strict=True))
        return replace(self, inputs=inputs, outputs=outputs)

    def settled(self) -> Self:
        """Return the same with all rows decomposed."""
        if not self.waiting:
            return self
        found = replace(self, waiting=())._decomposed(self.waiting)
        return replace(self, waiting=()) if found is None else found

    def _decomposed(self, waiting: tuple[LayerJacobian, ...]) -> Self | None:
        """Return the leading products of those there are plus rows; None if there are none."""
        old_a, old_b = self.inputs, self.outputs
        if old_b is not None:
            start = torch.eye(old_b.shape[-1], dtype=old_b.dtype, device=old_b.device)
            start = start.expand(old_b.shape[1], -1, -1)
        else:
            layout, first = waiting[0].layout, waiting[0]
            start = torch.eye(layout.d_out, dtype=first.dtype, device=first.device)
            start = start.expand(layout.groups, -1, -1)

        factors = list(zip(waiting, _kept(waiting), strict=True))

        def forward(v: Tensor) -> Tensor:
            terms = [_contract_outputs(rows, kept, v) for rows, kept in factors]
            if old_a is not None and old_b is not None:
                weights = (old_b * v).sum((-2, -1))
                terms.append(torch.einsum("rg,rgij->gij", weights, old_a))
            return symmetric_part(torch.stack(terms).sum(0))

        def adjoint(u: Tensor) -> Tensor:
            terms = [_contract_inputs(rows, kept, u) for rows, kept in factors]
            if old_a is not None and old_b is not None:
                weights = (old_a * u).sum((-2, -1))
                terms.append(torch.einsum("rg,rgop->gop", weights, old_b))
            return symmetric_part(torch.stack(terms).sum(0))

        decompose: Callable[..., tuple[Tensor, Tensor]]
        decompose = deflation if self.method == "deflation" else lanczos
        try:
            inputs, outputs = decompose(
                forward, adjoint, start, self.rank, self.tolerance, self.max_iterations
            )
        except torch.linalg.LinAlgError:
            return None
        if not bool(torch.isfinite(inputs).all() & torch.isfinite(outputs).all()):
            return None
        return replace(self, inputs=inputs, outputs=outputs, waiting=())

    def scaled(self, factor: float) -> Self:
        """Return the sum times a factor."""
        if factor == 1.0:
            return self
        products = self.inputs, self.outputs
        root = [None if tensor is None else tensor * factor**0.5 for tensor in products]
        return replace(self, count=self.count * factor, inputs=root[0], outputs=root[1])

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the statistics with a function applied to all tensors but those of rows."""
        plain = super(ProductStatistics, replace(self, waiting=())).mapped(function)
        return replace(plain, waiting=self.waiting)

    def is_finite(self) -> Tensor:
        """Return whether products and rows are finite."""
        tensors = [t for t in (self.inputs, self.outputs) if t is not None]
        for rows in self.waiting:
            tensors += [t for t in rows.state().values() if t.is_floating_point()]
        return torch.stack([torch.isfinite(t).all() for t in tensors]).all()

    def sums(self) -> dict[str, Any]:
        """Return the count."""
        return replace(self, inputs=None, outputs=None, waiting=()).state_dict()

    def rows(self) -> Any:
        """Return products, and rows that wait."""
        waiting = [pack_layer(rows) for rows in self.waiting]
        return {"inputs": self.inputs, "outputs": self.outputs, "waiting": waiting}

    def with_rows(self, found: Sequence[Any], layout: ParameterLayout) -> Self:
        """Return the products and rows of all processes, to be decomposed together."""
        device, result = self.count.device, self
        for one in (each for each in found if each is not None):
            waiting = tuple(unpack_layer(rows, device) for rows in one["waiting"])
            other = replace(self, inputs=one["inputs"], outputs=one["outputs"])
            result = result._with_products_of(other)
            result = replace(result, waiting=result.waiting + waiting)
        return result

    def renewal(self) -> Any:
        """Return the products."""
        return {"inputs": self.inputs, "outputs": self.outputs}

    def with_renewal(self, found: Any) -> Self:
        """Return the products with no rows waiting."""
        return replace(self, inputs=found["inputs"], outputs=found["outputs"], waiting=())

    def for_checkpoint(self) -> ProductStatistics:
        """Return the same without rows that wait."""
        return self.settled()


@register_structure
@dataclass(frozen=True)
class KroneckerProducts(Structure):
    """The nearest sum of Kronecker products per layer; memory ``R (d_a² + d_g²)``.

    Attributes:
        rank: Number of products ``R``; above 2 only with exact damping.
        method: ``"deflation"`` finds one product after the other by power iteration, ``"lanczos"``
            all at once in a Krylov space, with full orthogonalisation.
        factored_damping: How λ is added; see
            :class:`natgrad.operators.kronecker_sum.KroneckerSumOperator`.
        tolerance: Singular pairs are found once ``‖Zᵀu − σv‖`` is below this times the largest σ.
        max_iterations: Most iterations, for each product in ``"deflation"``.
        max_factor_size: Layers with a larger factor get the factors of K-FAC, the large one as its
            diagonal; None for no limit.
        leading_only: Whether the first product alone is inverted, with a warning, where the damped
            sum is not positive definite; otherwise its inverse is that of an indefinite matrix.

    Raises:
        ValueError: If an option is out of range.
    """

    name: ClassVar[str] = "kpsvd"
    shareable: ClassVar[bool] = True
    object_options: ClassVar[Mapping[str, Any]] = {
        "factored_damping": False,
        "tolerance": 1e-12,
        "max_iterations": 1000,
        "leading_only": False,
    }

    rank: int = 1
    method: SVDMethod = "lanczos"
    factored_damping: bool = True
    tolerance: float = 1e-4
    max_iterations: int = 20
    max_factor_size: int | None = 8192
    leading_only: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("method", self.method, "deflation", "lanczos")
        check_integer("rank", self.rank)
        check_integer("max_iterations", self.max_iterations)
        if self.rank > 2 and self.factored_damping:
            raise ValueError(f"factored_damping=True inverts ranks 1 and 2, got rank={self.rank}")

    def _by_kfac(self, part: Part) -> KroneckerFactors | None:
        """Return the structure of a layer whose factors are too large."""
        limit, block = self.max_factor_size, part.block
        if not any(block.large_factors(limit)):
            return None
        return KroneckerFactors("expand", self.factored_damping, limit, None)

    def statistics(
        self,
        part: Part,
        rows: Jacobians,
        count: Tensor,
        *,
        previous: Statistics | None = None,
        draw: Draw = FIRST_DRAW,
        continued: bool = False,
    ) -> Statistics:
        """Let the rows wait to be decomposed together with what there is."""
        large = self._by_kfac(part)
        if large is not None:
            return large.statistics(part, rows, count, draw=draw, continued=continued)
        return ProductStatistics(
            count,
            waiting=(rows[part.name],),
            rank=self.rank,
            method=self.method,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
        )

    def settled(self, part: Part, statistics: Statistics) -> Statistics:
        """Decompose rows that wait."""
        return statistics.settled() if isinstance(statistics, ProductStatistics) else statistics

    def renewed(self, parts: Any, statistics: Any, dampings: Any) -> list[Any]:
        """Decompose rows that wait."""
        return [self.settled(p, one) for p, one in zip(parts, statistics, strict=True)]

    def operator(self, part: Part, statistics: Statistics | None) -> Operator:
        """Return the sum of products; the largest comes first, ``‖A_r‖ = ‖B_r‖``."""
        large, block = self._by_kfac(part), part.block
        if large is not None:
            return large.operator(part, statistics)
        settled = None
        if statistics is not None:
            assert isinstance(statistics, ProductStatistics)
            settled = statistics.settled()
        if settled is None or settled.inputs is None or settled.outputs is None:
            zeros, d_in, d_out = part.parameters.zeros, block.d_augmented, block.d_out
            a = zeros(self.rank, block.groups, d_in, d_in)
            b = zeros(self.rank, block.groups, d_out, d_out)
            return KroneckerSumOperator(block, a, b, self.factored_damping, self.leading_only)
        root = settled.count.clamp(min=1e-300).rsqrt().to(settled.inputs.dtype)
        a, b = settled.inputs * root, settled.outputs * root
        return KroneckerSumOperator(block, a, b, self.factored_damping, self.leading_only)

    def cost(self, part: Part, workload: Workload) -> Cost:
        """Return the cost of the products; an update is stated for ten iterations."""
        large, block = self._by_kfac(part), part.block
        if large is not None:
            return large.cost(part, workload)
        d_in, d_out, groups = block.d_augmented, block.d_out, block.groups
        dense = self._inverts_dense
        factorise = float(block.numel) ** 3 if dense else groups * float(d_in**3 + d_out**3)
        step = float(block.numel**2) if dense else 2.0 * groups * d_in * d_out * (d_in + d_out)
        memory = part.dtype.itemsize * self.elements(part, workload).kept
        factors = ", ".join(f"{d} x {d}" for d in (d_in, d_out))
        prefix = "" if self.rank * groups == 1 else f"{self.rank * groups} of "
        return Cost(prefix + factors, memory, self.joint_work(part, workload) + factorise, step)

    @property
    def _inverts_dense(self) -> bool:
        """Whether the block itself is factorised."""
        return self.rank > 1 and not self.factored_damping

    def joint_work(self, part: Part, workload: Workload) -> float:
        """Return the cost of ten iterations, two products with the rows each."""
        if self._by_kfac(part) is not None:
            return 0.0
        block, rows = part.block, float(workload.samples * workload.directions)
        d_in, d_out = block.d_augmented, block.d_out
        if workload.positions.get(part.name, 1) == 1:
            return 20 * rows * block.groups * (d_in**2 + d_out**2)
        return 20 * rows * block.groups * d_in * d_out * (d_in + d_out)

    def elements(self, part: Part, workload: Workload) -> Elements:
        """Return the elements of the products, and of the eigenbases and -values of their sum."""
        large, block = self._by_kfac(part), part.block
        if large is not None:
            return large.elements(part, workload)
        entries = block.groups * (block.d_augmented**2 + block.d_out**2)
        inverse = block.numel**2 if self._inverts_dense else entries + block.numel
        share = -(-workload.samples // workload.processes)
        positions = workload.positions.get(part.name, 1)
        return Elements(
            statistics=self.rank * entries,
            inverse=inverse,
            sums=0,
            rows=factored_elements(block, share, workload.directions, positions),
            handed_out=self.rank * entries + inverse,
        )


@register_structure
@dataclass(frozen=True)
class NearestKronecker(KroneckerProducts):
    """The nearest single Kronecker product, KFOC: :class:`KroneckerProducts` of rank 1."""

    name: ClassVar[str] = "kfoc"


# Products with the rows of each group; U is (G, d_in + bias, d_in + bias), V (G, d_out, d_out).


def _elements(waiting: Sequence[LayerJacobian]) -> int:
    return sum(tensor.numel() for rows in waiting for tensor in rows.state().values())


def _has_one_position(rows: LayerJacobian) -> TypeGuard[LinearJacobian]:
    return type(rows) is LinearJacobian and rows.positions == 1


def _multiplicands(rows: LayerJacobian) -> Iterator[Tensor]:
    """Yield the inputs, ``(N, G, d_in + bias)``, of rows of one position.

    Of others yield ``M``, ``(G, R, d_out, d_in + bias)``, some samples at a time.
    """
    if _has_one_position(rows):
        yield rows.augmented_inputs()[:, 0]
        return
    for start, stop in rows.chunks():
        yield rows.per_sample_gradients(start, stop).flatten(0, 1).transpose(0, 1)


def _kept(waiting: Sequence[LayerJacobian]) -> list[list[Tensor] | None]:
    """Return what all products with rows take, or None where that is too much to keep."""
    elements = sum(rows.samples * rows.directions * rows.layout.numel for rows in waiting)
    few = elements <= CHUNK_ELEMENTS
    return [list(_multiplicands(rows)) if few else None for rows in waiting]


def _contract_outputs(rows: LayerJacobian, kept: list[Tensor] | None, v: Tensor) -> Tensor:
    """Return ``Σ_nk MᵀVM``."""
    made = kept or _multiplicands(rows)
    if _has_one_position(rows):
        (a,) = made
        delta = rows.output_gradients[:, :, 0]  # (N, K, G, d_out)
        weights = (torch.einsum("nkgo,gop->nkgp", delta, v) * delta).sum((1, 3))
        return _weighted_moment(a, weights)
    total = v.new_zeros(v.shape[0], rows.layout.d_augmented, rows.layout.d_augmented)
    for m in made:
        applied = v.unsqueeze(1) @ m
        total = total + m.flatten(1, 2).mT @ applied.flatten(1, 2)
    return total


def _contract_inputs(rows: LayerJacobian, kept: list[Tensor] | None, u: Tensor) -> Tensor:
    """Return ``Σ_nk MUMᵀ``."""
    made = kept or _multiplicands(rows)
    if _has_one_position(rows):
        (a,) = made
        weights = (torch.einsum("ngi,gij->ngj", a, u) * a).sum(2)
        delta = rows.output_gradients[:, :, 0]
        weights = weights.unsqueeze(1).expand(delta.shape[:3]).flatten(0, 1)
        return _weighted_moment(delta.flatten(0, 1), weights)
    total = u.new_zeros(u.shape[0], rows.layout.d_out, rows.layout.d_out)
    for m in (one.mT for one in made):
        applied = u.unsqueeze(1) @ m
        total = total + m.flatten(1, 2).mT @ applied.flatten(1, 2)
    return total


def _weighted_moment(x: Tensor, weights: Tensor) -> Tensor:
    """Return ``Σ_r w_rg x_rg x_rgᵀ`` for ``x`` (R, G, d) and ``w`` (R, G)."""
    grouped = x.transpose(0, 1)
    return (grouped * weights.T.unsqueeze(-1)).mT @ grouped

"""What every structure of the Fisher matrix is and does.

A structure is a *partition* of the parameters into independent parts
(:mod:`natgrad.curvature.partitioned`) or, where layers are coupled in a special way, a
:class:`FisherMatrix` of its own. Either way the life of a structure has three stages: ``update``
adds Jacobian rows, ``refresh`` factorises, ``precondition`` applies the last factorisation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from natgrad import linalg
from natgrad.curvature.cost import Cost, Workload
from natgrad.jacobians import Jacobians, LayerJacobian
from natgrad.layouts import BlockLayout, ParameterLayout

if TYPE_CHECKING:
    from natgrad.capture import Block

__all__ = [
    "FisherMatrix",
    "GradientSource",
    "RowReceiver",
    "check_choice",
    "check_damping",
    "damping_of",
    "inner_product",
    "refuse_options",
]

Vector = TypeVar("Vector", Tensor, dict[str, Tensor])


@dataclass
class GradientSource:
    """A loss gradient together with how it came about.

    Attributes:
        gradients: Parameter name → gradient.
        rows: Block name → Jacobian whose rows sum to the block's gradient. Present only while the
            gradients are exactly what the last backward pass left.
        natural: Blocks whose gradients the backward pass has preconditioned already.
        coordinates: ``u`` (N, K) with ``∇L = Jᵀu`` for the rows of the structure's last update.
    """

    gradients: dict[str, Tensor]
    rows: Mapping[str, LayerJacobian] | None = None
    coordinates: Tensor | None = None
    natural: Set[str] = frozenset()


class RowReceiver(Protocol):
    """What takes the rows that are pulled back from the output, as every structure does."""

    @property
    def additive(self) -> bool:
        """Whether rows may come in chunks; see :class:`FisherMatrix`."""

    def update(self, jacobians: Jacobians, count: Tensor | float) -> None:
        """Take rows; see :meth:`FisherMatrix.update`."""


class FisherMatrix(ABC):
    """A structured approximation of the Fisher information matrix, ``P × P``.

    Args:
        blocks: Block name → block, as :class:`natgrad.Capture` finds them.
        layout: Order of all trainable parameters.

    Attributes:
        layout: Order of all trainable parameters.
        blocks: Block name → its layout.
    """

    #: Name under which the structure is registered.
    structure: ClassVar[str]
    #: Whether rows are summed as they come (then they may come in chunks, and averages over steps
    #: are possible) or kept.
    additive: ClassVar[bool] = True
    #: Options whose defaults differ when the structure preconditions gradients.
    training_options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, blocks: Mapping[str, Block], layout: ParameterLayout) -> None:
        self.layout = layout
        self.blocks: dict[str, BlockLayout] = {n: b.layout for n, b in blocks.items()}

    # What a structure implements.

    @abstractmethod
    def update(self, jacobians: Jacobians, count: Tensor | float) -> None:
        """Add rows to the running sum.

        Args:
            jacobians: Rows with ``F = (1/count) Σ rows rowsᵀ``.
            count: How much they weigh: the sum of event weights. 0 for a further chunk of rows of
                samples already counted.
        """

    @abstractmethod
    def discount(self, factor: float) -> None:
        """Multiply everything summed so far, counts included, by ``factor``.

        Called with the decay before each update, it makes the structure a bias-corrected
        exponential moving average over steps; with 0 it starts afresh.
        """

    @abstractmethod
    def _matvec(self, columns: Tensor) -> Tensor:
        """Return ``F V`` for ``(P, k)``."""

    @abstractmethod
    def _solve(self, columns: Tensor, damping: float) -> Tensor:
        """Return ``(F + damping I)⁻¹ V`` for ``(P, k)``."""

    def _inverse_root(self, columns: Tensor, damping: float) -> Tensor:
        """Return ``(F + damping I)^(−1/2) V`` for ``(P, k)``, where the structure can."""
        raise NotImplementedError(
            f"structure {self.structure!r} has no square root of its inverse: use 'full', "
            "'block_diagonal', 'kfac', 'ekfac', 'tkfac', 'tekfac', 'singd' or 'diagonal'"
        )

    @abstractmethod
    def trace(self) -> Tensor:
        """Return ``tr F``."""

    @abstractmethod
    def logdet(self, damping: float = 0.0) -> Tensor:
        """Return ``log det(F + damping I)``; −inf where that is singular."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Return the diagonal, flat ``(P,)``."""

    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """Return all ``P`` eigenvalues, largest first."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Return the matrix, ``(P, P)``."""

    @abstractmethod
    def refresh(self, damping: float | Mapping[str, float]) -> None:
        """Factorise ``F + damping I`` for :meth:`precondition`.

        Args:
            damping: One value, or one per block name.
        """

    @abstractmethod
    def precondition(self, source: GradientSource) -> dict[str, Tensor]:
        """Return the natural gradient by the last :meth:`refresh`, parameter name → tensor."""

    @abstractmethod
    def _function_space_map(
        self, rows: Jacobians, other: Jacobians, damping: float
    ) -> dict[str, Tensor]:
        """Return block name → ``J'_l [(F + damping I)⁻¹ Jᵀ]_l``, ``(R', R)``."""

    @abstractmethod
    def costs(self, workload: Workload) -> dict[str, Cost]:
        """Return what each part costs, by block name or, for joint parts, ``"all layers"``."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return sums and factorisations: nested dicts of tensors and plain scalars."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore what :meth:`state_dict` returned."""

    # What follows from it.

    def quadratic(self, direction: dict[str, Tensor], inner: Tensor) -> Tensor:
        """Return ``ΔᵀFΔ`` of a natural gradient, as nearly as the structure can tell.

        The default is ``⟨Δ, ∇L⟩ = Δᵀ(F̂ + λI)Δ``, which is known already. Structures that hold the
        rows of the batch return the exact form ``‖JΔ‖²/count``.

        Args:
            direction: ``Δ = (F̂ + λI)⁻¹∇L``, parameter name → tensor.
            inner: ``⟨Δ, ∇L⟩``.
        """
        return inner.abs()

    def function_space_map(
        self, rows: Jacobians, other: Jacobians | None = None, damping: float = 0.0
    ) -> dict[str, Tensor]:
        r"""Return how a natural-gradient step moves the outputs, layer by layer.

        A gradient ``∇L = Jᵀu`` turns into the step ``(F + λI)⁻¹Jᵀu``, which moves the outputs whose
        rows are ``J'`` by ``J'(F + λI)⁻¹Jᵀu``, the sum of what its layers contribute. Where the
        sum is a multiple of the identity the structure is *isotropic* (Karakida & Osawa 2020).

        Args:
            rows: ``J``, R rows. For the structures that keep rows it costs least if they are those
                of the one update so far.
            other: ``J'``, R' rows of the same blocks; ``J`` by default.
            damping: λ ≥ 0, in the units of F; 0 is the pseudo-inverse.

        Returns:
            Block name → contribution ``(R', R)``. No ``R × P`` matrix is built.

        Raises:
            ValueError: If the damping is negative or not finite, or R × R' does not fit memory.
        """
        check_damping(damping)
        other = rows if other is None else other
        side = int((rows.rows * other.rows) ** 0.5) + 1
        linalg.check_memory(side, len(rows) + 1, self.layout.dtype, self.layout.device)
        return self._function_space_map(rows, other, damping)

    def snapshot(self) -> dict[str, Any]:
        """Return the present state by reference, for :meth:`rollback`.

        It costs no copy: sums are replaced, never changed in place.
        """
        return dict(self.__dict__)

    def rollback(self, saved: dict[str, Any]) -> None:
        """Return to a snapshot."""
        self.__dict__.clear()
        self.__dict__.update(saved)

    @property
    def shape(self) -> tuple[int, int]:
        """``(P, P)``."""
        return self.layout.numel, self.layout.numel

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Parameter names in the order of rows and columns."""
        return self.layout.names

    def solve(self, vector: Vector, damping: float = 0.0) -> Vector:
        """Return ``(F + damping I)⁻¹ v``; the pseudo-inverse for zero damping.

        Args:
            vector: A flat vector ``(P,)``, columns ``(P, k)``, or a dict name → tensor.
            damping: λ ≥ 0, in the units of F.

        Returns:
            The same kind of object.

        Raises:
            ValueError: If the vector has a wrong shape, or the damping is negative or not finite.
        """
        check_damping(damping)
        return self._on_columns(vector, lambda columns: self._solve(columns, damping))

    def inverse_root(self, vector: Vector, damping: float) -> Vector:
        """Return ``(F + damping I)^(−1/2) v``, the symmetric root.

        Standard normal vectors become samples of ``N(0, (F + damping I)⁻¹)``.

        Args:
            vector: A flat vector ``(P,)``, columns ``(P, k)``, or a dict name → tensor.
            damping: λ > 0, in the units of F.

        Returns:
            The same kind of object.

        Raises:
            NotImplementedError: If the structure has no square root at hand.
            ValueError: If the vector has a wrong shape, or the damping is not positive and finite.
        """
        check_damping(damping)
        if damping == 0:
            raise ValueError("inverse_root needs a positive damping")
        return self._on_columns(vector, lambda columns: self._inverse_root(columns, damping))

    def __matmul__(self, vector: Vector) -> Vector:
        """Return ``F v`` for a flat vector, columns ``(P, k)``, or a dict name → tensor."""
        return self._on_columns(vector, self._matvec)

    def to_scipy(self) -> Any:
        """Return a :class:`scipy.sparse.linalg.LinearOperator` on float64 NumPy vectors.

        Raises:
            ImportError: If SciPy is not installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise ImportError("to_scipy() needs SciPy: pip install scipy") from error

        sample = self.diagonal()

        def matmat(columns: Any) -> Any:
            tensor = torch.as_tensor(columns, dtype=sample.dtype, device=sample.device)
            flat = tensor.reshape(self.layout.numel, -1)
            return self._matvec(flat).reshape(tensor.shape).double().cpu().numpy()

        return LinearOperator(
            self.shape, matvec=matmat, rmatvec=matmat, matmat=matmat, rmatmat=matmat, dtype="f8"
        )

    def __repr__(self) -> str:
        """Show structure, size and number of blocks."""
        size = self.layout.numel
        return f"FisherMatrix({self.structure}, {size} x {size}, {len(self.blocks)} blocks)"

    def _on_columns(self, vector: Any, function: Any) -> Any:
        if isinstance(vector, Mapping):
            flat = self.layout.to_flat(dict(vector))
            return self.layout.to_dict(function(flat.unsqueeze(1))[:, 0])
        if not isinstance(vector, Tensor):
            raise TypeError(f"expected a tensor or a dict of tensors, got {type(vector).__name__}")
        if vector.dim() not in (1, 2) or vector.shape[0] != self.layout.numel:
            raise ValueError(
                f"expected a vector of length {self.layout.numel} or columns "
                f"({self.layout.numel}, k), got shape {tuple(vector.shape)}"
            )
        if vector.dim() == 1:
            return function(vector.unsqueeze(1))[:, 0]
        return function(vector)


def inner_product(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Tensor:
    """Return ``Σ ⟨left, right⟩`` over the names of ``left``; NaN or infinite if any entry is."""
    return torch.stack(
        [
            torch.dot(value.reshape(-1), right[name].reshape(-1).to(value.dtype))
            for name, value in left.items()
        ]
    ).sum()


def damping_of(name: str, damping: float | Mapping[str, float]) -> float:
    """Return a part's damping; parts that join several blocks take the largest of theirs."""
    if isinstance(damping, Mapping):
        return damping[name] if name in damping else max(damping.values())
    return float(damping)


def check_damping(damping: float) -> None:
    """Raise a ValueError if a damping is negative or not finite."""
    if not damping >= 0 or damping == float("inf"):
        raise ValueError(f"damping must be a finite number >= 0, got {damping}")


def refuse_options(structure: str, options: Mapping[str, Any]) -> None:
    """Raise a TypeError if a structure was given options it does not know."""
    if options:
        raise TypeError(f"structure {structure!r} has no option {next(iter(options))!r}")


def check_choice(name: str, value: str, *choices: str) -> None:
    """Raise a ValueError unless an option has one of its values."""
    if value not in choices:
        listed = ", ".join(map(repr, choices[:-1]))
        raise ValueError(f"{name} must be {listed} or {choices[-1]!r}, got {value!r}")

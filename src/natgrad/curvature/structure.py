"""What a structure of the Fisher matrix is: two functions, and a table of all of them by name."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from natgrad.curvature.cost import Cost, Elements, Workload
from natgrad.jacobians import FIRST_DRAW, Draw, Jacobians
from natgrad.layouts import BlockLayout, ParameterLayout
from natgrad.operators import GradientSource, Operator
from natgrad.operators.block_diagonal import FisherMatrix
from natgrad.operators.operator import VectorLayout
from natgrad.records import Record
from natgrad.solvers import Solver
from natgrad.statistics import Statistics


@dataclass(frozen=True)
class Part:
    """A part of the Fisher matrix: the parameters between which it may have entries.

    Attributes:
        name: Name of the block, or ``"all layers"``.
        blocks: Block name → layout of its blocks.
        parameters: Order of all trainable parameters of the model.
    """

    name: str
    blocks: dict[str, BlockLayout]
    parameters: ParameterLayout

    @cached_property
    def block(self) -> BlockLayout:
        """Layout of a part's only block."""
        (block,) = self.blocks.values()
        return block

    @cached_property
    def dtype(self) -> torch.dtype:
        """Type of the part's rows: that of its parameters, at least float32."""
        types = (self.parameters.dtypes[n] for b in self.blocks.values() for n in b.names)
        return functools.reduce(torch.promote_types, types, torch.float32)

    def is_like(self, other: Part) -> bool:
        """Return whether another part has blocks of the same kind, type and place."""
        places = [(one.dtype, one.parameters.device, one.blocks) for one in (self, other)]
        return places[0] == places[1]

    @cached_property
    def layout(self) -> ParameterLayout:
        """Order of the part's own parameters."""
        return self.parameters.subset(n for block in self.blocks.values() for n in block.names)


@dataclass(frozen=True)
class Structure(ABC):
    """Which entries of the Fisher matrix are kept: how rows are summed, what the sums stand for.

    A structure is a frozen dataclass; its fields are its options, with the defaults of training.
    Two functions make it, both pure:

    * :meth:`statistics`, from the rows of one batch to additive sums;
    * :meth:`operator`, from sums, of one batch or averaged over many, to a matrix.
    """

    #: Name under which the structure is registered.
    name: ClassVar[str]
    #: Whether rows are summed as they come (then they may come in chunks, and averages over steps
    #: are possible) or kept.
    additive: ClassVar[bool] = True
    #: Whether all layers make one part.
    joint: ClassVar[bool] = False
    #: Options whose values differ where the structure is an object to look at rather than what
    #: gradients are preconditioned with.
    object_options: ClassVar[Mapping[str, Any]] = {}
    #: Name of a part whose statistics are kept beside the others' and that is none of the matrix.
    companion: ClassVar[str | None] = None
    #: Whether the matrix follows from steps of a recursion alone, and not from data by themselves.
    recursive: ClassVar[bool] = False
    #: Whether inverses follow every update, between the factorisations, as they cost little.
    follows_updates: ClassVar[bool] = False
    #: Whether rows may stay with the processes that have made them, where these use them together.
    rows_stay: ClassVar[bool] = False
    #: Whether processes do well to divide the factorisations and send each other the inverses.
    shareable: ClassVar[bool] = False

    @property
    def solver(self) -> str | Solver:
        """How its matrix is inverted when it preconditions gradients."""
        return "direct"

    @property
    def by_layer(self) -> bool:
        """Whether rows of different layers are never multiplied with each other."""
        return not self.joint and self.companion is None

    def parts(
        self, blocks: Mapping[str, BlockLayout], parameters: ParameterLayout
    ) -> dict[str, Part]:
        """Return the parts by name: one per block, or one for all if the structure is joint."""
        if self.joint:
            return {"all layers": Part("all layers", dict(blocks), parameters)}
        return {name: Part(name, {name: block}, parameters) for name, block in blocks.items()}

    @abstractmethod
    def statistics(
        self,
        part: Part,
        rows: Jacobians,
        count: Any,
        *,
        previous: Statistics | None = None,
        draw: Draw = FIRST_DRAW,
        continued: bool = False,
    ) -> Statistics:
        """Return what the rows of a batch sum to.

        Args:
            part: The part.
            rows: Rows of the part's blocks, of at least one of them.
            count: What their mean divides by, a float64 scalar; 0 if ``continued``.
            previous: What was summed before, for structures that look at rows through it.
            draw: Which random subset of rows an update takes, where one does.
            continued: Whether the rows are a further chunk of directions of samples that an earlier
                call has counted.
        """

    @abstractmethod
    def operator(self, part: Part, statistics: Statistics | None) -> Operator:
        """Return the matrix that sums stand for; zero where there are none yet."""

    def trace(self, part: Part, statistics: Statistics | None) -> Tensor:
        """Return the trace of what sums stand for, a scalar that relative damping is a share of."""
        return self.operator(part, statistics).trace()

    def united(
        self, part: Part, sums: Any, rows: Sequence[Any], previous: Statistics | None
    ) -> Statistics:
        """Return the statistics of a batch of which several processes had a share each.

        Args:
            part: The part.
            sums: What :meth:`natgrad.statistics.Statistics.sums` returned, added up.
            rows: What :meth:`natgrad.statistics.Statistics.rows` returned in each process.
            previous: What was summed before.
        """
        layout = self.vector_layout(part)
        found: Statistics = Record.from_state(sums, part.parameters.device, layout)
        return found.with_rows(rows, part.layout)

    def settled(self, part: Part, statistics: Any) -> Any:
        """Return the statistics with rows that waited to be summed; mostly as they are."""
        return statistics

    def renewed(
        self, parts: Sequence[Part], statistics: Sequence[Any], dampings: Sequence[float]
    ) -> list[Any]:
        """Return the statistics of parts as a factorisation leaves them; mostly as they are."""
        return list(statistics)

    def inverse_damping(self, damping: float) -> float:
        """Return the damping that inverses are made with; that of the user, mostly."""
        return damping

    def takes_rows(self, block: BlockLayout, rows: int) -> bool:
        """Return whether so many rows are cheaper to precondition than the gradient they sum to.

        Inverses of such a structure make use of ``GradientSource.rows``.
        """
        return False

    def vector_layout(self, part: Part) -> VectorLayout:
        """Return the layout that a part's operators have."""
        return part.layout if self.joint else part.block

    def cast(self, part: Part, record: Any) -> Any:
        """Return a record of a checkpoint in the types that this structure works in."""
        return record.to(dtype=part.dtype)

    def check_restored(self, part: Part, statistics: Any) -> None:  # noqa: B027
        """Raise a ValueError if statistics of a checkpoint are not those of these options."""

    def matrix(
        self,
        layout: ParameterLayout,
        parts: Mapping[str, Part],
        operators: Mapping[str, Operator],
        companion: Statistics | None = None,
    ) -> FisherMatrix:
        """Return the matrix of the whole model, of its parts' and the companion's statistics."""
        members = {name: tuple(part.blocks) for name, part in parts.items()}
        return FisherMatrix(layout, dict(operators), members, self.name)

    def corrected(
        self,
        parts: Mapping[str, Part],
        estimates: Mapping[str, Any],
        source: GradientSource,
        natural: dict[str, Tensor],
        smooth: Callable[[GradientSource], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Return what becomes of the parts' natural gradients where something couples them.

        Args:
            parts: The parts by name.
            estimates: What is known of each, :class:`natgrad.curvature.curvature.Estimate`.
            source: The gradient.
            natural: What the parts make of it.
            smooth: What they make of another gradient.
        """
        return natural

    def quadratic(
        self,
        parts: Mapping[str, Part],
        estimates: Mapping[str, Any],
        direction: Mapping[str, Tensor],
        inner: Tensor,
    ) -> Tensor | None:
        """Return ``ΔᵀFΔ`` where the structure knows better than its inverses; mostly None."""
        return None

    @abstractmethod
    def cost(self, part: Part, workload: Workload) -> Cost:
        """Return what a part costs."""

    def joint_work(self, part: Part, workload: Workload) -> float:
        """Return the multiplications of an update that take the rows of all processes.

        They are part of what ``cost(...).refresh`` states, and made wherever the part is kept;
        0 where sums are all that an update needs.
        """
        return 0.0

    def elements(self, part: Part, workload: Workload) -> Elements:
        """Return how many numbers of a part are kept, and sent where processes share it.

        Args:
            part: The part.
            workload: The batch of all processes, and their number.

        Raises:
            NotImplementedError: If the structure does not tell, as where it is not ``shareable``.
        """
        raise NotImplementedError(f"structure {self.name!r} does not tell what it keeps and sends")


#: Name → class of every known structure.
STRUCTURES: dict[str, type[Structure]] = {}

_Structure = TypeVar("_Structure", bound=type[Structure])


def register_structure(cls: _Structure) -> _Structure:
    """Make a structure available under its ``name`` (a class decorator)."""
    STRUCTURES[cls.name] = cls
    return cls


def as_structure(
    structure: str | Structure,
    *,
    training: bool = False,
    every_row: bool = False,
    **options: Any,
) -> Structure:
    """Return a structure by its name.

    Args:
        structure: A name, or a structure, which is returned as it is.
        training: Take the defaults of training where they differ from those of the matrix as an
            object.
        every_row: Never take a random subset of a batch's rows, in training neither.
        **options: Options of the structure.

    Raises:
        ValueError: If the name is unknown or an option out of range.
        TypeError: If the structure does not know an option.
    """
    if isinstance(structure, Structure):
        return dataclasses.replace(structure, **options) if options else structure
    key = structure.replace("-", "_")
    if key not in STRUCTURES:
        known = ", ".join(sorted(STRUCTURES))
        raise ValueError(f"structure must be one of {known}, got {structure!r}")
    kind = STRUCTURES[key]
    known_options = {field.name for field in dataclasses.fields(kind)}
    if every_row and "rows_per_unit" in known_options:
        options = {"rows_per_unit": None, **options}
    for name in options:
        if name not in known_options:
            raise TypeError(f"structure {key!r} has no option {name!r}")
    return kind(**{**({} if training else kind.object_options), **options})

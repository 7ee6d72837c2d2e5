"""A table of what an optimizer does with each layer, before it runs out of memory or patience."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from natgrad.curvature.cost import Workload

if TYPE_CHECKING:
    from natgrad.optim.preconditioner import Preconditioner


@dataclass(frozen=True)
class LayerSummary:
    """One row of a summary.

    Attributes:
        name: Block name, or the name of an uncovered parameter.
        kind: Layer class.
        parameters: Number of trainable parameters.
        treatment: Structure name, or why a first-order fallback trains it.
        factors: What is factorised.
        memory: Bytes of curvature state.
        refresh: Multiplications of one curvature update with factorisation.
        step: Multiplications of preconditioning one gradient.
    """

    name: str
    kind: str
    parameters: int
    treatment: str
    factors: str
    memory: int
    refresh: float
    step: float


@dataclass(frozen=True)
class Summary:
    """Layer by layer, what is preconditioned and what it costs.

    Attributes:
        structure: Structure name.
        fisher: Name of the Fisher type.
        samples: Batch size the costs are stated for.
        layers: One entry per block, then one per parameter that is not preconditioned.
        joint: Cost of a structure that couples layers, if it does.
        backward: Multiplications of the plain backward pass's weight gradients, for comparison.
    """

    structure: str
    fisher: str
    samples: int
    layers: tuple[LayerSummary, ...]
    joint: LayerSummary | None
    backward: float

    @property
    def parameters(self) -> int:
        """Total number of trainable parameters."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def covered(self) -> int:
        """Number of parameters the structure preconditions."""
        return sum(la.parameters for la in self.layers if la.treatment == self.structure)

    @property
    def memory(self) -> int:
        """Bytes of curvature state."""
        extra = self.joint.memory if self.joint else 0
        return extra + sum(layer.memory for layer in self.layers)

    @property
    def refresh(self) -> float:
        """Multiplications of one curvature update with factorisation."""
        extra = self.joint.refresh if self.joint else 0.0
        return extra + sum(layer.refresh for layer in self.layers)

    @property
    def step(self) -> float:
        """Multiplications of preconditioning one gradient."""
        extra = self.joint.step if self.joint else 0.0
        return extra + sum(layer.step for layer in self.layers)

    def __str__(self) -> str:
        """Return the summary as a table."""
        header = ("layer", "kind", "parameters", "treatment", "factors", "memory")
        rows = [header]
        for layer in self.layers + ((self.joint,) if self.joint else ()):
            size = format_bytes(layer.memory) if layer.memory else "-"
            rows.append(
                (
                    layer.name,
                    layer.kind,
                    f"{layer.parameters:,}",
                    layer.treatment,
                    layer.factors or "-",
                    size,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.append(
            f"{self.covered:,} of {self.parameters:,} parameters by {self.structure} "
            f"({self.fisher} Fisher), {format_bytes(self.memory)} of curvature"
        )
        lines.append(
            f"multiplications at batch {self.samples}: {self.refresh:.2g} per refresh, "
            f"{self.step:.2g} per step (weight gradients: {self.backward:.2g})"
        )
        return "\n".join(line.rstrip() for line in lines)


def summarize(
    preconditioner: Preconditioner,
    samples: int,
    positions: Mapping[str, int] | None = None,
    fallback: str = "not preconditioned",
) -> Summary:
    """Return the summary of a preconditioner.

    Args:
        preconditioner: The preconditioner.
        samples: Batch size.
        positions: Block name → shared positions (pixels, tokens); 1 where unknown.
        fallback: What happens to parameters that are excluded.
    """
    curvature, capture = preconditioner.curvature, preconditioner.capture
    structure = curvature.structure.name
    directions = _directions(preconditioner)
    workload = Workload(samples, directions, positions or {})
    costs = curvature.costs(workload)
    layers = []
    backward = 0.0
    for name, block in capture.blocks.items():
        cost = costs.get(name)
        backward += float(samples) * workload.positions.get(name, 1) * block.layout.numel
        layers.append(
            LayerSummary(
                name,
                block.kind,
                block.layout.numel,
                structure,
                cost.factors if cost else "",
                cost.memory if cost else 0,
                cost.refresh if cost else 0.0,
                cost.step if cost else 0.0,
            )
        )
    excluded = dict.fromkeys(sorted(preconditioner.excluded), fallback)
    why = {n: f"{fallback}: {reason}" for n, reason in preconditioner.untrusted.items()}
    for name, reason in {**capture.uncovered, **excluded, **why}.items():
        parameter = preconditioner.parameters[name]
        layers.append(LayerSummary(name, "-", parameter.numel(), reason, "", 0, 0.0, 0.0))
    joint = costs.get("all layers")
    together = None
    if joint is not None:
        together = LayerSummary(
            "all layers", "-", 0, structure, joint.factors, joint.memory,
            joint.refresh, joint.step,
        )  # fmt: skip
    name = preconditioner.observer.fisher.name
    return Summary(structure, name, samples, tuple(layers), together, backward)


def _directions(preconditioner: Preconditioner) -> int:
    """Return how many vectors are pulled back per sample; outputs guessed from the last layer."""
    last = list(preconditioner.capture.blocks.values())[-1].layout
    return preconditioner.observer.fisher.directions(max(1, last.groups * last.d_out))


def format_bytes(size: float) -> str:
    """Return a size with a binary unit, e.g. ``"12.0 MiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"

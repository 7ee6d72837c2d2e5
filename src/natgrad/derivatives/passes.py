"""Passes of a model over data, to be differentiated once or twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture.evaluation import (
    attention_by_products,
    call_model,
    refuse_inference_mode,
    undisturbed,
)
from natgrad.capture.graph import own_functions
from natgrad.capture.model_output import Selection, require_output, unwrap
from natgrad.derivatives.twice_differentiable import TwiceDifferentiable
from natgrad.fisher.batches import Batch, batches_of, check_reiterable
from natgrad.layouts import ParameterLayout
from natgrad.likelihoods import Likelihood


@dataclass(frozen=True, eq=False)
class Pass:
    """One batch: the model's output ``(N, …)`` with its graph, its targets, if any, and likelihood.

    The likelihood is None where nobody asked what the output means.
    """

    output: Tensor
    target: Any
    likelihood: Likelihood | None

    def count(self) -> float:
        """Return what the mean of the losses divides by; a likelihood must be known.

        Targets that are missing are a ValueError.
        """
        if self.target is None:
            raise ValueError("a loss needs targets with every batch")
        assert self.likelihood is not None
        if self.output.numel() == 0:
            return 0.0
        return float(self.likelihood.count(self.output.detach(), self.target))

    def loss(self) -> Tensor:
        """Return the sum of the losses."""
        assert self.likelihood is not None
        mean: Tensor = self.likelihood.loss(self.output, self.target)
        return mean * self.likelihood.count(self.output.detach(), self.target)


@dataclass(frozen=True, eq=False)
class Passes:
    """Batches that a model may run on as often as wanted.

    Attributes:
        model: The model, which runs in its present mode.
        data: A pair ``(inputs, targets)`` or a re-iterable of such pairs.
        layout: Its trainable parameters.
        likelihood: What its outputs mean, if it matters.
        select: Picks the tensor of interest out of the model's output.
    """

    model: nn.Module
    data: Any
    layout: ParameterLayout
    likelihood: Likelihood | None = None
    select: Callable[[Any], Any] | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        data: Batch | Iterable[Batch],
        likelihood: Likelihood | None,
        output: Callable[[Any], Tensor] | None,
    ) -> Passes:
        """Return the passes of a model over some data.

        A model without trainable parameters, or data that can be read only once, are a ValueError.
        """
        inner = unwrap(model)
        layout = ParameterLayout.of(inner)
        if not layout.numel:
            raise ValueError(
                "the model has no trainable parameter to differentiate with respect to"
            )
        check_reiterable(data)
        select = output if likelihood is None else likelihood.selection(output)
        return cls(inner, data, layout, likelihood, select)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the order of the layout."""
        values = dict(self.model.named_parameters())
        return [values[name] for name in self.layout.names]

    def __iter__(self) -> Iterator[Pass]:
        """Run the model on one batch after the other; its buffers and random state stay.

        Inside ``torch.inference_mode()`` it is a RuntimeError.
        """
        refuse_inference_mode()
        empty = True
        for inputs, target in batches_of(self.data):
            empty = False
            with undisturbed(self.model), torch.enable_grad(), attention_by_products():
                with TwiceDifferentiable():
                    found = call_model(self.model, inputs)
                heads = self.select(found) if isinstance(self.select, Selection) else None
                output = require_output(found, self.select)
                own = self.likelihood
                if own is not None and heads is not None:
                    own = own.of_shapes({key: one.shape for key, one in heads.items()})
                yield Pass(output, target, own)
        if empty:
            raise ValueError("data has no batches")

    def flat(self, found: Sequence[Tensor | None]) -> Tensor:
        """Return gradients of the parameters side by side, zero where there are none."""
        pieces = [
            parameter.new_zeros(parameter.numel()) if one is None else one.reshape(-1)
            for parameter, one in zip(self.parameters, found, strict=True)
        ]
        return torch.cat([piece.to(self.layout.dtype) for piece in pieces])


def derivatives(
    output: Tensor, passes: Passes, vectors: Iterable[Tensor], create_graph: bool = False
) -> list[Tensor]:
    """Return ``vᵀ ∂output/∂θ``, ``(P,)``, for every vector v of the output's shape.

    A layer whose derivative cannot be differentiated again is a ValueError.
    """
    if not output.requires_grad:
        return [passes.layout.zeros(passes.layout.numel) for _ in vectors]
    return [
        passes.flat(
            differentiated(
                output, passes.parameters, vector.to(output.dtype), create_graph=create_graph
            )
        )
        for vector in vectors
    ]


def differentiated(
    output: Tensor, inputs: Sequence[Tensor], vector: Tensor, create_graph: bool = False
) -> Sequence[Tensor | None]:
    """Return ``vᵀ ∂output/∂input`` of several inputs; None of those that it does not depend on.

    A layer whose derivative cannot be differentiated again is a ValueError.
    """
    try:
        return torch.autograd.grad(
            output, inputs, vector, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in ("not implemented", "twice", "double b")):
            raise
        raise ValueError(
            f"a layer of the model cannot be differentiated twice ({error}): take "
            "natgrad.fisher_matrix(..., structure='full'), which needs one derivative, or make the "
            "layer of other functions"
        ) from error


def check_differentiable(output: Tensor, passes: Passes) -> None:
    """Raise a ValueError if the derivative of a function that users wrote has none itself.

    Torch takes such a derivative for zero without a word, as where it is made by
    ``once_differentiable`` or outside of torch. Then ``vᵀ(Jᵀw)`` is not ``wᵀ(Jv)``.
    """
    names = own_functions(output)
    if not names:
        return
    generator = torch.Generator().manual_seed(0)
    shapes = (output.shape, (passes.layout.numel,))
    w, v = (torch.randn(shape, generator=generator).to(output) for shape in shapes)
    (pulled,) = derivatives(output, passes, [w])
    (moved,) = _pushed(output, passes, v.unsqueeze(1))
    one, other = torch.dot(pulled, v.to(pulled)), (w * moved).sum().to(pulled)
    precision = 10 * torch.finfo(output.dtype).eps ** 0.5
    if not bool((one - other).abs() <= precision * pulled.norm()):
        raise ValueError(
            f"the derivative of {', '.join(names)}, or of one of them, cannot be differentiated "
            "again: take natgrad.fisher_matrix(..., structure='full'), which needs one derivative, "
            "or write its backward as functions of torch of what it has saved"
        )


def pushed_forward(output: Tensor, passes: Passes, columns: Tensor) -> list[Tensor]:
    """Return ``J v``, of the output's shape, for every column v ``(P,)`` of ``(P, k)``.

    ``Jᵀw`` is linear in w, and its derivative with respect to w along v is ``J v``: two backward
    passes, which all layers know, for one forward-mode pass, which some do not. A layer whose
    derivative cannot be differentiated again is a ValueError.
    """
    check_differentiable(output, passes)
    return _pushed(output, passes, columns)


def _pushed(output: Tensor, passes: Passes, columns: Tensor) -> list[Tensor]:
    probe = torch.zeros_like(output, requires_grad=True)
    (pulled,) = derivatives(output, passes, [probe], create_graph=True)
    if not pulled.requires_grad:
        return [torch.zeros_like(output) for _ in columns.unbind(1)]
    found = []
    for column in columns.unbind(1):
        (one,) = differentiated(pulled, [probe], column.to(pulled.dtype))
        found.append(torch.zeros_like(output) if one is None else one.detach())
    return found

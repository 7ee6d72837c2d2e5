"""``log ψ`` of a model as a function of its parameters, and what derivatives of it are needed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from natgrad.capture.evaluation import attention_by_products
from natgrad.capture.generic import parameter_places, parameters_by_samples
from natgrad.capture.kinds import dense_layout
from natgrad.layouts import BlockLayout, ParameterLayout


class LogAmplitude:
    """``log ψ(σ)`` with real parameters, as one real number or as real and imaginary part.

    Args:
        model: Takes configurations ``(N, sites)``; returns ``log ψ``, ``(N,)`` or ``(N, 1)``, real
            or complex.

    Attributes:
        layout: Order of all trainable parameters.
        block: The same as one block.
        parameters: Parameter name → parameter.

    Raises:
        ValueError: If the model treats configurations jointly or at random, has nothing to train,
            or complex parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        found = parameters_by_samples(model, "amplitude", "configuration")
        self.parameters: dict[str, nn.Parameter] = found
        self.model = model
        self.layout: ParameterLayout = ParameterLayout.of(model)
        shapes = tuple(self.layout.shapes.values())
        self.block: BlockLayout = dense_layout(self.layout.names, shapes)
        self._places = parameter_places(model, self.parameters)

    def __call__(self, samples: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return ``log ψ`` of configurations ``(n, sites)``, ``(n, K)`` with K real parts."""
        values = self.parameters if parameters is None else parameters
        given = {place: values[name] for place, name in self._places.items()}
        found = functional_call(self.model, given, (samples,), tie_weights=False)
        if not isinstance(found, Tensor) or found.numel() != len(samples):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                "the model must return one log amplitude per configuration, a real or complex "
                f"tensor of shape ({len(samples)},), got {shape}"
            )
        flat = found.reshape(-1)
        return torch.view_as_real(flat) if flat.is_complex() else flat.unsqueeze(1)

    def rows(self, samples: Tensor) -> Tensor:
        """Return ``∂ log ψ/∂θ`` of every configuration, ``(n, K, P)``."""

        def at(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
            return self(sample.unsqueeze(0), parameters)[0]

        found = vmap(jacrev(at), in_dims=(None, 0))(self._detached(), samples)
        flat = [found[name].flatten(2) if self.layout.shapes[name] else found[name].unsqueeze(2)
                for name in self.layout.names]  # fmt: skip
        return torch.cat(flat, 2).to(self.layout.dtype)

    def pushed(self, samples: Tensor, direction: Tensor) -> Tensor:
        """Return ``∂ log ψ/∂θ · v``, ``(n, K)``, for ``v`` of ``(P,)``, without any rows."""
        tangents = {
            name: value.to(self.parameters[name].dtype)
            for name, value in self.layout.to_dict(direction).items()
        }
        with attention_by_products():
            found: Tensor = jvp(lambda p: self(samples, p), (self._detached(),), (tangents,))[1]
        return found.to(self.layout.dtype)

    def tangents(self, samples: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``log ψ``, ``(n,)``, and ``∂ log ψ/∂θ · D``, ``(n, k)``, for D of ``(P, k)``."""
        pushed = [self.pushed(samples, direction) for direction in directions.unbind(1)]
        logs = self(samples, self._detached()).to(self.layout.dtype)
        columns = torch.stack(pushed, 1) if pushed else logs.new_zeros(len(logs), 0, logs.shape[1])
        return _numbers(logs), _numbers(columns)

    def pulled(self, samples: Tensor, weights: Tensor) -> Tensor:
        """Return ``Σ_nk w_nk ∂ log ψ_nk/∂θ``, ``(P,)``, for ``w`` of ``(n, K)``, without rows."""
        values, pull = vjp(lambda p: self(samples, p), self._detached())[:2]
        (found,) = pull(weights.to(values.dtype))
        return self.layout.to_flat(found).to(self.layout.dtype)

    def _detached(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}


def _numbers(parts: Tensor) -> Tensor:
    """Return numbers, complex ones for two parts in the last dimension."""
    return parts[..., 0] if parts.shape[-1] == 1 else torch.view_as_complex(parts.contiguous())

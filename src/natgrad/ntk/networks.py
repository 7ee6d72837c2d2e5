"""Fully connected networks in NTK parameterisation, and the description that kernels need."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from natgrad.ntk.activations import (
    Activation,
    LinearActivation,
    activation_of,
    as_activation,
)
from natgrad.ntk.scaling import NTKLinear


@dataclass(frozen=True)
class Architecture:
    """A fully connected network ``u_l = σ_w/√M_{l−1} W_l h_{l−1} + σ_b b_l``, ``h_l = φ(u_l)``.

    The output is ``u_L``, without an activation (Jacot et al. 2018).

    Attributes:
        widths: ``(M_0, M_1, …, M_L)``: input, hidden and output dimensions.
        activation: φ, the same in all hidden layers.
        weight_variances: ``σ_w²`` of each layer (L).
        bias_variances: ``σ_b²`` of each layer (L); 0 means no bias.

    Raises:
        ValueError: If there are fewer than two widths or one below 1, if there is not one variance
            per layer, or if a variance is out of range.
    """

    widths: tuple[int, ...]
    activation: Activation
    weight_variances: tuple[float, ...]
    bias_variances: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ValueError(
                "widths must be at least two positive numbers, input and output dimension, got "
                f"{self.widths}"
            )
        for name in ("weight_variances", "bias_variances"):
            values = getattr(self, name)
            if len(values) != self.depth:
                raise ValueError(
                    f"{name} must have one number for each of the {self.depth} layers, got "
                    f"{len(values)}"
                )
            if not all(math.isfinite(v) and v >= 0 for v in values):
                raise ValueError(f"{name} must be finite and not negative, got {values}")
        if min(self.weight_variances) == 0:
            raise ValueError(f"weight_variances must be positive, got {self.weight_variances}")

    @property
    def depth(self) -> int:
        """The number of weight layers ``L``."""
        return len(self.widths) - 1

    @property
    def input_dim(self) -> int:
        """``M_0``."""
        return self.widths[0]

    @property
    def outputs(self) -> int:
        """``C = M_L``."""
        return self.widths[-1]

    @classmethod
    def of(cls, model: nn.Module) -> Architecture:
        """Read the architecture off a chain of ``NTKLinear`` layers.

        The chain is an ``MLP`` or an ``nn.Sequential``, possibly nested, with one kind of
        activation between layers; ``nn.Flatten`` may come first and ``nn.Identity`` anywhere.
        Layers with nothing between them make a linear network, and so does a single layer.
        Parameters are not looked at, nor whether they are frozen.

        Raises:
            ValueError: If the model is anything else; the message names the submodule.
            TypeError: If it is not a module.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch module, got {type(model).__name__}")
        layers: list[NTKLinear] = []
        activation: Activation | None = None
        # What was met since the last layer.
        current: Activation | None = None
        for place, (name, module, own) in enumerate(_chain(model, None, "")):
            if type(module) is NTKLinear:
                if any(module.weight is layer.weight for layer in layers):
                    raise ValueError(
                        f"layer {name!r} shares its weight with an earlier layer; the "
                        "infinite-width limit is that of independent layers: give each its own"
                    )
                if layers:
                    if layers[-1].out_features != module.in_features:
                        raise ValueError(
                            f"layer {name!r} takes {module.in_features} inputs but follows a layer "
                            f"with {layers[-1].out_features} outputs; make the widths agree"
                        )
                    current = current or LinearActivation()
                    if activation not in (None, current):
                        raise ValueError(
                            f"the activation before layer {name!r} is {current.name} "
                            f"({current!r}), after earlier layers it is {activation!r}; use the "
                            "same one in all hidden layers"
                        )
                    activation = current
                layers.append(module)
                current = None
            elif type(module) is nn.Flatten and not layers and place == 0:
                if (module.start_dim, module.end_dim) != (1, -1):
                    raise ValueError(
                        f"{name!r} flattens dimensions {module.start_dim} to {module.end_dim}; the "
                        "inputs must be flattened to (N, M_0): use nn.Flatten()"
                    )
            else:
                found = own if own and type(module) is type(own.module()) else activation_of(module)
                if found is None:
                    raise ValueError(_reason(name, module))
                if not isinstance(found, LinearActivation):
                    if not layers or current is not None:
                        where = "before the first layer" if not layers else "after another one"
                        raise ValueError(
                            f"{name!r} is an activation {where}; there must be exactly one between "
                            "two NTKLinear layers: remove it"
                        )
                    current, last = found, name
        if not layers:
            raise ValueError("the model has no NTKLinear layer; use natgrad.ntk.MLP or NTKLinear")
        if current is not None:
            raise ValueError(
                f"{last!r} is an activation after the last layer; the network's output must be "
                "that of a linear layer: remove it, or move it into the loss"
            )
        return cls(
            widths=(layers[0].in_features, *(layer.out_features for layer in layers)),
            activation=activation or LinearActivation(),
            weight_variances=tuple(layer.weight_variance for layer in layers),
            bias_variances=tuple(
                0.0 if layer.bias is None else layer.bias_variance for layer in layers
            ),
        )


class MLP(nn.Sequential):
    """A fully connected network in NTK parameterisation: flatten, layer, activation, …, layer.

    Args:
        widths: ``(M_0, M_1, …, M_L)``: input, hidden and output dimensions.
        activation: A name or an ``Activation``; see ``natgrad.ntk.activations.ACTIVATIONS``.
        weight_variance: ``σ_w²``, one number or one per layer; 2 keeps the scale of activations
            through ReLU layers.
        bias_variance: ``σ_b²``, one number or one per layer. Layers have a bias where it is
            positive.
        device: Device of the parameters.
        dtype: Their dtype.

    Raises:
        ValueError: As ``Architecture``, and if the activation has an unknown name.
    """

    def __init__(
        self,
        widths: Sequence[int],
        activation: str | Activation = "relu",
        weight_variance: float | Sequence[float] = 2.0,
        bias_variance: float | Sequence[float] = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        depth = len(widths) - 1
        architecture = Architecture(
            widths=tuple(widths),
            activation=as_activation(activation),
            weight_variances=_per_layer(weight_variance, depth),
            bias_variances=_per_layer(bias_variance, depth),
        )
        modules: list[nn.Module] = [nn.Flatten()]
        for index in range(depth):
            if index:
                modules.append(architecture.activation.module())
            modules.append(
                NTKLinear(
                    widths[index],
                    widths[index + 1],
                    bias=architecture.bias_variances[index] > 0,
                    weight_variance=architecture.weight_variances[index],
                    bias_variance=architecture.bias_variances[index],
                    device=device,
                    dtype=dtype,
                )
            )
        super().__init__(*modules)
        self._activation = architecture.activation

    def __getitem__(self, index: slice | int) -> nn.Module:
        """Return one module, or a slice as a plain ``nn.Sequential``."""
        modules = list(self._modules.values())[index] if isinstance(index, slice) else None
        return super().__getitem__(index) if modules is None else nn.Sequential(*modules)

    @property
    def architecture(self) -> Architecture:
        """What ``Architecture.of`` reads off the layers as they are now."""
        return Architecture.of(self)


def _chain(
    model: nn.Module, own: Activation | None, prefix: str
) -> Iterator[tuple[str, nn.Module, Activation | None]]:
    """Yield the modules that a chain calls, with the activation of the MLP they belong to."""
    if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward:
        own = model._activation if isinstance(model, MLP) else None
        # Not named_children, which leaves out modules that are used again.
        for name, child in model._modules.items():
            if child is not None:
                yield from _chain(child, own, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, model, own


def _per_layer(value: float | Sequence[float], depth: int) -> tuple[float, ...]:
    if isinstance(value, (int, float)):
        return (float(value),) * depth
    return tuple(float(v) for v in value)


def _reason(name: str, module: nn.Module) -> str:
    """Say why a module has no place in a chain."""
    kind = type(module)
    article = "an" if kind.__name__[0] in "AEIOUN" else "a"
    where = f"layer {name!r} is {article} {kind.__module__.split('.')[0]} {kind.__name__}"
    if kind is nn.Linear:
        return (
            f"layer {name!r} is an nn.Linear in standard parameterisation; the infinite-width "
            "limit is defined for NTK parameterisation: use natgrad.ntk.MLP or NTKLinear, or "
            "convert the model by natgrad.ntk.to_ntk"
        )
    if isinstance(module, nn.GELU):
        return (
            f"layer {name!r} is the tanh approximation of GELU, whose kernel is not known; use "
            "nn.GELU()"
        )
    return (
        f"{where}, which has no place in a chain of NTKLinear layers and activations (nn.ReLU, "
        "nn.LeakyReLU, nn.GELU, nn.Tanh, nn.SiLU, Erf); remove or replace it"
    )

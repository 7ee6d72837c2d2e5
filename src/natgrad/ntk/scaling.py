"""NTK parameterisation: its linear layer, telling it from standard parameterisation, converting."""

from __future__ import annotations

import collections
import copy
import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from natgrad.capture.kinds import register_kind
from natgrad.capture.linear import LinearKind


class NTKLinear(nn.Linear):
    r"""A linear layer ``y = (σ_w / √d_in) W x + σ_b b`` with ``W, b ~ N(0, 1)``.

    The scale of the layer sits outside its parameters, so that the size of their gradients, and
    the neural tangent kernel, converge as the width grows (Jacot et al. 2018).

    Args:
        in_features: ``d_in``.
        out_features: ``d_out``.
        bias: Whether there is a bias.
        weight_variance: ``σ_w²``; 2 keeps the scale of activations through ReLU layers.
        bias_variance: ``σ_b²``.
        device: Device of the parameters.
        dtype: Their dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_variance: float = 2.0,
        bias_variance: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if weight_variance <= 0 or bias_variance < 0:
            raise ValueError(
                "weight_variance must be positive and bias_variance at least 0, got "
                f"{weight_variance} and {bias_variance}"
            )
        self.weight_variance = weight_variance
        self.bias_variance = bias_variance
        self.weight_scale: float = (weight_variance / in_features) ** 0.5
        self.bias_scale: float = bias_variance**0.5
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw weight and bias from the standard normal distribution."""
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.normal_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(σ_w / √d_in) W x + σ_b b``."""
        output: Tensor = nn.functional.linear(input * self.weight_scale, self.weight)
        return output if self.bias is None else output + self.bias_scale * self.bias


class _NTKLinearKind(LinearKind):
    def scales(self, module: nn.Module) -> tuple[float, float]:
        layer = cast(NTKLinear, module)
        return layer.weight_scale, layer.bias_scale


register_kind(_NTKLinearKind(), NTKLinear)


@dataclass(frozen=True)
class LayerScale:
    """How the standard form ``y = W' x + b'`` of a layer relates to NTK parameterisation.

    In NTK parameterisation it is ``y = c W x + σ_b b`` with entries of unit mean square, so
    ``W' = c W`` and ``b' = σ_b b``.

    Attributes:
        name: The layer's name in the model.
        kind: ``"ntk"`` or ``"standard"``: the form the layer is in.
        fan_in: Inputs of one output; for convolutions, channels of a group times kernel size.
        weight_variance: ``σ_w²``: ``fan_in`` times the mean square of ``W'`` as it is now, 1 if
            ``W'`` is zero.
        bias_variance: ``σ_b²``: the mean square of ``b'``, 1 if the bias is trainable and zero;
            None without a bias.
    """

    name: str
    kind: str
    fan_in: int
    weight_variance: float
    bias_variance: float | None

    @property
    def weight_scale(self) -> float:
        """``c = σ_w/√fan_in``."""
        return math.sqrt(self.weight_variance / self.fan_in)

    @property
    def bias_scale(self) -> float | None:
        """``σ_b``, or None without a bias."""
        return None if self.bias_variance is None else math.sqrt(self.bias_variance)

    @property
    def learning_rate_scale(self) -> float:
        """``c²``: what turns a gradient step of ``W'`` into that of NTK parameterisation.

        Once because the gradient by ``W`` is ``c`` times that by ``W'``, once because ``W'`` moves
        ``c`` times as far as ``W``.
        """
        return self.weight_variance / self.fan_in

    @property
    def bias_learning_rate_scale(self) -> float | None:
        """``σ_b²``, the same for the bias; None without a bias."""
        return self.bias_variance


@dataclass(frozen=True)
class Parameterization:
    """The parameterisation of a model's layers, as found by ``parameterization``.

    Attributes:
        kind: ``"ntk"``, ``"standard"``, ``"mixed"``, or ``"none"`` without linear layers and
            convolutions.
        layers: One entry per ``NTKLinear``, ``nn.Linear`` and ``nn.Conv{1,2,3}d``, in the model's
            order.
        other: Names of other modules with parameters of their own; the model itself is ``""``.
    """

    kind: str
    layers: tuple[LayerScale, ...]
    other: tuple[str, ...]

    def __str__(self) -> str:
        lines = []
        if self.layers:
            width = max(5, *(len(layer.name) for layer in self.layers))
            lines.append(
                f"{'layer':<{width}}  {'kind':<8}  {'fan_in':>7}  {'σ_w²':>10}  {'σ_b²':>10}  "
                f"{'c²':>10}"
            )
        for layer in self.layers:
            bias = "none" if layer.bias_variance is None else f"{layer.bias_variance:.4g}"
            lines.append(
                f"{layer.name:<{width}}  {layer.kind:<8}  {layer.fan_in:>7}  "
                f"{layer.weight_variance:>10.4g}  {bias:>10}  {layer.learning_rate_scale:>10.4g}"
            )
        lines.append(_SENTENCES[self.kind])
        if self.other:
            lines.append(f"Other modules with parameters: {', '.join(map(repr, self.other))}.")
        return "\n".join(lines)


_SENTENCES = {
    "ntk": "The model is in NTK parameterisation: one learning rate suits all layers.",
    "standard": (
        "The model is in standard parameterisation: for the steps of NTK parameterisation, "
        "multiply the learning rate of each weight by c² and of each bias by σ_b²."
    ),
    "mixed": (
        "The model mixes both: in standard layers, multiply the learning rate of each weight by c² "
        "and of each bias by σ_b² for the steps of NTK parameterisation."
    ),
    "none": "The model has no linear layer and no convolution.",
}


def parameterization(model: nn.Module) -> Parameterization:
    """Tell whether a model is in NTK or standard parameterisation, and what relates the two.

    Args:
        model: Any model. Subclasses of torch's layers count as other modules, for their forward
            pass may differ.

    Returns:
        The scales of each layer, measured from its weights as they are now.

    Raises:
        ValueError: If a weight or bias is not finite.
    """
    layers, other = [], []
    for name, module in model.named_modules():
        if type(module) in _KINDS and cast(nn.Linear, module).weight.numel():
            layers.append(_layer_scale(name, module))
        elif any(True for _ in module.parameters(recurse=False)):
            other.append(name)
    kinds = {layer.kind for layer in layers}
    kind = "none" if not kinds else "mixed" if len(kinds) > 1 else kinds.pop()
    return Parameterization(kind, tuple(layers), tuple(other))


def to_ntk(model: nn.Module) -> nn.Module:
    """Return a copy of a model with every ``nn.Linear`` in NTK parameterisation.

    The copy computes the same function, up to rounding. Its weights and biases have entries of unit
    mean square; ``σ_w²`` and ``σ_b²`` are measured. A weight or bias of zeros stays so, with
    variance 1, and remains trainable. Convolutions, subclasses of ``nn.Linear`` and other modules
    are left as they are.

    Args:
        model: A model with ``nn.Linear`` layers, or one such layer; it is not changed.

    Raises:
        ValueError: If there is no ``nn.Linear``, if one shares a parameter with another module, if
            one belongs to an ``nn.TransformerEncoderLayer``, which reads weights directly, or if a
            weight or bias is not finite.
    """
    copied = copy.deepcopy(model)
    owners: collections.Counter[int] = collections.Counter()
    direct = []
    for name, module in copied.named_modules():
        owners.update(id(p) for p in module.parameters(recurse=False))
        if isinstance(module, nn.TransformerEncoderLayer):
            direct.append(f"{name}." if name else "")
    found = False
    for name, module in copied.named_modules():
        if type(module) is not nn.Linear or not module.weight.numel():
            continue
        if any(owners[id(p)] > 1 for p in module.parameters()):
            raise ValueError(
                f"layer {name!r} shares a parameter with another module, which scaling it would "
                "change; untie them before converting"
            )
        if any(name.startswith(prefix) for prefix in direct):
            raise ValueError(
                f"layer {name!r} belongs to an nn.TransformerEncoderLayer, which uses its weight "
                "without calling it; convert the other parts of the model only"
            )
        _convert(module, _layer_scale(name, module))
        found = True
    if not found:
        raise ValueError(
            "the model has no nn.Linear layer to convert; natgrad.ntk.parameterization lists its "
            "layers"
        )
    return copied


_KINDS: dict[type[nn.Module], str] = {
    NTKLinear: "ntk",
    nn.Linear: "standard",
    nn.Conv1d: "standard",
    nn.Conv2d: "standard",
    nn.Conv3d: "standard",
}


def _layer_scale(name: str, module: nn.Module) -> LayerScale:
    layer = cast(nn.Linear, module)
    fan_in = layer.weight[0].numel()
    # Of the entries' mean square: the variance that entries of unit mean square need.
    weight_factor, bias_factor = float(fan_in), 1.0
    if isinstance(module, NTKLinear):
        weight_factor, bias_factor = module.weight_variance, module.bias_variance
    zero = 1.0 if not isinstance(module, NTKLinear) else weight_factor
    weight_variance = weight_factor * _mean_square(layer.weight, name) or zero
    bias_variance = None
    if layer.bias is not None:
        bias_variance = bias_factor * (_mean_square(layer.bias, name) or 1.0)
    return LayerScale(name, _KINDS[type(module)], fan_in, weight_variance, bias_variance)


def _mean_square(parameter: Tensor, name: str) -> float:
    value = float(parameter.detach().double().square().mean())
    if not math.isfinite(value):
        raise ValueError(
            f"layer {name!r} has a weight or bias that is not finite; restore the model first"
        )
    return value


def _convert(layer: nn.Linear, scale: LayerScale) -> None:
    """Turn a layer of our own copy into an ``NTKLinear``, which keeps its hooks and flags."""
    layer.__class__ = NTKLinear
    converted = cast(NTKLinear, layer)
    converted.weight_variance = scale.weight_variance
    converted.bias_variance = scale.bias_variance or 0.0
    converted.weight_scale = scale.weight_scale
    converted.bias_scale = scale.bias_scale or 0.0
    with torch.no_grad():
        converted.weight.div_(scale.weight_scale)
        converted.weight.grad = None
        if converted.bias is not None:
            converted.bias.div_(converted.bias_scale)
            converted.bias.grad = None

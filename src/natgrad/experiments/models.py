"""The networks of the comparison: an MLP in NTK parameterisation and a small CNN."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from natgrad import ntk
from natgrad.experiments.random_state import reproducible

OUTPUT_VARIANCE = 0.1
"""σ_w² of the last layer of the MLP."""


def fully_connected(
    sizes: Sequence[int],
    layer: Callable[[int, int], nn.Module] = nn.Linear,
    activation: Callable[[], nn.Module] = nn.Tanh,
) -> nn.Sequential:
    """Return layers between sizes: inputs, units of every hidden layer, and outputs."""
    pairs = itertools.pairwise(sizes)
    layers = [one for d_in, d_out in pairs for one in (layer(d_in, d_out), activation())]
    return nn.Sequential(*layers[:-1])


class MLP(ntk.MLP):
    """A ReLU network in NTK parameterisation: `depth` weight layers, L − 1 hidden of `width` units.

    Every layer is f = (σ_w/√fan_in) W h with W ~ N(0, 1), without bias. With inputs of ‖x‖² = d and
    σ_w² = 2 the mean square of the activations is 1 in every hidden layer. The last layer has σ_w²
    = 0.1, so that the outputs begin small beside one-hot targets; that scales the tangent kernel
    and leaves the learning rates of natural gradient descent as they are.
    """

    def __init__(
        self, input_shape: tuple[int, ...], classes: int, width: int = 512, depth: int = 3
    ) -> None:
        widths = [torch.Size(input_shape).numel(), *[width] * (depth - 1), classes]
        super().__init__(widths, weight_variance=[2.0] * (depth - 1) + [OUTPUT_VARIANCE])


class SmallCNN(nn.Module):
    """A convolutional network: L − 1 3×3 convolutions, global mean, one linear layer; L ≥ 2.

    Every second convolution halves the resolution as long as it is at least 4 pixels; all have
    `width` channels. Weights start with He's normal initialisation, biases at zero.
    """

    def __init__(
        self, input_shape: tuple[int, int, int], classes: int, width: int = 32, depth: int = 4
    ) -> None:
        super().__init__()
        channels, side = input_shape[0], min(input_shape[1:])
        layers: list[nn.Module] = []
        for index in range(depth - 1):
            stride = 2 if index % 2 and side >= 4 else 1
            side = (side + stride - 1) // stride
            layers += [nn.Conv2d(channels, width, 3, stride=stride, padding=1), nn.ReLU()]
            channels = width
        self.features: nn.Sequential = nn.Sequential(*layers)
        self.classifier: nn.Linear = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                gain = 2.0 if isinstance(module, nn.Conv2d) else 1.0
                nn.init.normal_(module.weight, std=math.sqrt(gain / module.weight[0].numel()))
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Maps (N, channels, height, width) to logits (N, classes)."""
        logits: Tensor = self.classifier(self.features(inputs).mean((2, 3)))
        return logits


MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": MLP, "cnn": SmallCNN}
"""The networks by name; each takes (input_shape, classes, width, depth)."""

DEFAULT_WIDTHS = {"mlp": 512, "cnn": 32}
"""Width of each network where none is given."""


def build_model(
    name: str, input_shape: tuple[int, int, int], classes: int, *, width: int, depth: int, seed: int
) -> nn.Module:
    """Build a network in float32 on the CPU; the same seed gives the same weights.

    The global random state is left alone. An unknown name, or a size too small, is a ValueError.
    """
    if name not in MODELS:
        raise ValueError(f"Unknown model {name!r}: choose one of {', '.join(MODELS)}.")
    if width < 1:
        raise ValueError(f"The width must be at least 1, not {width}.")
    least = 2 if name == "cnn" else 1
    if depth < least:
        raise ValueError(
            f"The depth of a {name} must be at least {least} weight layers, not {depth}."
        )
    with reproducible(seed):
        return MODELS[name](input_shape, classes, width=width, depth=depth)

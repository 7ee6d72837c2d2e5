"""Small networks that more than one benchmark trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def mlp(sizes: Sequence[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Return linear layers with an activation between any two of them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for d_in, d_out in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(d_in, d_out), activation()]
    return nn.Sequential(*layers[:-1])


def autoencoder(sizes: Sequence[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Return an encoder of the given sizes and its mirror image; code and output are linear."""
    encoder, decoder = mlp(sizes, activation), mlp(sizes[::-1], activation)
    return nn.Sequential(*encoder, *decoder[1:])


class Attention(nn.Module):
    """Attention of several heads, to the tokens themselves or to a memory.

    `masked` (N, tokens) says which tokens attended to are padding.
    """

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, memory: Tensor | None = None, masked: Tensor | None = None
    ) -> Tensor:
        """Return what every token of x gathers."""
        memory = x if memory is None else memory
        n, length, width = x.shape
        query = self.query(x).view(n, length, self.heads, -1).transpose(1, 2)
        joint = self.key_value(memory).view(n, memory.shape[1], 2, self.heads, -1)
        key, value = joint.permute(2, 0, 3, 1, 4)
        seen = None if masked is None else ~masked[:, None, None, :]
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=self.causal
        )
        return self.out(mixed.transpose(1, 2).reshape(n, length, width))


class TransformerBlock(nn.Module):
    """Self-attention and a multilayer perceptron, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations behind the block."""
        n, length, width = x.shape
        joint = self.query_key_value(self.norm_1(x)).view(n, length, 3, self.heads, -1)
        query, key, value = joint.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.down(functional.gelu(self.up(self.norm_2(x))))


class Transformer(nn.Module):
    """A small language model over characters."""

    def __init__(
        self, width: int = 128, depth: int = 2, heads: int = 4, symbols: int = 65, length: int = 64
    ) -> None:
        super().__init__()
        self.symbols = nn.Embedding(symbols, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols)
        for embedding in (self.symbols, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the logits of the next characters."""
        places = torch.arange(codes.shape[1], device=codes.device).expand_as(codes)
        return self.head(self.norm(self.blocks(self.symbols(codes) + self.positions(places))))


class LSTM(nn.Module):
    """A recurrent language model over characters."""

    def __init__(self, width: int = 128, symbols: int = 65) -> None:
        super().__init__()
        self.symbols = nn.Embedding(symbols, 64)
        self.recurrent = nn.LSTM(64, width, batch_first=True)
        self.head = nn.Linear(width, symbols)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the logits of the next characters."""
        return self.head(self.recurrent(self.symbols(codes))[0])


class Translator(nn.Module):
    """An encoder and a decoder of transformer blocks; token 0 is padding."""

    def __init__(
        self, symbols: int, length: int, width: int = 96, depth: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        self.source, self.target, self.positions = (
            nn.Embedding(count, width) for count in (symbols, symbols, length)
        )
        for embedding in (self.source, self.target, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)
        self.encoder = nn.ModuleList(TransformerBlock(width, heads, False) for _ in range(depth))
        self.decoder = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.crossing = nn.ModuleList(Attention(width, heads) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth + 2))
        self.head = nn.Linear(width, symbols)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return the logits of the words that follow those of the target."""
        memory, x = self._embed(self.source, source), self._embed(self.target, target)
        for block in self.encoder:
            memory = block(memory)
        memory = self.norms[-1](memory)
        for block, crossing, norm in zip(self.decoder, self.crossing, self.norms, strict=False):
            x = x + crossing(norm(x), memory, source == 0)
            x = block(x)
        return self.head(self.norms[-2](x))

    def _embed(self, embedding: nn.Embedding, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return embedding(tokens) + self.positions(places)


class VisionTransformer(nn.Module):
    """Patches of an image, transformer blocks, the mean over patches."""

    def __init__(
        self, image: int, patch: int, classes: int, width: int = 64, depth: int = 3, heads: int = 4
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


class ResidualBlock(nn.Module):
    """Two convolutions with BatchNorm and a way around them."""

    def __init__(self, d_in: int, d_out: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(d_in, d_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(d_out),
            nn.ReLU(),
            nn.Conv2d(d_out, d_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(d_out),
        )
        self.around = nn.Sequential()
        if stride > 1 or d_in != d_out:
            self.around = nn.Sequential(
                nn.Conv2d(d_in, d_out, 1, stride, bias=False), nn.BatchNorm2d(d_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations behind the block."""
        return functional.relu(self.convolutions(x) + self.around(x))


def resnet(classes: int, widths: Sequence[int] = (16, 16, 32, 32)) -> nn.Sequential:
    """Return a residual network; images shrink where the width grows."""
    blocks = [
        ResidualBlock(d_in, d_out, 1 if d_in == d_out else 2)
        for d_in, d_out in zip(widths, widths[1:], strict=False)
    ]
    return nn.Sequential(
        nn.Conv2d(3, widths[0], 3, 1, 1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(widths[-1], classes),
    )


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, LayerNorm over channels, pointwise GELU, layer scale."""

    def __init__(self, width: int, kernel: int = 5) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations behind the block."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(functional.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


def convnext(classes: int, width: int = 48, depth: int = 3) -> nn.Sequential:
    """Return a ConvNeXt of one resolution, half that of the images."""
    return nn.Sequential(
        nn.Conv2d(3, width, 2, stride=2),
        *(ConvNeXtBlock(width) for _ in range(depth)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(width),
        nn.Linear(width, classes),
    )


class InvertedResidual(nn.Module):
    """The block of MobileNetV3: expand, depthwise, squeeze and excite, project."""

    def __init__(self, d_in: int, d_out: int, stride: int, expansion: int = 3) -> None:
        super().__init__()
        hidden = expansion * d_in
        self.expand = nn.Sequential(
            nn.Conv2d(d_in, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
        )
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(hidden, hidden // 4, 1),
            nn.ReLU(),
            nn.Conv2d(hidden // 4, hidden, 1),
            nn.Hardsigmoid(),
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, d_out, 1, bias=False), nn.BatchNorm2d(d_out))
        self.adds = stride == 1 and d_in == d_out

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations behind the block."""
        y = self.expand(x)
        y = self.project(y * self.excite(y))
        return x + y if self.adds else y


def mobilenet(classes: int) -> nn.Sequential:
    """Return a small network of the kind of MobileNetV3."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.Hardswish(),
        InvertedResidual(16, 16, 1),
        InvertedResidual(16, 24, 2),
        InvertedResidual(24, 24, 1),
        InvertedResidual(24, 32, 2),
        InvertedResidual(32, 32, 1),
        nn.Conv2d(32, 96, 1, bias=False),
        nn.BatchNorm2d(96),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(96, classes),
    )

"""
Translation
===========

An encoder and a decoder of torch's own transformer layers translate Roman numerals to decimal
ones. Embeddings, attention, linear layers and LayerNorm are all preconditioned; padding counts
neither in the loss nor in the curvature.
"""

import warnings

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad

torch.set_num_threads(1)
warnings.filterwarnings("ignore", ".*nested tensors.*")

# %%
# The languages. 0 is padding, 1 begins a sentence and 2 ends it.

ROMAN = [(1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L")]
ROMAN += [(40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")]


def roman(number: int) -> str:
    text = ""
    for value, letters in ROMAN:
        text += letters * (number // value)
        number %= value
    return text


def encoded(words: list[str], letters: str) -> Tensor:
    codes = [[1, *(3 + letters.index(c) for c in word), 2] for word in words]
    longest = max(map(len, codes))
    return torch.tensor([one + [0] * (longest - len(one)) for one in codes])


numbers = torch.arange(1, 1000)[torch.randperm(999, generator=torch.Generator().manual_seed(0))]
source = encoded([roman(int(n)) for n in numbers], "IVXLCDM")
target = encoded([str(int(n)) for n in numbers], "0123456789")
train, test = slice(0, 800), slice(800, None)


class Translator(nn.Module):
    """Encoder and decoder, a layer each."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(10, width), nn.Embedding(13, width)
        self.places = nn.Embedding(16, width)
        options = {"nhead": 4, "dim_feedforward": 96, "dropout": 0.0, "batch_first": True}
        self.transformer = nn.Transformer(
            width, num_encoder_layers=1, num_decoder_layers=1, **options
        )
        self.output = nn.Linear(width, 13)

    def forward(self, source: Tensor, before: Tensor) -> Tensor:
        """Return the logits ``(N, T, 13)`` of every next symbol."""
        read, written = (
            table(codes) + self.places(torch.arange(codes.shape[1]).expand_as(codes))
            for table, codes in ((self.source, source), (self.target, before))
        )
        later = nn.Transformer.generate_square_subsequent_mask(before.shape[1])
        mask = source == 0
        mixed = self.transformer(
            read, written, tgt_mask=later, src_key_padding_mask=mask,
            memory_key_padding_mask=mask, tgt_is_causal=True,
        )  # fmt: skip
        return self.output(mixed)


def greedy(model: nn.Module, source: Tensor) -> Tensor:
    written = torch.ones(len(source), 1, dtype=torch.int64)
    for _ in range(target.shape[1] - 1):
        next_one = model(source, written)[:, -1].argmax(-1, keepdim=True)
        written = torch.cat([written, next_one], 1)
    return written


def fit(make_optimizer, epochs=14):
    torch.manual_seed(0)
    model = Translator()
    optimizer, losses = make_optimizer(model), []
    steps = epochs * 800 // 40
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(epochs):
        for chosen in torch.randperm(800).split(40):
            optimizer.zero_grad()
            logits = model(source[chosen], target[chosen, :-1])
            loss = functional.cross_entropy(logits.mT, target[chosen, 1:], ignore_index=0)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    with torch.no_grad():
        found = greedy(model.eval(), source[test])
    stops = (target[test] == 2).cumsum(1).cumsum(1) <= 1  # What follows the end does not matter.
    right = ((found == target[test]) | ~stops).all(1).float().mean().item()
    return losses, 100 * right, model


# %%
# The loss module is the likelihood, so that natgrad knows what is ignored.

criterion = nn.CrossEntropyLoss(ignore_index=0)
runs = {
    "KFAC": fit(lambda model: natgrad.KFAC(model, criterion)),
    "AdamW, lr = 0.003": fit(lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3)),
}
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
for name, (losses, right, _) in runs.items():
    axes.semilogy(losses, label=f"{name}: {right:.0f} % of new numbers right")
axes.set(xlabel="step", ylabel="training loss")
axes.legend()
plt.show()

# %%
# Numbers that were not trained on:

model = runs["KFAC"][2]
for number in numbers[-5:]:
    text = encoded([roman(int(number))], "IVXLCDM")
    digits = [int(code) - 3 for code in greedy(model, text)[0, 1:]]
    print(roman(int(number)), "→", "".join(str(d) for d in digits if d >= 0), f"({int(number)})")

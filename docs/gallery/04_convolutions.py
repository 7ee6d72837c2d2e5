"""
A residual network
==================

Convolutions, BatchNorm and the linear layer on top: each has Kronecker factors of its own. A
learning-rate schedule and weight decay go with it as usual.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import natgrad
from natgrad.experiments.data import load_dataset

torch.set_num_threads(1)
digits = load_dataset("digits")
train = TensorDataset(digits.train_inputs, digits.train_labels)


class Block(nn.Module):
    """Two convolutions around which the input goes."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x):
        return functional.relu(x + self.body(x))


def make_model(width=12):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), Block(width), nn.MaxPool2d(2), Block(width),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10),
    )  # fmt: skip


# %%
# The batch norms see the batch, so that samples are coupled; natgrad finds that out by itself and
# takes it into account.


def fit(make_optimizer, epochs=6):
    model = make_model()
    optimizer = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    train_loss, test_error = [], []
    for _ in range(epochs):
        model.train()
        total = 0.0
        for x, y in DataLoader(train, batch_size=100, shuffle=True):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(x) / len(train)
        schedule.step()
        model.eval()
        with torch.no_grad():
            wrong = model(digits.test_inputs).argmax(1) != digits.test_labels
        train_loss.append(total)
        test_error.append(100 * wrong.float().mean().item())
    return train_loss, test_error, optimizer


runs = {
    "KFAC": fit(lambda model: natgrad.KFAC(model, weight_decay=1e-3)),
    "AdamW, lr = 0.01": fit(lambda model: torch.optim.AdamW(model.parameters(), lr=0.01)),
    "SGD, momentum, lr = 0.1": fit(
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ),
}

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
for name, (losses, errors, _) in runs.items():
    left.semilogy(range(1, len(losses) + 1), losses, marker="o", label=name)
    right.plot(range(1, len(errors) + 1), errors, marker="o")
left.set(xlabel="epoch", ylabel="training loss")
right.set(xlabel="epoch", ylabel="test error / %")
left.legend(fontsize="small")
plt.show()

# %%
# A row per layer:

print(runs["KFAC"][2].summary())

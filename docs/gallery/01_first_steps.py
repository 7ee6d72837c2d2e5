"""
First steps
===========

One line of a training loop changes: which optimizer it makes.
"""

# sphinx_gallery_thumbnail_number = 1
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import natgrad
from natgrad.experiments.data import load_dataset

torch.set_num_threads(1)

# %%
# The data: 1,200 handwritten digits of 8 × 8 pixels to train on, 597 to test.

digits = load_dataset("digits")
train = TensorDataset(digits.train_inputs.flatten(1), digits.train_labels)
x_test, y_test = digits.test_inputs.flatten(1), digits.test_labels


# %%
# An ordinary network and an ordinary loop. The optimizer gets the *model*, because curvature comes
# from its layers; the loss tells it the rest.


def fit(make_optimizer, epochs=10):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10)
    )
    optimizer, losses = make_optimizer(model), []
    for _ in range(epochs):
        for x, y in DataLoader(train, batch_size=100, shuffle=True):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    with torch.no_grad():
        right = (model(x_test).argmax(1) == y_test).float().mean()
    return losses, 100 * right.item(), optimizer


runs = {
    "KFAC, defaults": fit(lambda model: natgrad.KFAC(model, nn.CrossEntropyLoss())),
    "AdamW, lr = 0.003": fit(lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3)),
    "SGD, momentum, lr = 0.1": fit(
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ),
}

# %%
# Nothing was tuned for K-FAC: the length of its steps is measured as it goes.

figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
for name, (losses, accuracy, _) in runs.items():
    axes.semilogy(losses, label=f"{name}: {accuracy:.1f} % right")
axes.set(xlabel="step", ylabel="training loss")
axes.legend()
plt.show()

# %%
# What is preconditioned, and what it costs:

print(runs["KFAC, defaults"][2].summary())

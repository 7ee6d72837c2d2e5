"""
The theory on your network
==========================

In wide networks approximate Fisher matrices give the same dynamics in function space as the exact
one (Karakida & Osawa 2020), because their steps are isotropic there. Whether that holds for a
given network, ``natgrad.ntk`` tells.
"""

import matplotlib.pyplot as plt
import torch

import natgrad
from natgrad import ntk
from natgrad.experiments.data import load_dataset

torch.set_num_threads(1)
torch.manual_seed(0)
digits = load_dataset("digits", train_samples=20, classes=(3, 8))
x = digits.train_inputs.flatten(1)
y = digits.train_labels.float()[:, None] - 0.5

# %%
# A step changes the outputs by :math:`-\eta M r`, with r the residual. It is isotropic where the
# coefficients M are a multiple α of the identity; then the learning rate 1/α fits the data in one
# step, up to the change of the network's Jacobian.

model = ntk.MLP([64, 1024, 1024, 1])
for structure in ("full", "block_diagonal", "kfac", "diagonal"):
    found = ntk.isotropy(model, x, structure)
    print(
        f"{structure:15} α = {found.alpha:8.3g}, deviation from αI {100 * found.deviation:6.2f} %"
    )

# %%
# The coefficients themselves, each divided by the mean of its diagonal: those of the entry-wise
# diagonal are far from the identity at any width.

figure, axes = plt.subplots(1, 4, figsize=(10, 2.8), layout="constrained")
for one, structure in zip(axes, ("full", "block_diagonal", "kfac", "diagonal"), strict=True):
    found = ntk.isotropy(model, x, structure)
    one.imshow(found.coefficients / found.alpha, vmin=-1, vmax=1, cmap="RdBu")
    one.set(title=structure, xticks=[], yticks=[])
plt.show()

# %%
# Predicted curves, of the linearised network, beside trained ones, at half the rate of theory.

figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
linearised = ntk.LinearizedNetwork(model, x)
for color, (structure, make) in enumerate(
    {"full": natgrad.ExactNGD, "block_diagonal": natgrad.BlockDiagonalNGD}.items()
):
    rate = 0.5 / ntk.isotropy(model, x, structure).alpha
    predicted = ntk.predict(linearised, y, structure, lr=rate, steps=8).train_loss
    trained = ntk.MLP([64, 1024, 1024, 1])
    trained.load_state_dict(model.state_dict())
    optimizer = make(trained, "gaussian", lr=rate, damping=1e-9, momentum=0.0, kl_clip=None)
    losses = []
    for _ in range(9):
        optimizer.zero_grad()
        loss = 0.5 * (trained(x) - y).square().sum(1).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    axes.semilogy(predicted, color=f"C{color}", label=f"{structure}, predicted")
    axes.semilogy(
        losses,
        "os"[color],
        color=f"C{color}",
        markersize=9 - 4 * color,
        label=f"{structure}, trained",
    )
axes.set(xlabel="step", ylabel="training loss")
axes.legend()
plt.show()

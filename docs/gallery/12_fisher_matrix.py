"""
The Fisher matrix and its structures
====================================

``natgrad.fisher_matrix`` gives the matrix as an object: any structure, any model. Here is what
each structure keeps of one small network's matrix.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import natgrad
from natgrad.experiments.data import load_dataset

torch.set_num_threads(1)
torch.manual_seed(0)
digits = load_dataset("digits", train_samples=200)
images = nn.functional.avg_pool2d(digits.train_inputs, 4).flatten(1)
loader = DataLoader(TensorDataset(images, digits.train_labels), batch_size=50)
model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 10))

# %%
# 142 parameters, in the order of the layers; weights before biases.

names = ("full", "block_tridiagonal", "block_diagonal", "kfac", "unit_wise", "diagonal")
matrices = {name: natgrad.fisher_matrix(model, loader, "categorical", name) for name in names}
exact = matrices["full"].to_dense()

figure, axes = plt.subplots(2, 3, figsize=(9, 6.4), layout="constrained")
for one, (name, matrix) in zip(axes.flat, matrices.items(), strict=True):
    dense = matrix.to_dense()
    distance = float((dense - exact).norm() / exact.norm())
    one.imshow(dense.abs().clamp(min=1e-7).log10(), vmin=-5, vmax=-0.5, cmap="magma")
    one.set(title=f"{name}: {100 * distance:.0f} % off", xticks=[], yticks=[])
plt.show()

# %%
# All of them multiply, solve and take determinants in the same way, with flat vectors, columns or
# dicts of tensors. An inverse is an object that is factorised once.

F = matrices["kfac"]
inverse = F.inverse(damping=1e-3)
v = torch.randn(142)
print("residual of a solve:", float((F @ (inverse @ v) + 1e-3 * (inverse @ v) - v).norm()))
print("trace", float(F.trace()), "of", float(matrices["full"].trace()))
print("log det(F + λI)", float(F.logdet(damping=1e-3)))

# %%
# Few eigenvalues are large: that is why gradient descent is slow, and natural gradients are not.

figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
for name in ("full", "block_diagonal", "kfac", "diagonal"):
    values = matrices[name].eigenvalues().sort(descending=True).values
    axes.semilogy(values.clamp(min=1e-9), "--" if name == "kfac" else "-", label=name)
axes.set(xlabel="eigenvalue, from the largest", ylabel="size")
axes.legend()
plt.show()

"""
How sure the network is
=======================

The Fisher matrix at the trained weights is the precision of a Gaussian around them, from which
error bars follow without training again: the linearised Laplace approximation.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import natgrad

torch.set_num_threads(1)
torch.manual_seed(0)

# %%
# Noisy data with a gap in the middle.

noise = 0.15
x = torch.cat([-3 + 2.2 * torch.rand(80, 1), 0.8 + 2.2 * torch.rand(80, 1)])
y = torch.sin(2 * x) + noise * torch.randn_like(x)
model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
optimizer = natgrad.ExactNGD(
    model, "gaussian", damping=1e-3, step_rule=natgrad.StepRule(length="quadratic_model")
)
for _ in range(150):
    optimizer.zero_grad()
    loss = 0.5 * (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
print(f"root of the mean squared error {(2 * loss.item()) ** 0.5:.3f}, noise {noise}")

# %%
# The strength of the prior is chosen by the evidence of the training data alone. ``kfac`` keeps
# less of the matrix than ``full``, so its error bars differ where layers would have to agree.

grid = torch.linspace(-4, 4, 200)[:, None]
loader = DataLoader(TensorDataset(x, y), batch_size=80)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
for one, structure in zip(axes, ("full", "kfac"), strict=True):
    likelihood = natgrad.likelihoods.Gaussian(variance=noise**2)
    posterior = natgrad.Laplace(model.eval(), loader, likelihood, structure)
    posterior.optimize_prior_precision()
    mean, covariance = posterior.functional_variance(grid)
    mean = mean.detach()[:, 0]
    deviation = (covariance.detach()[:, 0, 0] + noise**2).sqrt()
    for width in (1, 2):
        low, high = mean - width * deviation, mean + width * deviation
        one.fill_between(grid[:, 0], low, high, color="C0", alpha=0.2, linewidth=0)
    one.plot(grid, mean, color="C0")
    one.plot(x, y, ".", color="black", markersize=3)
    one.set(title=structure, xlabel="x", ylim=(-3, 3))
axes[0].set_ylabel("y, with one and two standard deviations")
plt.show()

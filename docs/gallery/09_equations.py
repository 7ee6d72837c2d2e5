"""
A physics-informed network
==========================

The Burgers equation with viscosity 0.05: a wave steepens to a front. ``ResidualNGD`` takes exact
natural gradient steps on the residuals of the equation, in float64, and needs no setting.
"""

import time

import matplotlib.pyplot as plt
import torch
from torch import nn

import natgrad
from natgrad.residuals import Residual, TaylorNetwork

torch.set_num_threads(1)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %%
# The problem, :math:`u_t + u u_x = \nu u_{xx}` with :math:`u(x, 0) = -\sin \pi x` and zero at the
# sides, as functions of a network and one point (x, t).

viscosity = 0.05


def burgers(u, x):
    return u.first[1] + u.value * u.first[0] - viscosity * u.second[0]


def known(u, x, y):
    return u.value - y


inside = torch.rand(800, 2) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])
x_start = torch.linspace(-1, 1, 80)
start = torch.stack([x_start, torch.zeros(80)], 1)
sides = torch.stack([torch.tensor([-1.0, 1.0]).repeat(40), torch.linspace(0, 1, 80)], 1)
residuals = {
    "equation": Residual(burgers, inside),
    "start": Residual(known, start, -torch.sin(torch.pi * x_start)[:, None], weight=10.0),
    "sides": Residual(known, sides, torch.zeros(80, 1), weight=10.0),
}

# %%
# ``TaylorNetwork`` sends the value and the derivatives that the residuals ask for through the
# network together.

network = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))
optimizer = natgrad.ResidualNGD(TaylorNetwork(network, second=[(0, 0)]), residuals)
losses, began = [], time.process_time()
while time.process_time() - began < 15.0:
    losses.append(float(optimizer.step()))
print(f"{len(losses)} steps, loss {losses[-1]:.1e}")

# %%
# The exact solution by the transform of Cole and Hopf, a quotient of integrals.

nodes, weights = torch.linspace(-8, 8, 2001), 16 / 2000


def exact(x, t):
    y = x[:, None] - nodes * (4 * viscosity * t) ** 0.5
    kernel = torch.exp(-(nodes**2) - torch.cos(torch.pi * y) / (2 * torch.pi * viscosity))
    return -(torch.sin(torch.pi * y) * kernel).sum(1) / kernel.sum(1)


x = torch.linspace(-1, 1, 201)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.semilogy(losses)
left.set(xlabel="step", ylabel="loss")
worst = 0.0
for t, color in ((0.1, "C0"), (0.4, "C1"), (1.0, "C2")):
    with torch.no_grad():
        found = network(torch.stack([x, torch.full_like(x, t)], 1))[:, 0]
    truth = exact(x, t)
    worst = max(worst, float((found - truth).abs().max()))
    right.plot(x, found, color=color, label=f"t = {t}")
    right.plot(x[::8], truth[::8], "o", color=color, markersize=3)
right.set(xlabel="x", ylabel="u")
right.legend(title="network; exact as dots", fontsize="small")
plt.show()
print(f"largest error {worst:.1e}")
torch.set_default_dtype(torch.float32)

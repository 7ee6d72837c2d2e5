"""
Choosing a method
=================

All optimizers take the same arguments and differ in what they keep of the Fisher matrix. Here
eight of them train one small convolutional network with their defaults; on your own model and
data ``natgrad compare`` does it from the command line.
"""

import time

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


def fit(make_optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    optimizer = make_optimizer(model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=72)
    losses, seconds = [], [0.0]
    for _ in range(6):
        for x, y in DataLoader(train, batch_size=100, shuffle=True):
            start = time.process_time()
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            seconds.append(seconds[-1] + time.process_time() - start)
    return losses, seconds[:-1]


fit(natgrad.KFAC)  # What is imported at first use is not to count.
names = ("KFAC", "EKFAC", "TKFAC", "TEKFAC", "KPSVD", "TwoLevelKFAC", "SINGD")
runs = {name: fit(lambda model, name=name: getattr(natgrad, name)(model)) for name in names}
runs["AdamW, lr = 0.01"] = fit(lambda model: torch.optim.AdamW(model.parameters(), lr=0.01))

# %%
# Against steps the methods of the family are close to one another; against time, the cheaper
# ones win on a network of this size, whose AdamW step takes a third of theirs. Each choice is
# discussed in :doc:`/choosing`.

figure, (by_step, by_second) = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
for name, (losses, seconds) in runs.items():
    smooth = torch.tensor(losses).unfold(0, 5, 1).mean(1)
    style = {"color": "black", "linestyle": "--"} if name.startswith("AdamW") else {}
    by_step.semilogy(range(4, len(losses)), smooth, label=name, **style)
    by_second.semilogy(seconds[4:], smooth, **style)
by_step.set(xlabel="step", ylabel="training loss, mean of five steps")
by_second.set(xlabel="processor seconds")
by_step.legend(fontsize="small")
plt.show()

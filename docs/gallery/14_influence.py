"""
Which training data made this prediction
========================================

Influence functions find wrong labels: a sample whose label is wrong works against all others.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import natgrad
from natgrad.experiments.data import load_dataset

torch.set_num_threads(1)
torch.manual_seed(0)
digits = load_dataset("digits")
x, y = digits.train_inputs.flatten(1), digits.train_labels.clone()

# %%
# Sixty of 1,200 labels are replaced by others.

wrong = torch.randperm(len(y))[:60]
y[wrong] = (y[wrong] + torch.randint(1, 10, (60,))) % 10
loader = DataLoader(TensorDataset(x, y), batch_size=200)

model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
optimizer = natgrad.KFAC(model, weight_decay=1e-2)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 90)
for _ in range(15):
    for inputs, labels in DataLoader(TensorDataset(x, y), batch_size=200, shuffle=True):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        schedule.step()

# %%
# Scores of every training sample for every test sample. Above zero, the training sample helps.
# Those that harm most are wrong ones nearly without exception; a few wrong ones do no harm,
# which is no question that the training loss would ask.

test = (digits.test_inputs.flatten(1), digits.test_labels)
scores = natgrad.tools.influence(model.eval(), loader, test)
harm = -scores.sum(0)  # What it does to the test set as a whole.

order = harm.argsort(descending=True)
is_wrong = torch.zeros(len(y), dtype=torch.bool)
is_wrong[wrong] = True
with torch.no_grad():
    losses = functional.cross_entropy(model(x), y, reduction="none")
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
axes.plot(is_wrong[order].cumsum(0), label="by influence")
axes.plot(is_wrong[losses.argsort(descending=True)].cumsum(0), label="by training loss")
axes.plot([0, len(y)], [0, 60], "--", color="grey", label="at random")
axes.set(xlabel="labels checked", ylabel="wrong ones found", xlim=(0, 300))
axes.legend()
plt.show()

# %%
# The eight most harmful samples, with the labels that they have in the training data:

figure, axes = plt.subplots(1, 8, figsize=(9, 1.6), layout="constrained")
for one, index in zip(axes, order[:8], strict=True):
    one.imshow(digits.train_inputs[index, 0], cmap="gray_r")
    one.set(xticks=[], yticks=[])
    one.set_title(f"{int(y[index])}", color="C3" if is_wrong[index] else "black")
plt.show()

"""
Your own loop
=============

Schedules, accumulation, clipping, weight decay, averaged weights and checkpoints work as with any
optimizer of torch.
"""

import io

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import natgrad
from natgrad.experiments.data import load_dataset

torch.set_num_threads(1)
digits = load_dataset("digits")
train = TensorDataset(digits.train_inputs.flatten(1), digits.train_labels)


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.LayerNorm(96), nn.Linear(96, 10))


# %%
# ``lr`` is a factor on the measured length of a step, so any schedule of torch can multiply it:
# here a warm-up and half a cosine. Groups of parameters have options of their own, such as no
# decay for what a norm layer learns.

model = make_model()
optimizer = natgrad.KFAC(
    model,
    nn.CrossEntropyLoss(label_smoothing=0.05),
    weight_decay=1e-3,
    params=[{"modules": [model[2]], "weight_decay": 0.0}],
)
steps = 96
schedule = torch.optim.lr_scheduler.SequentialLR(
    optimizer,
    [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=5),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - 5),
    ],
    milestones=[5],
)

# %%
# Two backward passes make one step: curvature adds up over them as gradients do.

losses, rates = [], []
loader = DataLoader(train, batch_size=50, shuffle=True)
for _ in range(8):
    for number, (x, y) in enumerate(loader, 1):
        loss = functional.cross_entropy(model(x), y, label_smoothing=0.05)
        (loss / 2).backward()
        if number % 2 == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            rates.append(optimizer.param_groups[0]["lr"])

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
left.semilogy(losses)
left.set(xlabel="step", ylabel="training loss, smoothed labels")
right.plot(rates)
right.set(xlabel="step", ylabel="lr")
plt.show()

# %%
# A checkpoint holds curvature, momentum and what is known of the lengths of steps. What goes on
# from it takes the same steps to the last bit.

file = io.BytesIO()
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
file.seek(0)
saved = torch.load(file, weights_only=True)

again = make_model()
optimizer_again = natgrad.KFAC(
    again,
    nn.CrossEntropyLoss(label_smoothing=0.05),
    weight_decay=1e-3,
    params=[{"modules": [again[2]], "weight_decay": 0.0}],
)
again.load_state_dict(saved["model"])
optimizer_again.load_state_dict(saved["optimizer"])

x, y = train[:100]
for one, its_optimizer in ((model, optimizer), (again, optimizer_again)):
    its_optimizer.zero_grad()
    functional.cross_entropy(one(x), y, label_smoothing=0.05).backward()
    its_optimizer.step()
pairs = zip(model.parameters(), again.parameters(), strict=True)
print("the same to the last bit:", all(torch.equal(p, q) for p, q in pairs))

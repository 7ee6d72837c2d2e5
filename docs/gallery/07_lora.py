"""
LoRA
====

Adapters of low rank (``peft``) are linear layers like others. The frozen weights below them cost
nothing: they have no rows and no factors.
"""

import matplotlib.pyplot as plt
import peft
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import natgrad
from natgrad.experiments.data import load_dataset

torch.set_num_threads(1)
digits = load_dataset("digits")

# %%
# A network is trained on the digits, the usual way up.


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10)
    )


def fit(model, x, optimizer, epochs):
    losses = []
    for _ in range(epochs):
        for inputs, y in DataLoader(TensorDataset(x, digits.train_labels), 100, shuffle=True):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(inputs), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


base = make_model()
fit(base, digits.train_inputs.flatten(1), natgrad.KFAC(base), epochs=5)

# %%
# Now they come upside down and mirrored, and adapters of rank 4 are to make up for it.

turned = {
    part: getattr(digits, part).flip(-1, -2).flatten(1) for part in ("train_inputs", "test_inputs")
}


def adapt(make_optimizer):
    model = make_model()
    model.load_state_dict(base.state_dict())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "2", "4"]))
    optimizer = make_optimizer(adapted)
    losses = fit(adapted, turned["train_inputs"], optimizer, epochs=8)
    with torch.no_grad():
        wrong = adapted(turned["test_inputs"]).argmax(1) != digits.test_labels
    return losses, 100 * wrong.float().mean().item(), optimizer


runs = {
    "KFAC": adapt(natgrad.KFAC),
    "AdamW, lr = 0.01": adapt(lambda model: torch.optim.AdamW(model.parameters(), lr=0.01)),
}
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
for name, (losses, error, _) in runs.items():
    axes.semilogy(losses, label=f"{name}: test error {error:.1f} %")
axes.set(xlabel="step", ylabel="training loss on turned digits")
axes.legend()
plt.show()

# %%
# Only adapters are preconditioned; each has two small factors.

print(runs["KFAC"][2].summary())

"""
Several processes
=================

Under ``DistributedDataParallel`` natgrad finds the other processes by itself: statistics are
summed over them, and factorisations are shared. N processes take the steps that one would take
with all their data.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

# %%
# A training script as ``torchrun`` starts it.

script = """
import json, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
import natgrad
from natgrad.experiments.data import load_dataset

torch.set_num_threads(1)
torch.manual_seed(0)
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
digits = load_dataset("digits")
model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)).double()
model = nn.parallel.DistributedDataParallel(model)
optimizer = natgrad.KFAC(model)
losses = []
for epoch in range(4):
    for batch in torch.randperm(1200, generator=torch.Generator().manual_seed(epoch)).split(100):
        own = batch.chunk(world)[rank]
        optimizer.zero_grad()
        x, y = digits.train_inputs[own].flatten(1).double(), digits.train_labels[own]
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        loss = loss.detach() / world
        dist.all_reduce(loss)
        losses.append(loss.item())
if rank == 0:
    json.dump(losses, open(sys.argv[1], "w"))
dist.destroy_process_group()
"""


def torchrun(processes):
    with tempfile.TemporaryDirectory() as folder:
        program, found = Path(folder) / "train.py", Path(folder) / "losses.json"
        program.write_text(script)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes), str(program), str(found)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads(found.read_text())


one, two = torchrun(1), torchrun(2)

# %%
# Two processes with half a batch each, and one with all of it:

figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
axes.semilogy(one, linewidth=4, alpha=0.4, label="one process")
axes.semilogy(two, color="black", linewidth=1, label="two processes")
axes.set(xlabel="step", ylabel="training loss")
axes.legend()
plt.show()
print("largest relative difference:", max(abs(a - b) / a for a, b in zip(one, two, strict=True)))

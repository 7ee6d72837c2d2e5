"""
Hugging Face Trainer
====================

A small GPT-2 learns a text byte by byte under ``transformers.Trainer``, with the schedule that
the Trainer makes. A model that computes its own loss needs nothing but ``natgrad.KFAC(model)``.
"""

import tempfile

import matplotlib.pyplot as plt
import torch
import transformers

import natgrad

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

# %%
# The text is what natgrad says of itself: the docstrings of its optimizers.

text = "\n".join(getattr(natgrad, name).__doc__ for name in natgrad.__all__ if name.endswith("FAC"))
codes = torch.tensor(list(text.encode()))
data = [{"input_ids": one, "labels": one} for one in codes.unfold(0, 32, 8)]
print(f"{len(codes):,} bytes, {len(data):,} windows")

# %%
# Everything else is the Trainer's own: it steps the schedule, which multiplies ``lr``.


class Losses(transformers.TrainerCallback):
    """Keep what the Trainer logs."""

    def __init__(self):
        self.losses = []

    def on_log(self, arguments, state, control, logs=None, **_):
        if "loss" in logs:
            self.losses.append((state.global_step, float(logs["loss"])))


def fit(make_optimizer, steps=150):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=256, n_positions=32, n_embd=48, n_layer=2, n_head=4)
    )
    optimizer, kept = make_optimizer(model), Losses()
    arguments = transformers.TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=16,
        logging_steps=10,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 10, steps)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, optimizers=(optimizer, schedule), callbacks=[kept]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return kept.losses


runs = {
    "KFAC": fit(natgrad.KFAC),
    "AdamW, lr = 0.003": fit(lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3)),
}

figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
for name, losses in runs.items():
    axes.plot(*zip(*losses, strict=True), marker=".", label=name)
axes.set(xlabel="step", ylabel="training loss, mean of ten steps")
axes.legend()
plt.show()

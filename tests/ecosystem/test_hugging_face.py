"""Transformers, Trainer and Accelerate: losses inside the model, shifts, masks, tied weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import natgrad
from tests import dense
from tests.ecosystem.loops import OPTIMIZERS, ROWS, assert_curvature_everywhere
from tests.methods import make_optimizer
from tests.state import flat


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    """Where these tests run, and not by every process: loading takes a second."""
    global transformers
    transformers = pytest.importorskip("transformers")


IGNORED = -100


def tokens(*shape: int, seed: int = 0, low: int = 1, vocabulary: int = 13) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, vocabulary, shape, generator=generator)


def gpt2(
    samples: int = 4, dropout: float = 0.0, tied: bool = True
) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.GPT2Config(
        tie_word_embeddings=tied,
        vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    ids = tokens(samples, 6)
    labels = ids.clone()
    labels[0, 3:] = labels[1, :2] = labels[-1, -1] = IGNORED
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids, "labels": labels}


def bert(
    samples: int = 4, dropout: float = 0.0, tied: bool = True
) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.BertConfig(
        tie_word_embeddings=tied,
        vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=8, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, attn_implementation="eager",
    )  # fmt: skip
    ids = tokens(samples, 6)
    labels = torch.where(tokens(samples, 6, seed=1) < 6, ids, IGNORED)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return transformers.BertForMaskedLM(config), batch


def vit(
    samples: int = 4, dropout: float = 0.0, tied: bool = True
) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        image_size=8, patch_size=4, num_channels=1, num_labels=3, hidden_dropout_prob=dropout,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(samples, 1, 8, 8, generator=generator)
    labels = tokens(samples, low=0, vocabulary=3)
    return transformers.ViTForImageClassification(config), {
        "pixel_values": pixels,
        "labels": labels,
    }


def t5(
    samples: int = 4, dropout: float = 0.0, tied: bool = True
) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.T5Config(
        tie_word_embeddings=tied,
        vocab_size=13, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2,
        relative_attention_num_buckets=4, relative_attention_max_distance=8,
        decoder_start_token_id=0, pad_token_id=0, dropout_rate=dropout,
    )  # fmt: skip
    labels = tokens(samples, 4, seed=1)
    labels[0, 2:] = labels[-1, -1] = IGNORED
    return transformers.T5ForConditionalGeneration(config), {
        "input_ids": tokens(samples, 6),
        "labels": labels,
    }


def llama(
    samples: int = 4, dropout: float = 0.0, tied: bool = True
) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8,
        attention_dropout=dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids = tokens(samples, 6)
    labels = ids.clone()
    labels[0, 3:] = labels[1, :2] = IGNORED
    return transformers.LlamaForCausalLM(config), {"input_ids": ids, "labels": labels}


MODELS: dict[str, Callable[..., tuple[nn.Module, dict[str, Tensor]]]] = {
    "gpt2": gpt2, "bert": bert, "vit": vit, "t5": t5, "llama": llama,
}  # fmt: skip


def build(name: str, samples: int = 4, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model in float64 and training mode."""
    torch.manual_seed(0)
    model, batch = MODELS[name](samples, **options)
    if not options.get("tied", True) and hasattr(model, "lm_head"):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():  # Far from the start, where biases are 0 and weights tiny.
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model = model.double().train()
    pixels = {k: v.double() for k, v in batch.items() if v.is_floating_point()}
    return model, batch | pixels


def loss_on_logits(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Write out the loss that the model computes by itself, in float32."""
    if name in ("gpt2", "llama"):
        logits = logits.float()
    if name in ("gpt2", "llama"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def targets(name: str, labels: Tensor) -> Tensor:
    """Return the label of every logit; the last one of a language model has none."""
    if name not in ("gpt2", "llama"):
        return labels
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)


@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize("name", list(MODELS))
def test_rows_are_those_of_autograd(name, samples):
    """Tied weights, shared position tables and relative biases included."""
    model, batch = build(name, samples)
    with natgrad.Capture(model) as capture:
        assert not capture.uncovered
        out = model(**batch).logits
        vectors = torch.randn(2, *out.shape, generator=torch.Generator().manual_seed(4)).double()
        found = capture.pull_back(out, vectors).to_dense()
    leaves = [p for p in model.parameters() if p.requires_grad]
    expected = []
    for sample in range(samples):
        for vector in vectors:
            z = model(**batch).logits[sample]
            gradients = torch.autograd.grad(
                (z * vector[sample]).sum(), leaves, allow_unused=True, materialize_grads=True
            )
            expected.append(torch.cat([g.flatten() for g in gradients]))
    dense.assert_same(found, torch.stack(expected), 1e-9)


@pytest.mark.parametrize("name", list(MODELS))
def test_the_loss_inside_the_model_is_the_loss_on_logits(name):
    """Shifted and ignored tokens leave curvature as they leave the loss."""
    model, batch = build(name)
    steps = []
    for inside in (True, False):
        twin = copy.deepcopy(model)
        optimizer = make_optimizer(
            natgrad.KFAC, twin, lr=0.1, fisher="exact", kl_clip=None, factors=1, inverses=1
        )
        for _ in range(2):
            optimizer.zero_grad()
            if inside:
                loss = twin(**batch).loss
            else:
                inputs = {k: v for k, v in batch.items() if k != "labels"}
                if name == "t5":
                    inputs["decoder_input_ids"] = twin._shift_right(batch["labels"])
                loss = loss_on_logits(name, twin(**inputs).logits, batch["labels"])
            loss.backward()
            optimizer.step()
        assert_curvature_everywhere(optimizer)
        steps.append(flat(twin) - flat(model))
    dense.assert_same(steps[0], steps[1], 1e-8)
    assert steps[0].norm() > 1e-3


@pytest.mark.parametrize("name", list(MODELS))
def test_natural_gradient_is_that_of_the_dense_fisher_matrix(name):
    """The step of ExactNGD against (F + λI)⁻¹g with F over the tokens that count."""
    model, batch = build(name, 2)
    before = flat(model)
    optimizer = natgrad.ExactNGD(model, lr=1.0, damping=0.1, kl_clip=None)
    y = targets(name, batch["labels"]).flatten()
    twin = copy.deepcopy(model)
    leaves = [p for p in twin.parameters() if p.requires_grad]
    out = twin(**batch)
    logits = out.logits.flatten(0, -2)
    rows = []
    for event in (y != IGNORED).nonzero().flatten().tolist():
        p = logits[event].detach().softmax(0)
        root = torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())
        for column in root.T:
            gradients = torch.autograd.grad(
                logits[event] @ column, leaves, retain_graph=True, allow_unused=True,
                materialize_grads=True,
            )  # fmt: skip
            rows.append(torch.cat([g.flatten() for g in gradients]))
    jacobian = torch.stack(rows)
    f = jacobian.T @ jacobian / (y != IGNORED).sum()
    gradients = torch.autograd.grad(out.loss, leaves, allow_unused=True, materialize_grads=True)
    gradient = torch.cat([g.flatten() for g in gradients])
    expected = torch.linalg.solve(f + 0.1 * torch.eye(len(f), dtype=f.dtype), gradient)
    model(**batch).loss.backward()
    optimizer.step()
    dense.assert_same(before - flat(model), expected, 1e-7)


def columns(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return a data set of single samples."""
    return [{k: v[i] for k, v in batch.items()} for i in range(len(batch["labels"]))]


def trainer_for(
    model: nn.Module, optimizer: Any, data: Any, folder: Any, scheduler: Any = None, **options: Any
) -> Any:
    options = {
        "per_device_train_batch_size": len(data), "max_steps": 4, "save_strategy": "no",
        "max_grad_norm": 0.0,
    } | options  # fmt: skip
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True,
        logging_strategy="no", **options,
    )  # fmt: skip
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=data, optimizers=(optimizer, scheduler)
    )


@pytest.mark.parametrize(
    ("name", "accumulate"), [*((name, 1) for name in MODELS), ("bert", 2), ("vit", 2)]
)
def test_trainer_is_the_plain_loop(name, accumulate, tmp_path):
    """With ignored tokens, too: as many in every micro-batch, so that its loss is the same.

    One Kronecker product for both uses of a tied weight depends on how batches are cut, so no
    weights are tied where gradients accumulate.
    """
    model, batch = build(name, tied=accumulate == 1)
    if name != "vit":
        batch["labels"] = torch.where(batch["labels"] == IGNORED, 1, batch["labels"])
        batch["labels"][:, [0, 2]] = IGNORED
    wrapped, plain = model, copy.deepcopy(model)
    start = flat(model)
    options = {"fisher": "exact", "factors": 2, "inverses": 2}
    options["rows_per_unit"] = None  # Positions drawn for half a batch are others.
    inner = make_optimizer(natgrad.KFAC, wrapped, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 2, gamma=0.5)
    trainer_for(
        wrapped, inner, columns(batch), tmp_path, scheduler, gradient_accumulation_steps=accumulate,
        per_device_train_batch_size=4 // accumulate,
    ).train()  # fmt: skip
    optimizer = make_optimizer(natgrad.KFAC, plain, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        plain(**batch).loss.backward()
        optimizer.step()
        scheduler.step()
    assert inner.preconditioner.observer.steps == 4
    # An output bias that is not tied to that of the decoder is not used at all.
    untied = name == "bert" and accumulate > 1
    assert_curvature_everywhere(inner, ("cls.predictions",) if untied else ())
    # T5 takes its softmax in float32, whose rounding depends on the order of samples.
    tolerance = 1e-2 if name == "t5" else 1e-6
    dense.assert_same(flat(wrapped) - start, flat(plain) - start, tolerance)


@pytest.mark.parametrize(
    ("name", "structure"),
    [(name, "kfac") for name in MODELS]
    + [("gpt2", "padam"), ("llama", "diagonal"), ("vit", "exact"), ("vit", "thermodynamic")],
)
def test_trainer_trains_with_defaults(name, structure, tmp_path):
    torch.manual_seed(0)
    model, batch = MODELS[name](16, dropout=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if structure == "padam":
            optimizer = natgrad.Padam(model.parameters(), lr=0.1)
        else:
            rate = 1.0 if structure == "thermodynamic" else 0.3 if structure in ROWS else 0.05
            optimizer = make_optimizer(OPTIMIZERS[structure], model, lr=rate)
    reported = " ".join(str(w.message) for w in caught)
    # Image embeddings drop out what they own themselves.
    watched = getattr(optimizer, "preconditioner", None)
    uncovered = () if watched is None else watched.capture.uncovered
    assert all(n in reported for n in uncovered) and (not uncovered or name == "vit")
    first = float(model.eval()(**batch).loss.detach())
    model.train()
    trainer_for(
        model, optimizer, columns(batch), tmp_path, max_grad_norm=1.0,
        max_steps={"padam": 30}.get(structure, 8 if structure in ROWS else 15),
    ).train()  # fmt: skip
    assert float(model.eval()(**batch).loss.detach()) < 0.93 * first
    assert_curvature_everywhere(optimizer)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method", ["kfac", "improved", "thermodynamic"])
def test_trainer_resumes_from_its_checkpoint(method, tmp_path):
    options = {
        "kfac": {"factors": 2, "inverses": 3},
        "thermodynamic": {"time": 6.0},
    }.get(method, {})

    def run(folder: Any, steps: int, resume: Any = None) -> Tensor:
        model, batch = build("gpt2", 8, dropout=0.1)
        optimizer = make_optimizer(OPTIMIZERS[method], model, lr=0.05, **options)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        trainer = trainer_for(
            model, optimizer, columns(batch), folder, scheduler, max_steps=steps,
            per_device_train_batch_size=2, save_strategy="steps", save_steps=5, seed=1,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return flat(trainer.model)

    whole = run(tmp_path / "whole", 8)
    resumed = run(tmp_path / "parted", 8, str(tmp_path / "whole" / "checkpoint-5"))
    assert torch.equal(whole, resumed)


def test_all_tokens_ignored():
    """The loss is 0/0 and its gradient zero: nothing moves, and later steps are as ever."""
    model, batch = build("gpt2")
    optimizer = natgrad.KFAC(model, lr=0.1)
    before = flat(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**(batch | {"labels": torch.full_like(batch["labels"], IGNORED)})).loss.backward()
        optimizer.step()
    assert torch.equal(before, flat(model))
    optimizer.zero_grad()
    model(**batch).loss.backward()
    optimizer.step()
    assert not torch.equal(before, flat(model)) and flat(model).isfinite().all()

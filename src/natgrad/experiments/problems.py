"""What the methods of a comparison are given: a network, batches of data, and an objective."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from natgrad.capture.evaluation import call_model
from natgrad.capture.model_output import require_output
from natgrad.experiments.batches import Batches, LoaderBatches, TensorBatches
from natgrad.experiments.config import CompareConfig
from natgrad.experiments.data import DATASETS, Dataset, load_dataset
from natgrad.experiments.factories import FactoryError, described, load_model
from natgrad.experiments.methods import Setting
from natgrad.experiments.models import build_model
from natgrad.experiments.objectives import OBJECTIVES, Objective, choose_objective
from natgrad.experiments.random_state import reproducible
from natgrad.likelihoods import Categorical


@dataclass(frozen=True)
class Problem:
    """What all methods share: network, data, loss, and what learning rates and options depend on.

    Every method trains a copy of the model; `data` says in JSON values what the data are.
    """

    model: nn.Module
    batches: Batches
    objective: Objective
    setting: Setting
    data: dict[str, Any]


class Problems:
    """The problem of a comparison, for every seed.

    Raises `DataError` or `FactoryError` if data or a user's model cannot be made, and
    `ObjectiveError` if they do not go together, or the loss cannot be told.
    """

    def __init__(self, config: CompareConfig) -> None:
        self.config = config
        self._device, self._dtype = config.torch_device(), config.torch_dtype()
        self._loader: LoaderBatches | None = None

    def of(self, seed: int) -> Problem:
        """Return the problem of a seed: its weights, and of built-in data its samples."""
        return self._built_in(seed) if self.config.factory is None else self._own(seed)

    def _built_in(self, seed: int) -> Problem:
        config = self.config
        assert config.model is not None and config.loss is not None
        assert config.depth is not None and config.effective_width is not None
        data, objective = self._dataset(seed), OBJECTIVES[config.loss]
        sizes: dict[str, Any] = {"width": config.effective_width, "depth": config.depth}
        model = build_model(config.model, data.input_shape, data.classes, **sizes, seed=seed)
        batches = TensorBatches(data, objective.encode, config.batch_size)
        setting = replace(
            self._setting(batches, seed),
            model=config.model,
            loss=config.loss,
            input_dim=data.train_inputs[0].numel(),
            outputs=data.classes,
            samples=batches.batch_size,
            full_batch=config.full_batch,
            **sizes,
        )
        model = model.to(self._device, self._dtype)
        return Problem(model, batches, objective, setting, _described_dataset(data))

    def _setting(self, batches: Batches, seed: int) -> Setting:
        asked = self.config.damping, self.config.fisher
        return Setting(epoch=batches.epoch, damping=asked[0], fisher=asked[1], seed=seed)

    def _own(self, seed: int) -> Problem:
        config = self.config
        assert config.factory is not None
        with reproducible(seed):
            made = load_model(config.factory)
        model = made.model.to(self._device, self._dtype)
        batches, data = self._own_batches() if config.own_data else self._built_in_batches(seed)
        try:
            trial = copy.deepcopy(model)
        except Exception as error:  # a user's model may raise anything
            raise FactoryError(
                f"The model of {config.factory} cannot be copied: {described(error)}."
            ) from error
        loss = made.criterion if config.loss is None else config.loss
        if isinstance(loss, nn.Module):
            loss = loss.to(self._device, self._dtype)
        first = next(batches.training(seed))
        with reproducible(seed):
            objective = choose_objective(trial, first, loss, config.likelihood, config.metric)
            outputs = require_output(call_model(trial, first[0]), None)
        behind = objective.likelihood
        data.setdefault("classes", None)
        if data["classes"] is None and isinstance(behind, Categorical):
            data["classes"] = behind.split_events(outputs).shape[-1]
        return Problem(model, batches, objective, self._setting(batches, seed), data)

    def _own_batches(self) -> tuple[Batches, dict[str, Any]]:
        """Return the batches of the user's loader, which is called once for all seeds."""
        config = self.config
        assert config.data is not None and config.eval_samples is not None
        if self._loader is None:
            self._loader = LoaderBatches(
                config.data, self._device, self._dtype, config.eval_samples, config.seed
            )
        return self._loader, self._loader.describe()

    def _built_in_batches(self, seed: int) -> tuple[Batches, dict[str, Any]]:
        data = self._dataset(seed)
        batches = TensorBatches(data, lambda labels, classes: labels, self.config.batch_size)
        return batches, _described_dataset(data)

    def _dataset(self, seed: int) -> Dataset:
        config = self.config
        assert config.data is not None
        train, test = config.effective_train_samples, config.test_samples
        data = load_dataset(
            config.data, config.data_dir, train_samples=train, test_samples=test, seed=seed
        )
        return data.to(self._device, self._dtype)


def _described_dataset(data: Dataset) -> dict[str, Any]:
    return {
        "name": data.name,
        "title": DATASETS[data.name].title,
        "train_samples": len(data.train_labels),
        "test_samples": len(data.test_labels),
        "input_shape": list(data.input_shape),
        "classes": data.classes,
    }

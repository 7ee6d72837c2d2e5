"""The options of `natgrad theory`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from natgrad.experiments.config import Config, ConfigError, check_choice
from natgrad.experiments.data import DATASETS
from natgrad.ntk import ACTIVATIONS

SECTIONS = ("dynamics", "width", "isotropy", "conditions", "spectrum")
"""The sections of the report, in order."""

#: Training samples where none are asked for: the digits' 64 pixels tell 40 samples apart.
DEFAULT_SAMPLES = {"digits": 40}
OTHER_SAMPLES = 100


@dataclass(frozen=True)
class TheoryConfig(Config):
    """Options of one run: those of ``natgrad theory``, whose help explains them.

    Raises:
        ConfigError: If an option has no meaning.
    """

    sections: tuple[str, ...] = SECTIONS
    data: str = "digits"
    data_dir: Path | None = None
    classes: tuple[int, ...] = (0, 1)
    train_samples: int | None = None
    test_samples: int = 100
    width: int = 1024
    depth: int = 3
    activation: str = "relu"
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_choice("data set", self.data, DATASETS)
        check_choice("activation", self.activation, ACTIVATIONS)
        for section in self.sections:
            check_choice("section", section, SECTIONS)
        if not self.sections or len(set(self.sections)) < len(self.sections):
            raise ConfigError("Name at least one section, each only once.")
        known = DATASETS[self.data].classes
        if len(set(self.classes)) < max(2, len(self.classes)):
            raise ConfigError("Name at least two classes, each only once.")
        if not all(0 <= label < known for label in self.classes):
            raise ConfigError(
                f"The classes of {DATASETS[self.data].title} are 0 to {known - 1}, not "
                f"{', '.join(map(str, self.classes))}."
            )
        for name in ("train_samples", "test_samples", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"The {name.replace('_', ' ')} must be at least 1, not {value}.")
        if self.train_samples is not None and self.train_samples < len(self.classes):
            raise ConfigError("There must be at least one training sample per class.")
        if self.depth < 2:
            raise ConfigError(f"The depth must be at least 2 weight layers, not {self.depth}.")
        self.torch_device()

    @property
    def samples(self) -> int:
        """N."""
        if self.train_samples is not None:
            return self.train_samples
        return DEFAULT_SAMPLES.get(self.data, OTHER_SAMPLES)

    @property
    def outputs(self) -> int:
        """C: one for two classes."""
        return 1 if len(self.classes) == 2 else len(self.classes)

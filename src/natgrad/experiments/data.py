"""Real image data sets, read from their original files, cut to size and normalised.

`load_dataset` is the one entry: it finds the files, checks them, draws a class-balanced subset with
a seed, and normalises the inputs so that every image has ‖x‖² = d. With that scale the
pre-activations of a network in NTK parameterisation have variance σ_w² in every layer, which is
what the theory of the learning rates assumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from natgrad.experiments.formats import (
    Arrays,
    DataError,
    read_cifar_binary,
    read_cifar_pickle,
    read_idx,
    read_members,
    read_npz,
)


@dataclass(frozen=True)
class Dataset:
    """A classification data set in memory; its name is a key of `DATASETS`.

    Inputs are (N, channels, height, width) float32, normalised with the statistics of the training
    inputs; labels (N,) int64, from 0 to `classes` − 1.
    """

    name: str
    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    classes: int

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.train_inputs.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str, dtype: torch.dtype | None = torch.float32) -> Dataset:
        """Return the data set on another device, the inputs in another floating-point type."""
        tensors: dict[str, Any] = {n: v for n, v in vars(self).items() if isinstance(v, Tensor)}
        kinds = {n: dtype if v.is_floating_point() else None for n, v in tensors.items()}
        return replace(self, **{n: v.to(device, kinds[n]) for n, v in tensors.items()})


@dataclass(frozen=True)
class DatasetKind:
    """What is known of a data set before its files are opened.

    Images are (height, width, channels); `folders` are sub-folders of the data folder to look in,
    too. `batches` are the files of a CIFAR set, those to train on and the test batch; of the binary
    version names end in ``.bin`` and `label_bytes` precede each image.
    """

    title: str
    image_shape: tuple[int, int, int]
    classes: int
    folders: tuple[str, ...] = ()
    batches: tuple[str, ...] = ()
    label_bytes: int = 0

    @property
    def archives(self) -> tuple[str, str]:
        """Names of the original archives of a CIFAR set."""
        name = self.title.lower()
        return f"{name}-python.tar.gz", f"{name}-binary.tar.gz"


_GREY, _COLOUR = (28, 28, 1), (32, 32, 3)
_CIFAR_10 = *(f"data_batch_{i}" for i in range(1, 6)), "test_batch"
_FOLDERS_10 = "cifar10", "cifar-10-batches-py", "cifar-10-batches-bin"
_FOLDERS_100 = "cifar100", "cifar-100-python", "cifar-100-binary"

DATASETS: dict[str, DatasetKind] = {
    "digits": DatasetKind("scikit-learn digits", (8, 8, 1), 10),
    "mnist": DatasetKind("MNIST", _GREY, 10, ("mnist", "MNIST")),
    "fashion_mnist": DatasetKind("Fashion-MNIST", _GREY, 10, ("fashion_mnist", "FashionMNIST")),
    "cifar10": DatasetKind("CIFAR-10", _COLOUR, 10, _FOLDERS_10, _CIFAR_10, 1),
    "cifar100": DatasetKind("CIFAR-100", _COLOUR, 100, _FOLDERS_100, ("train", "test"), 2),
}
"""The data sets that `load_dataset` knows, by name."""

FILE_DATASETS = tuple(name for name in DATASETS if name != "digits")
"""Those of them that are read from files."""

_DIGITS_TEST_SAMPLES = 597
_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def load_dataset(
    name: str,
    data_dir: Path | str | None = None,
    *,
    train_samples: int | None = None,
    test_samples: int | None = None,
    classes: Sequence[int] | None = None,
    seed: int = 0,
) -> Dataset:
    """Load a data set, draw a class-balanced part of it, and normalise the inputs.

    Args:
        name: A key of `DATASETS`. "digits" is embedded in scikit-learn; the others are read from
            files.
        data_dir: The folder with the files, or one with a sub-folder `raw` or named after the data
            set; for the CIFAR sets also an original archive. In this order of preference:
            ``train.npz`` and ``test.npz`` with arrays `images` and `labels`; the original IDX
            files, gzipped or not; the original CIFAR files of the python or binary version, inside
            their archive or unpacked. Not used for "digits".
        train_samples: How many training samples to keep; all by default.
        test_samples: How many test samples to keep; all by default.
        classes: Labels to keep, renumbered in this order; all by default.
        seed: Seed of the subset, and of the split of "digits" into 1200 training and 597 test
            samples.

    Returns:
        The data set, inputs normalised by `normalise`.

    Raises:
        DataError: If the name is unknown, or files are missing, truncated, inconsistent or not
            finite, or hold fewer samples than asked for.
    """
    if name not in DATASETS:
        raise DataError(f"Unknown data set {name!r}: choose one of {', '.join(DATASETS)}.")
    rng = np.random.default_rng(seed)
    train, test = _digits(rng) if name == "digits" else _read_files(name, data_dir)
    kind = DATASETS[name]
    train = _keep_classes(_checked(train, kind, "training"), classes)
    test = _keep_classes(_checked(test, kind, "test"), classes)
    train = _subset(train, train_samples, rng, "training")
    test = _subset(test, test_samples, rng, "test")
    inputs = normalise(_to_tensor(train[0]), _to_tensor(test[0]))
    labels = torch.from_numpy(train[1]), torch.from_numpy(test[1])
    count = kind.classes if classes is None else len(classes)
    return Dataset(name, inputs[0], labels[0], inputs[1], labels[1], count)


def normalise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Standardise each channel with the training set's statistics, then scale images to ‖x‖² = d.

    Both are (N, channels, height, width), d = channels·height·width. An image that is constant
    after standardisation at the channels' means stays zero.
    """
    mean = train.mean((0, 2, 3), keepdim=True)
    std = train.std((0, 2, 3), keepdim=True, correction=0).clamp_min(1e-12)

    def scale(inputs: Tensor) -> Tensor:
        standard = (inputs - mean) / std
        rms = standard.square().mean((1, 2, 3), keepdim=True).sqrt()
        return standard / torch.where(rms > 0, rms, 1.0)

    return scale(train), scale(test)


def balanced_subset(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw indices, in random order, so that every class is present as equally as possible.

    The numbers per class differ by at most one unless a class has too few samples.
    """
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    chosen = order[np.argsort(rank[order], kind="stable")][:count]
    return rng.permutation(chosen)


def _digits(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = bunch.images / 16.0, bunch.target.astype(np.int64)
    test = balanced_subset(labels, _DIGITS_TEST_SAMPLES, rng)
    train = np.setdiff1d(np.arange(len(labels)), test)
    return (images[train], labels[train]), (images[test], labels[test])


def _read_files(name: str, data_dir: Path | str | None) -> tuple[Arrays, Arrays]:
    kind = DATASETS[name]
    if data_dir is None:
        raise DataError(
            f"{kind.title} is read from files: give --data-dir, the folder that holds them."
        )
    base = Path(data_dir).expanduser()
    if not base.exists():
        raise DataError(f"The data folder {base} does not exist.")
    if base.is_file():
        if not kind.batches:
            raise DataError(
                f"{base} is a file: --data-dir must name the folder with the files of {kind.title}."
            )
        return _read_cifar(base, kind)
    for folder in _candidates(base, kind.folders):
        if (folder / "train.npz").exists() or (folder / "test.npz").exists():
            return read_npz(folder / "train.npz"), read_npz(folder / "test.npz")
        if kind.batches:
            for source in (folder, *(folder / archive for archive in kind.archives)):
                if _holds_cifar(source, kind):
                    return _read_cifar(source, kind)
        elif any(_idx_path(folder, stem) is not None for stem in _IDX_FILES):
            return _read_idx_files(folder)
    expected = " or ".join(kind.archives) if kind.batches else "their original IDX files"
    raise DataError(
        f"No files of {kind.title} in {base}: expected train.npz and test.npz, or {expected}."
    )


def _candidates(base: Path, folders: Sequence[str]) -> list[Path]:
    roots = [base, *(base / folder for folder in folders)]
    every = [root / name for root in roots for name in (".", "raw", *folders)]
    return [path for path in dict.fromkeys(every) if path.is_dir()]


def _idx_path(folder: Path, stem: str) -> Path | None:
    names = (s + end for s in (stem, stem.replace("-idx", ".idx")) for end in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).exists()), None)


def _read_idx_files(folder: Path) -> tuple[Arrays, Arrays]:
    arrays = []
    for stem in _IDX_FILES:
        path = _idx_path(folder, stem)
        if path is None:
            raise DataError(f"{folder} is incomplete: it has no file {stem} or {stem}.gz.")
        arrays.append(read_idx(path))
    return (arrays[0], arrays[1]), (arrays[2], arrays[3])


def _holds_cifar(source: Path, kind: DatasetKind) -> bool:
    names = (name + end for name in kind.batches for end in ("", ".bin"))
    return source.is_file() or any((source / name).is_file() for name in names)


def _read_cifar(source: Path, kind: DatasetKind) -> tuple[Arrays, Arrays]:
    members = read_members(source, {n + end for n in kind.batches for end in ("", ".bin")})
    binary = not any(name in members for name in kind.batches)

    def batch(name: str) -> Arrays:
        name = f"{name}.bin" if binary else name
        if name not in members:
            raise DataError(f"{source} is incomplete: it has no file {name}.")
        where = f"{source}/{name}"
        if binary:
            return read_cifar_binary(members[name], where, kind.label_bytes)
        return read_cifar_pickle(members[name], where)

    *train, test = map(batch, kind.batches)
    images, labels = map(np.concatenate, zip(*train, strict=True))
    return (images, labels), test


def _checked(arrays: Arrays, kind: DatasetKind, part: str) -> Arrays:
    """Return images (N, H, W, C) as they are stored and labels as int64, once they make sense."""
    images, labels = arrays
    height, width, channels = kind.image_shape
    if images.ndim == 3 and channels == 1:
        images = images[..., None]
    if images.ndim != 4 or images.shape[1:] != kind.image_shape:
        raise DataError(
            f"The {part} images have shape {images.shape}, but those of {kind.title} are "
            f"(N, {height}, {width}{f', {channels}' if channels > 1 else ''})."
        )
    if images.dtype.kind not in "fiu":
        raise DataError(f"The {part} images have type {images.dtype}, but must be numbers.")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"The {part} labels have shape {labels.shape} and type {labels.dtype}, "
            "but must be (N,) integers."
        )
    if len(images) != len(labels):
        raise DataError(f"There are {len(images)} {part} images but {len(labels)} {part} labels.")
    if len(images) == 0:
        raise DataError(f"There are no {part} images.")
    if labels.min() < 0 or labels.max() >= kind.classes:
        raise DataError(
            f"The {part} labels reach from {labels.min()} to {labels.max()}, "
            f"but {kind.title} has classes 0 to {kind.classes - 1}."
        )
    if bad := int((~np.isfinite(images).all(axis=(1, 2, 3))).sum()):
        raise DataError(f"{bad} of the {len(images)} {part} images hold NaN or infinite values.")
    return images, labels.astype(np.int64)


def _keep_classes(arrays: Arrays, classes: Sequence[int] | None) -> Arrays:
    """Keep some classes and number them anew."""
    if classes is None:
        return arrays
    images, labels = arrays
    kept = np.isin(labels, classes)
    number = np.zeros(max(*classes, int(labels.max())) + 1, dtype=np.int64)
    number[list(classes)] = np.arange(len(classes))
    return images[kept], number[labels[kept]]


def _subset(arrays: Arrays, count: int | None, rng: np.random.Generator, part: str) -> Arrays:
    images, labels = arrays
    if count is None:
        return arrays
    if count < 1:
        raise DataError(f"The number of {part} samples must be at least 1, not {count}.")
    if count > len(labels):
        raise DataError(f"{count} {part} samples are asked for, but there are only {len(labels)}.")
    chosen = balanced_subset(labels, count, rng)
    return images[chosen], labels[chosen]


def _to_tensor(images: np.ndarray) -> Tensor:
    """Return (N, C, H, W) float32."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32))

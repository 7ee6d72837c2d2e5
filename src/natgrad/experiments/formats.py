"""Readers of the file formats that image data sets come in: IDX, CIFAR (pickle and binary) and npz.

Every reader returns plain NumPy arrays, ``(images, labels)`` with images of shape (N, H, W) or (N,
H, W, 3), and raises `DataError` with one sentence when a file is missing, truncated or not what it
claims to be.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray]

_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_CIFAR_PIXELS = 3 * 32 * 32
# The globals that a pickled CIFAR batch refers to, under every name NumPy has given them.
_PICKLE_GLOBALS = {
    *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
    *("numpy.ndarray", "numpy.dtype", "_codecs.encode"),
}


class DataError(ValueError):
    """Data that cannot be used: files missing, truncated, inconsistent or not finite."""


def read_idx(path: Path) -> np.ndarray:
    """Read one IDX file, the format of MNIST and Fashion-MNIST, gzipped or not.

    It must be as long as its header says.
    """
    content = _read(path)
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path} is truncated or damaged: it cannot be unzipped.") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _IDX_TYPES:
        raise DataError(f"{path} is not an IDX file: its first four bytes are {content[:4]!r}.")
    dtype = np.dtype(_IDX_TYPES[content[2]])
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"{path} is truncated: it ends inside its header.")
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], ">u4"))
    promised = start + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if len(content) != promised:
        word = "truncated" if len(content) < promised else "too long"
        raise DataError(
            f"{path} is {word}: its header promises {promised} bytes and it has {len(content)}."
        )
    found = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return found.astype(dtype.newbyteorder("="))


def read_npz(path: Path) -> Arrays:
    """Read `images` (N, H, W) or (N, H, W, C), and `labels` (N,), from an npz file."""
    try:
        with np.load(io.BytesIO(_read(path)), allow_pickle=False) as archive:
            absent = {"images", "labels"} - set(archive.files)
            if absent:
                raise DataError(f"{path} has no array named {' or '.join(sorted(absent))}.")
            return archive["images"], archive["labels"]
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, AttributeError, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is truncated or is no npz file of plain arrays.") from error


def read_cifar_pickle(content: bytes, name: str) -> Arrays:
    """Decode one batch of the python version of CIFAR-10 or CIFAR-100, called `name` in errors.

    Images are (N, 32, 32, 3) uint8, labels (N,) int64, the fine ones of CIFAR-100. Only the names
    that such a batch needs can be unpickled: a file that refers to anything else is refused before
    any of its code runs.
    """
    try:
        batch = _CifarUnpickler(io.BytesIO(content), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{name} is not a CIFAR batch: {error}") from error
    except Exception as error:  # pickle raises nearly anything for a damaged file
        raise DataError(f"{name} is truncated or is no pickled CIFAR batch.") from error
    if not isinstance(batch, dict):
        raise DataError(f"{name} is not a CIFAR batch: it holds no dictionary.")
    batch = {
        key.decode(errors="replace") if isinstance(key, bytes) else key: value
        for key, value in batch.items()
    }
    data, labels = batch.get("data"), batch.get("fine_labels", batch.get("labels"))
    if not isinstance(data, np.ndarray) or labels is None:
        raise DataError(f"{name} is not a CIFAR batch: it lacks `data` or `labels`.")
    if data.ndim != 2 or data.shape[1] != _CIFAR_PIXELS or data.dtype != np.uint8:
        raise DataError(
            f"{name} holds data of shape {data.shape} and type {data.dtype}, not (N, 3072) uint8."
        )
    return _channels_last(data), np.asarray(labels, dtype=np.int64)


def read_cifar_binary(content: bytes, name: str, label_bytes: int) -> Arrays:
    """Decode one file of the binary version of CIFAR-10 or CIFAR-100, called `name` in errors.

    Each record is `label_bytes` (the last of which is the label) and an image. Images are (N, 32,
    32, 3) uint8, labels (N,) int64.
    """
    record = label_bytes + _CIFAR_PIXELS
    if not content or len(content) % record:
        raise DataError(
            f"{name} is truncated: {len(content)} bytes are no multiple of its records of {record}."
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, record)
    return _channels_last(rows[:, label_bytes:]), rows[:, label_bytes - 1].astype(np.int64)


def read_members(source: Path, names: Collection[str]) -> dict[str, bytes]:
    """Read the files of some names that a folder or a tar archive, compressed or not, holds.

    They are found by base name; those that are not there are left out. Nothing is written to disk.
    """
    if source.is_dir():
        return {name: _read(source / name) for name in names if (source / name).is_file()}
    found = {}
    try:
        with tarfile.open(source) as tar:
            for member in tar:
                name = Path(member.name).name
                file = tar.extractfile(member) if name in names and member.isfile() else None
                if file is not None:
                    found[name] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{source} is truncated or is no tar archive.") from error
    return found


class _CifarUnpickler(pickle.Unpickler):
    """An unpickler that builds containers, numbers, strings and NumPy arrays, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _PICKLE_GLOBALS:
            raise DataError(f"it refers to {module}.{name}, which no CIFAR batch needs.")
        return super().find_class(module, name)


def _channels_last(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"There is no file {path}.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error

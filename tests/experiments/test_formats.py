import gzip
import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from natgrad.experiments.formats import (
    DataError,
    read_cifar_binary,
    read_cifar_pickle,
    read_idx,
    read_members,
    read_npz,
)

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx_bytes(array: np.ndarray) -> bytes:
    code = CODES[array.dtype.str[1:]]
    header = bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


@given(
    code=st.sampled_from(sorted(CODES)),
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    zipped=st.booleans(),
    seed=st.integers(0, 99),
)
def test_idx_round_trip(tmp_path_factory, code, shape, zipped, seed):
    array = np.random.default_rng(seed).integers(-100, 100, shape).astype(code)
    content = idx_bytes(array)
    path = tmp_path_factory.mktemp("idx") / "array"
    path.write_bytes(gzip.compress(content) if zipped else content)
    read = read_idx(path)
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("cut", [0, 3, 7, 15, 20, -1])
def test_truncated_idx_is_refused(tmp_path, cut):
    path = tmp_path / "images"
    path.write_bytes(idx_bytes(np.ones((3, 4, 5), np.uint8))[:cut])
    with pytest.raises(DataError, match="truncated|not an IDX file"):
        read_idx(path)


def test_truncated_gzip_is_refused(tmp_path):
    path = tmp_path / "images.gz"
    rng = np.random.default_rng(0)
    content = gzip.compress(idx_bytes(rng.integers(0, 255, (9, 9)).astype(np.uint8)))
    path.write_bytes(content[:-12])
    with pytest.raises(DataError, match="truncated or damaged"):
        read_idx(path)


def test_idx_that_is_too_long_is_refused(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(idx_bytes(np.ones(3, np.uint8)) + b"\0")
    with pytest.raises(DataError, match="too long"):
        read_idx(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"There is no file .*absent"):
        read_idx(tmp_path / "absent")


def test_npz_round_trip_and_missing_array(tmp_path):
    images, labels = np.arange(12.0).reshape(3, 2, 2), np.arange(3)
    np.savez_compressed(tmp_path / "train.npz", images=images, labels=labels)
    read = read_npz(tmp_path / "train.npz")
    np.testing.assert_array_equal(read[0], images)
    np.testing.assert_array_equal(read[1], labels)
    np.savez(tmp_path / "poor.npz", images=images)
    with pytest.raises(DataError, match="no array named labels"):
        read_npz(tmp_path / "poor.npz")


def test_truncated_and_pickled_npz_are_refused(tmp_path):
    path = tmp_path / "train.npz"
    np.savez(path, images=np.zeros((50, 8, 8)), labels=np.zeros(50, int))
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DataError, match="truncated"):
        read_npz(path)
    np.savez(path, images=np.array([object()]), labels=np.zeros(1, int))
    with pytest.raises(DataError, match="plain arrays"):
        read_npz(path)


def cifar_pickle(labels: list[int], seed: int = 0, key: str = "labels", protocol: int = 2) -> bytes:
    data = np.random.default_rng(seed).integers(0, 256, (len(labels), 3072)).astype(np.uint8)
    return pickle.dumps({b"data": data, key.encode(): labels}, protocol=protocol)


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("key", ["labels", "fine_labels"])
def test_cifar_pickle_is_channels_last(protocol, key):
    images, labels = read_cifar_pickle(cifar_pickle([3, 1], key=key, protocol=protocol), "batch")
    data = np.random.default_rng(0).integers(0, 256, (2, 3072)).astype(np.uint8)
    assert labels.tolist() == [3, 1]
    assert images.shape == (2, 32, 32, 3)
    # 1024 red values, then green, then blue, each row by row
    assert images[1, 2, 5, 1] == data[1, 1024 + 2 * 32 + 5]
    assert images[0, 31, 0, 2] == data[0, 2048 + 31 * 32]


def test_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    with pytest.raises(DataError, match="refers to .*mkdir"):
        read_cifar_pickle(pickle.dumps({b"data": Evil()}), "batch")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x02}", pickle.dumps([1]), pickle.dumps({})])
def test_other_pickles_are_refused(content):
    with pytest.raises(DataError, match="batch"):
        read_cifar_pickle(content, "batch")


@pytest.mark.parametrize("label_bytes", [1, 2])
def test_cifar_binary(label_bytes):
    pixels = np.random.default_rng(1).integers(0, 256, (4, 3072)).astype(np.uint8)
    heads = np.array([[9, 7], [9, 0], [9, 5], [9, 2]], np.uint8)[:, 2 - label_bytes :]
    content = np.concatenate([heads, pixels], axis=1).tobytes()
    images, labels = read_cifar_binary(content, "test.bin", label_bytes)
    assert labels.tolist() == [7, 0, 5, 2]
    assert images[2, 3, 4, 2] == pixels[2, 2 * 1024 + 3 * 32 + 4]
    with pytest.raises(DataError, match="truncated"):
        read_cifar_binary(content[:-1], "test.bin", label_bytes)


def test_members_of_archive_and_folder(tmp_path):
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("cifar/test_batch")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    (tmp_path / "other").write_bytes(b"xyz")
    names = ("test_batch", "other", "absent")
    assert read_members(tmp_path / "c.tar.gz", names) == {"test_batch": b"abc"}
    assert read_members(tmp_path, names) == {"other": b"xyz"}


def test_damaged_archive_is_refused(tmp_path):
    (tmp_path / "c.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(DataError, match="no tar archive"):
        read_members(tmp_path / "c.tar.gz", ["test_batch"])

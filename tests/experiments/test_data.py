import gzip
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch

from natgrad.experiments.data import balanced_subset, load_dataset, normalise
from natgrad.experiments.formats import DataError

RNG = np.random.default_rng(0)


def write_idx(path, array):
    header = bytes([0, 0, 0x08, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder, suffix="", train=40, test=20):
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("t10k", test)):
        write_idx(
            folder / f"{part}-images-idx3-ubyte{suffix}", RNG.integers(0, 256, (count, 28, 28))
        )
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", np.arange(count) % 10)


def write_npz(folder, images, labels, part="train"):
    np.savez(folder / f"{part}.npz", images=images, labels=labels)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("place", [".", "raw", "mnist", "MNIST/raw"])
def test_mnist_files_are_found(tmp_path, suffix, place):
    write_mnist(tmp_path / place, suffix)
    data = load_dataset("mnist", tmp_path)
    assert data.train_inputs.shape == (40, 1, 28, 28)
    assert data.test_inputs.shape == (20, 1, 28, 28)
    assert data.train_labels.tolist() == [i % 10 for i in range(40)]
    assert data.classes == 10


def test_values_survive_up_to_an_affine_map_per_image(tmp_path):
    write_mnist(tmp_path)
    raw = np.frombuffer((tmp_path / "train-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
    raw = raw.reshape(40, -1).astype(float)
    read = load_dataset("mnist", tmp_path).train_inputs.flatten(1).double().numpy()
    for i in (0, 39):
        assert np.corrcoef(raw[i], read[i])[0, 1] > 1 - 1e-9


def cifar_batch(labels, key=b"labels"):
    data = RNG.integers(0, 256, (len(labels), 3072)).astype(np.uint8)
    return pickle.dumps({b"data": data, key: list(labels)}, protocol=2)


def cifar_batches(name, binary):
    """Returns file name → content for a tiny CIFAR set; training labels count up."""
    if name == "cifar10":
        parts = {f"data_batch_{i}": [2 * i - 2, 2 * i - 1] for i in range(1, 6)}
        parts["test_batch"] = [4, 2]
    else:
        parts = {"train": list(range(100)), "test": [99, 0]}
    if not binary:
        key = b"labels" if name == "cifar10" else b"fine_labels"
        return {part: cifar_batch(labels, key) for part, labels in parts.items()}
    coarse = b"" if name == "cifar10" else b"\x07"
    return {
        f"{part}.bin": b"".join(
            coarse + bytes([label]) + RNG.integers(0, 256, 3072).astype(np.uint8).tobytes()
            for label in labels
        )
        for part, labels in parts.items()
    }


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("packing", ["folder", "archive", "archive itself"])
def test_cifar_files_are_found(tmp_path, name, binary, packing):
    digits = name.removeprefix("cifar")
    inside = f"cifar-{digits}-" + ("binary" if binary else "python")
    if packing == "folder":
        folder = tmp_path / name
        folder.mkdir()
        for file, content in cifar_batches(name, binary).items():
            (folder / file).write_bytes(content)
    else:
        with tarfile.open(tmp_path / f"{inside}.tar.gz", "w:gz") as tar:
            for file, content in cifar_batches(name, binary).items():
                info = tarfile.TarInfo(f"{inside}/{file}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    place = tmp_path / f"{inside}.tar.gz" if packing == "archive itself" else tmp_path
    data = load_dataset(name, place)
    count = 10 if name == "cifar10" else 100
    assert data.train_labels.tolist() == list(range(count))
    assert data.test_labels.tolist() == ([4, 2] if name == "cifar10" else [99, 0])
    assert data.train_inputs.shape == (count, 3, 32, 32)


def test_incomplete_cifar_names_the_file(tmp_path):
    for file, content in cifar_batches("cifar10", binary=False).items():
        if file != "data_batch_3":
            (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match="no file data_batch_3"):
        load_dataset("cifar10", tmp_path)


def test_npz_is_read(tmp_path):
    images = RNG.random((30, 32, 32, 3))
    write_npz(tmp_path, images, np.arange(30) % 10)
    write_npz(tmp_path, images[:10], np.arange(10), "test")
    data = load_dataset("cifar10", tmp_path)
    # channel 1 of the input is channel 1 of the image, up to one affine map per image
    read, raw = data.train_inputs[7, 1].double().flatten(), images[7, :, :, 1].flatten()
    assert np.corrcoef(read, raw)[0, 1] > 1 - 1e-9


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.full((4, 28, 28), np.nan), np.zeros(4, int), "4 of the 4 training images hold NaN"),
        (np.zeros((4, 28, 28)), np.zeros(3, int), "4 training images but 3 training labels"),
        (np.zeros((4, 28, 27)), np.zeros(4, int), "have shape"),
        (np.zeros((4, 28, 28)), np.full(4, 10), "classes 0 to 9"),
        (np.zeros((4, 28, 28)), np.full(4, -1), "classes 0 to 9"),
        (np.zeros((4, 28, 28)), np.zeros(4), "integers"),
        (np.zeros((4, 28, 28), "U1"), np.zeros(4, int), "must be numbers"),
        (np.zeros((0, 28, 28)), np.zeros(0, int), "no training images"),
    ],
)
def test_senseless_arrays_are_refused(tmp_path, images, labels, message):
    write_npz(tmp_path, images, labels)
    write_npz(tmp_path, np.zeros((1, 28, 28)), np.zeros(1, int), "test")
    with pytest.raises(DataError, match=message):
        load_dataset("mnist", tmp_path)


def test_missing_files_and_folders_are_told(tmp_path):
    with pytest.raises(DataError, match="give --data-dir"):
        load_dataset("mnist")
    with pytest.raises(DataError, match="does not exist"):
        load_dataset("mnist", tmp_path / "absent")
    with pytest.raises(DataError, match="No files of MNIST in"):
        load_dataset("mnist", tmp_path)
    with pytest.raises(DataError, match="Unknown data set"):
        load_dataset("imagenet")
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="no file t10k-labels-idx1-ubyte"):
        load_dataset("mnist", tmp_path)


def test_too_many_samples_are_refused(tmp_path):
    with pytest.raises(DataError, match="only 1200"):
        load_dataset("digits", train_samples=1201)
    with pytest.raises(DataError, match="at least 1"):
        load_dataset("digits", test_samples=0)


def test_digits_subset_is_balanced_seeded_and_disjoint_from_the_test_set():
    data = load_dataset("digits", train_samples=200, seed=3)
    assert data.train_labels.bincount().tolist() == [20] * 10
    again = load_dataset("digits", train_samples=200, seed=3)
    assert torch.equal(data.train_inputs, again.train_inputs)
    other = load_dataset("digits", train_samples=200, seed=4)
    assert not torch.equal(data.train_inputs, other.train_inputs)
    whole = load_dataset("digits")
    assert len(whole.train_labels) == 1200 and len(whole.test_labels) == 597
    train = {tuple(image.flatten().tolist()) for image in whole.train_inputs}
    assert not any(tuple(image.flatten().tolist()) in train for image in whole.test_inputs)


def test_every_normalised_image_has_squared_norm_d():
    data = load_dataset("digits")
    for inputs in (data.train_inputs, data.test_inputs):
        torch.testing.assert_close(inputs.square().sum((1, 2, 3)), torch.full((len(inputs),), 64.0))


def test_normalisation_uses_the_training_statistics_and_keeps_constant_images_finite():
    train = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    test = torch.full((1, 1, 2, 2), 0.5)
    normal_train, normal_test = normalise(train, test)
    torch.testing.assert_close(normal_train.flatten(1), torch.tensor([[-1.0] * 4, [1.0] * 4]))
    torch.testing.assert_close(normal_test, torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("count", [1, 7, 12, 30])
def test_balanced_subset(count):
    labels = np.array([0] * 20 + [1] * 5 + [2] * 5)
    chosen = balanced_subset(labels, count, np.random.default_rng(0))
    assert len(set(chosen.tolist())) == count
    counts = np.bincount(labels[chosen], minlength=3)
    if count <= 15:
        assert counts.max() - counts.min() <= 1
    else:
        assert counts.tolist() == [20, 5, 5]

"""Data sets in memory, the order of images, and augmentation."""

import gzip
import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset

from cnn import data
from cnn.data import Augmented, Batches, Description, Normalize
from cnn.data.formats import idx
from cnn.data.sets import DEBIAN, resized
from cnn.errors import UsageError


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_digits_are_all_there_once(digits):
    train, test = digits.train.tensors, digits.test.tensors
    assert (len(train[1]), len(test[1])) == (1437, 360)
    images, labels = (torch.cat(pair) for pair in zip(train, test, strict=True))
    assert images.shape == (1797, 1, 32, 32)
    assert images.dtype == torch.uint8
    # UCI's test set holds 1,797 digits, of each about 180; a few of its images are nearly alike.
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert len(images.flatten(1).unique(dim=0)) == 1797
    assert not digits.mirrors


def test_digits_are_split_the_same_way_each_time_and_evenly(digits):
    again = data.load("digits", seed=5)
    for first, second in ((digits.train, again.train), (digits.test, again.test)):
        assert all(map(torch.equal, first.tensors, second.tensors))
    shares = [part.tensors[1].bincount() / len(part) for part in (digits.train, digits.test)]
    torch.testing.assert_close(*shares, rtol=0, atol=2 / 360)


@pytest.mark.parametrize("name", ["digits", "faces"])
def test_a_fixed_tenth_validates_if_asked_for(name):
    whole, first, again = data.load(name), *(data.load(name, seed=s, val=True) for s in (0, 5))
    assert whole.val is None
    assert first.description == whole.description
    for part, other in ((first.train, again.train), (first.val, again.val)):
        assert all(map(torch.equal, part.tensors, other.tensors))
    assert torch.equal(first.test.tensors[0], whole.test.tensors[0])
    assert 0.05 < len(first.val) / len(whole.train) < 0.15
    together, known = (
        sorted(image.numpy().tobytes() for image, _ in part)
        for part in (ConcatDataset([first.train, first.val]), whole.train)
    )
    assert together == known
    assert len(first.val.tensors[1].unique()) == len(first.description.classes)


def test_a_data_set_is_known_by_its_images(mnist):
    first, larger = (data.load(f"mnist:{mnist}", size=size).description for size in (None, 64))
    assert first.identity == larger.identity
    labels = mnist / "train-labels.idx1-ubyte"
    write_idx(labels, np.arange(20)[::-1] % 10)
    assert data.load(f"mnist:{mnist}").description.identity != first.identity


def test_digits_take_a_size():
    train = data.load("digits", size=8).train
    assert train.tensors[0].shape == (1437, 1, 8, 8)
    assert len(train.tensors[0].unique()) == 17  # each pixel is a count from 0 to 16


def test_preparation_gives_mean_0_and_variance_1_of_the_training_set(digits):
    prepare = Normalize(digits.description, torch.device("cpu"), torch.channels_last)
    images = prepare(digits.train.tensors[0])
    assert images.dtype == torch.float32
    assert images.double().mean().abs() < 1e-5
    assert abs(images.double().var() - 1) < 1e-4
    description = Description(("a",), 2, (0.5, 0, 1), (0.5, 1, 2))
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    for layout in (torch.contiguous_format, torch.channels_last):
        colours = Normalize(description, torch.device("cpu"), layout)(pixels)
        torch.testing.assert_close(colours[1, :, 3, 2], torch.tensor([-1, 0.2, 0]))
        assert colours.is_contiguous(memory_format=layout)


def test_28_pixels_are_padded_and_others_scaled():
    images = torch.arange(28 * 28).view(1, 1, 28, 28).to(torch.uint8)
    padded = resized(images, 32)
    assert torch.equal(padded[..., 2:30, 2:30], images)
    assert padded.sum() == images.sum()
    assert resized(images, 14).shape == (1, 1, 14, 14)
    assert torch.equal(
        resized(torch.full((1, 3, 5, 9), 7, dtype=torch.uint8), 20).unique(),
        torch.tensor([7], dtype=torch.uint8),
    )


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    contents = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(contents) if path.suffix == ".gz" else contents)


@pytest.fixture
def mnist(tmp_path) -> Path:
    """A folder of 20 and 10 images of all classes, under each of the names that are in use."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 20), ("t10k", 10)):
        images = draw.integers(256, size=(count, 28, 28))
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels.idx1-ubyte", np.arange(count) % 10)
    return tmp_path


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files(name, mnist):
    sets = data.load(f"{name}:{mnist}")
    images, labels = sets.train.tensors
    expected = np.random.default_rng(0).integers(256, size=(20, 28, 28))
    assert np.array_equal(images[:, 0, 2:30, 2:30].numpy(), expected)
    assert labels.tolist() == [*range(10)] * 2
    assert len(sets.test) == 10
    assert len(sets.description.classes) == 10
    assert sets.mirrors == (name == "fashion-mnist")


IDX_DAMAGE = {
    "cut.gz": (
        lambda path: path.write_bytes(path.read_bytes()[:200]),
        "train-images-idx3-ubyte.gz is damaged",
    ),
    "text": (
        lambda path: path.write_bytes(gzip.compress(b"text")),
        "idx3-ubyte.gz is not an IDX file",
    ),
    "short": (lambda path: write_idx(path, np.zeros((3, 28, 28))), "holds 3 images and 20 labels"),
    "none": (lambda path: path.unlink(), "holds no train-images-idx3-ubyte"),
    "label": (
        lambda path: write_idx(path.with_name("train-labels.idx1-ubyte"), np.full(20, 10)),
        "holds labels beyond 0 to 9",
    ),
}


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 28, 28), r"is empty: its header says \[0, 28, 28\]"),
        ((2, 0, 28), "is empty"),
        ((2**31, 2**31, 4), "is not an IDX file"),  # their product is 0 in 64 bits
        ((2**31, 2, 2), "is not an IDX file"),
        ((3, 28, 28), "is not an IDX file"),
        ((2, 28, 27), "it holds more bytes than its header says"),
    ],
)
def test_headers_of_idx_files_are_not_trusted(end, sizes, message, tmp_path):
    contents = bytes((0, 0, 8, 3)) + struct.pack(">III", *sizes) + bytes(2 * 28 * 28)
    path = tmp_path / f"x{end}"
    path.write_bytes(gzip.compress(contents) if end else contents)
    with pytest.raises(UsageError, match=message) as caught:
        idx(path, 3)
    assert str(path) in str(caught.value)


def test_no_more_is_unpacked_than_a_header_says(tmp_path, monkeypatch):
    path, read, asked = tmp_path / "x.gz", gzip.GzipFile.read, []

    def counting(file: gzip.GzipFile, size: int = -1) -> bytes:
        asked.append(size)
        return read(file, size)

    path.write_bytes(gzip.compress(bytes((0, 0, 8, 1, 0, 0, 0, 9)) + bytes(10**7)))
    monkeypatch.setattr(gzip.GzipFile, "read", counting)
    with pytest.raises(UsageError, match="more bytes"):
        idx(path, 1)
    assert asked == [8, 10]


@pytest.mark.parametrize("damage", IDX_DAMAGE)
def test_damaged_idx_files(damage, mnist):
    harm, message = IDX_DAMAGE[damage]
    harm(mnist / "train-images-idx3-ubyte.gz")
    with pytest.raises(UsageError, match=message) as caught:
        data.load(f"mnist:{mnist}")
    assert str(mnist) in str(caught.value)


@pytest.mark.skipif(not (DEBIAN / "fashion-mnist").is_dir(), reason="Debian's package is missing")
def test_fashion_mnist_as_debian_installs_it():
    sets = data.load("fashion-mnist")
    assert sets.train.tensors[1].bincount().tolist() == [6000] * 10
    assert sets.test.tensors[1].bincount().tolist() == [1000] * 10
    # 0.2860 and 0.3530 over 28x28 pixels, as is often printed; here padded to 32x32.
    assert sets.description.mean[0] == pytest.approx(0.2860 * 784 / 1024, abs=1e-4)


class Python2(pickle._Pickler):
    """Pickles as Python 2 did: texts are bytes. So is CIFAR-10, and numpy's module had no _."""

    def save_text(self, text: str | bytes) -> None:
        data = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(text)

    dispatch = pickle._Pickler.dispatch | {str: save_text, bytes: save_text}

    @classmethod
    def dumps(cls, value: object) -> bytes:
        file = io.BytesIO()
        cls(file, protocol=2).dump(value)
        return file.getvalue().replace(b"numpy._core", b"numpy.core")


class Code:
    """Pickled, it would run code."""

    def __reduce__(self):
        return Path.touch, (Path("was-run"),)


def cifar(folder: Path, kind: str) -> dict[str, np.ndarray]:
    """Write a CIFAR-10 of 4 images a file; returns images and labels to train with."""
    draw = np.random.default_rng(0)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    parts = [
        (draw.integers(256, size=(4, 3072), dtype=np.uint8), draw.integers(10, size=4))
        for _ in names
    ]
    for name, (pixels, labels) in zip(names, parts, strict=True):
        if kind == "bin":
            records = np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
        else:
            contents = {b"data": pixels, b"labels": labels.tolist(), b"batch_label": b"of 5"}
            dumps = Python2.dumps if kind == "old" else pickle.dumps
            (folder / name).write_bytes(dumps(contents))
    images, labels = (np.concatenate(list(values)) for values in zip(*parts[:5], strict=True))
    return {"images": images.reshape(-1, 3, 32, 32), "labels": labels}


@pytest.mark.parametrize("kind", ["bin", "old", "new"])
def test_cifar10(kind, tmp_path):
    place = tmp_path / f"cifar-10-batches-{'bin' if kind == 'bin' else 'py'}"
    place.mkdir()
    expected = cifar(place, kind)
    for folder in (tmp_path, place):
        sets = data.load(f"cifar10:{folder}")
        images, labels = sets.train.tensors
        assert np.array_equal(images.numpy(), expected["images"])
        assert np.array_equal(labels.numpy(), expected["labels"])
        assert len(sets.test) == 4
        assert sets.description.channels == 3


def test_a_pickle_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cifar(tmp_path, "old")
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": Code()}))
    with pytest.raises(UsageError, match=r"data_batch_3 is not a CIFAR-10 file: .* is not allowed"):
        data.load(f"cifar10:{tmp_path}")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("data_batch_2.bin", b"12", "records have 3073 bytes"),
        ("data_batch_2.bin", b"\x0b" * 3073, "labels beyond 0 to 9"),
        ("data_batch_1.bin", None, "holds neither"),
        ("test_batch.bin", None, "cannot read .*test_batch.bin: No such file"),
    ],
)
def test_damaged_cifar10(name, contents, message, tmp_path):
    cifar(tmp_path, "bin")
    (tmp_path / name).unlink() if contents is None else (tmp_path / name).write_bytes(contents)
    with pytest.raises(UsageError, match=message):
        data.load(f"cifar10:{tmp_path}")


def test_batches_hold_every_image_once_whoever_shares_them():
    alone = Batches(23, 6, seed=1)
    assert len(alone) == 3
    whole = list(alone)
    assert len({index for batch in whole for _, index in batch}) == 18
    shares = [list(Batches(23, 6, 1, rank, 3)) for rank in range(3)]
    for step, batch in enumerate(whole):
        assert sorted(batch) == sorted(place for share in shares for place in share[step])
    alone.step = 2
    assert list(alone) == whole[2:]
    alone.epoch, alone.step = 1, 0
    later = list(alone)
    assert {epoch for batch in later for epoch, _ in batch} == {1}
    assert [[index for _, index in batch] for batch in later] != [
        [index for _, index in batch] for batch in whole
    ]
    assert list(Batches(23, 6, seed=2)) != whole


def test_augmentation_is_drawn_from_seed_epoch_and_index_alone(digits):
    def pictures(seed, epoch, indices, mirror=True):
        images = Augmented(digits.train, seed, shift=True, mirror=mirror)
        return [images[epoch, index][0] for index in indices]

    def same(first, second):
        return [torch.equal(a, b) for a, b in zip(first, second, strict=True)]

    there = pictures(0, 0, range(40))
    assert all(same(there, pictures(0, 0, reversed(range(40)))[::-1]))
    for other in (pictures(1, 0, range(40)), pictures(0, 1, range(40))):
        assert sum(same(there, other)) < 10
    mirrored = same(there, pictures(0, 0, range(40), mirror=False)).count(False)
    assert 10 < mirrored < 30
    plain = Augmented(digits.train, 0, shift=False, mirror=True)
    assert torch.equal(plain[5, 7][0], digits.train[7][0])


def test_augmentation_shifts_by_up_to_an_eighth():
    point = torch.zeros(1, 16, 16, dtype=torch.uint8)
    point[0, 8, 8] = 1
    images = Augmented([(point, 4)] * 300, 0, shift=True, mirror=False)
    places = {tuple(images[0, index][0][0].nonzero()[0].tolist()) for index in range(300)}
    assert places == {(row, column) for row in range(6, 11) for column in range(6, 11)}
    assert images[0, 0][1] == 4


def test_faces_are_split_evenly():
    faces = data.load("faces")
    assert faces.description.classes == ("face", "other")
    for part, count in ((faces.train, 80), (faces.test, 20)):
        images, labels = part.tensors
        assert images.shape == (2 * count, 1, 32, 32)
        assert images.dtype == torch.uint8
        assert labels.bincount().tolist() == [count, count]
    with pytest.raises(UsageError, match="faces come with scikit-image and take no path"):
        data.load("faces:somewhere")

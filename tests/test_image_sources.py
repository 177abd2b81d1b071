"""CIFAR-10, Mini-ImageNet and folders, each built small in the layout of the real one; and what is refused."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_images import (
    cifar10_archive,
    encoded,
    fake_cifar10,
    parquet_file,
    random_images,
    small_mini_imagenet,
    write_class_folders,
    write_packed_cifar10,
    write_packed_mini_imagenet,
)
from PIL import Image
from test_download import Server

from minigated.data import cifar, load_images, mini_imagenet
from minigated.data.pictures import decode, decode_blocks
from minigated.errors import InputError
from minigated.torchvision_cpu import prepare_torchvision


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def same_images(images, pixels, labels) -> None:
    """The set holds exactly these train and test images (600, the last 100 are test), the test in order."""
    np.testing.assert_array_equal(images.test.images, pixels[500:])
    np.testing.assert_array_equal(images.test.labels, labels[500:])
    held = [(image.tobytes(), int(label)) for split in (images.train, images.validation)
            for image, label in zip(split.images.numpy(), split.labels)]  # fmt: skip
    assert sorted(held) == sorted((image.tobytes(), int(label)) for image, label in zip(pixels[:500], labels[:500]))


# ---------------------------------------------------------------------------------------------- CIFAR-10
@pytest.fixture
def packed(tmp_path, monkeypatch):
    pixels, labels = fake_cifar10(monkeypatch)
    write_packed_cifar10(tmp_path / "cifar10", pixels, labels)
    return tmp_path / "cifar10", pixels, labels


def test_cifar10_from_a_packed_copy(packed):
    folder, pixels, labels = packed
    images = load_images("cifar10", folder.parent)
    same_images(images, pixels, labels)
    assert len(images.validation) == 50 and images.validation.labels.bincount().tolist() == [5] * 10
    assert images.origin == "a packed copy" and str(folder) not in (images.place / "images.json").read_text()
    for path in folder.iterdir():
        path.unlink()
    again = load_images("cifar10", folder.parent)  # from the cache alone
    assert again.sha256 == images.sha256 and again.train.images.equal(images.train.images)


def test_the_official_sums_and_the_layout_of_the_binary_release():
    assert len(cifar.BINARY_MD5) == 6 and cifar.BINARY_MD5["test_batch"] == "803d5f7f4d78ea53de84dbe85f74fb6d"
    image = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    record = bytes([7, 0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11])  # the label, then the red, green and blue planes
    assert cifar.binary_md5(image, np.array([7])) == hashlib.md5(record).hexdigest()


def test_wrong_pixels_or_labels_of_cifar10_are_refused(packed, monkeypatch):
    folder, pixels, labels = packed
    swapped = labels[:500].astype(np.uint8)
    swapped[[250, 251]] = (swapped[250] + 1) % 10, swapped[251]
    np.save(folder / "train_labels.npy", swapped)
    with pytest.raises(InputError, match="data_batch_3 has MD5 .* expected .*; replace"):
        load_images("cifar10", folder.parent)
    assert not (folder.parent / "images" / "cifar10-32" / "images.json").exists()
    np.save(folder / "train_labels.npy", labels[:500].astype(np.uint8))
    by_columns = lambda picture, rows, columns: cifar_unpack(picture, rows, columns).reshape(
        rows, columns, 32, 32, 3
    ).swapaxes(0, 1).reshape(-1, 32, 32, 3)  # fmt: skip
    cifar_unpack = cifar.unpack_grid
    monkeypatch.setattr(cifar, "unpack_grid", by_columns)  # a planted fault: the grid column by column
    with pytest.raises(InputError, match="data_batch_1 has MD5"):
        load_images("cifar10", folder.parent)


def test_damaged_files_of_a_packed_cifar10_are_named(packed):
    folder, pixels, labels = packed
    good = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refused(name, data, message):
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)
        with pytest.raises(InputError, match=message) as caught:
            load_images("cifar10", folder.parent)
        assert "\n" not in str(caught.value) and name in str(caught.value)
        (folder / name).write_bytes(good[name])

    small = encoded(np.zeros((64, 32, 3), dtype=np.uint8), "PNG")
    refused("data_batch_4.webp", None, "is missing")
    refused("data_batch_2.webp", good["data_batch_2.webp"][:500], "is damaged or no image")
    refused("test_batch.webp", b"no image at all", "is damaged or no image")
    refused("test_batch.webp", small, "is a picture of 32 x 64, expected 320 x 320")
    refused("test_labels.npy", None, "is missing")
    refused("test_labels.npy", good["test_labels.npy"][:-20], "is damaged")
    np.save(folder / "few.npy", labels[:499].astype(np.uint8))
    refused("train_labels.npy", (folder / "few.npy").read_bytes(), r"labels of shape \(499,\), expected \(500,\)")
    np.save(folder / "large.npy", np.full(100, 10, dtype=np.uint8))
    refused("test_labels.npy", (folder / "large.npy").read_bytes(), r"labels outside 0 .. 9")
    same_images(load_images("cifar10", folder.parent), pixels, labels)  # whole again


@pytest.fixture
def public(server, monkeypatch):
    """torchvision's CIFAR10 with a small archive on a local server."""
    pixels, labels = fake_cifar10(monkeypatch)
    prepare_torchvision()
    from torchvision.datasets import CIFAR10

    server.bodies["/cifar.tar.gz"] = cifar10_archive(pixels, labels, CIFAR10, monkeypatch)
    monkeypatch.setattr(CIFAR10, "url", server.url("/cifar.tar.gz"))
    return CIFAR10, pixels, labels


def test_cifar10_through_torchvision(public, server, tmp_path):
    CIFAR10, pixels, labels = public
    server.cuts = [1000]
    images = load_images("cifar10", tmp_path)
    same_images(images, pixels, labels)
    assert [request.get("Range") for request in server.requests] == [None, "bytes=1000-"]  # went on where it was cut
    assert images.origin == "torchvision's copy"
    for path in (images.place / name for name in ("images.npy", "labels.npy", "images.json")):
        path.unlink()
    batch = tmp_path / "cifar10" / CIFAR10.base_folder / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-1])  # what an interrupted unpacking leaves
    same_images(load_images("cifar10", tmp_path), pixels, labels)
    assert len(server.requests) == 2  # from the archive that was there


def test_both_sources_of_cifar10_make_the_same_cache(public, tmp_path):
    _, pixels, labels = public
    write_packed_cifar10(tmp_path / "b" / "cifar10", pixels, labels)
    a, b = load_images("cifar10", tmp_path / "a"), load_images("cifar10", tmp_path / "b")
    assert a.sha256 == b.sha256 and (a.origin, b.origin) == ("torchvision's copy", "a packed copy")
    assert a.validation.images.equal(b.validation.images)


def test_a_download_of_cifar10_that_fails_is_one_line(public, server, tmp_path, monkeypatch):
    server.codes = [404]
    with pytest.raises(InputError, match="could not get cifar-10-python.tar.gz .*404.* yourself"):
        load_images("cifar10", tmp_path)
    server.bodies["/cifar.tar.gz"] = b"another file"
    with pytest.raises(InputError, match="has sha256 .*expected"):
        load_images("cifar10", tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(InputError, match="cifar10 needs torchvision; .*cifar10-sample"):
        load_images("cifar10", tmp_path)


# ---------------------------------------------------------------------------------------------- Mini-ImageNet
@pytest.fixture
def packed_mini(tmp_path, monkeypatch):
    small_mini_imagenet(monkeypatch)
    return tmp_path / "mini-imagenet-64", write_packed_mini_imagenet(tmp_path / "mini-imagenet-64")


def test_mini_imagenet_from_a_packed_copy(packed_mini):
    folder, pixels = packed_mini
    images = load_images("mini-imagenet", folder.parent)
    assert images.classes == ["bird", "cat", "dog"] and images.size == 64
    assert [len(s) for s in (images.train, images.validation, images.test)] == [15, 3, 6]
    assert images.validation.labels.tolist() == [0, 1, 2]
    rows = np.arange(24)
    np.testing.assert_array_equal(images.test.images, pixels[rows % 8 >= 6])
    np.testing.assert_array_equal(images.test.labels, rows[rows % 8 >= 6] // 8)
    train = {(image.tobytes(), label) for split in (images.train, images.validation)
             for image, label in zip(split.images.numpy(), split.labels.tolist())}  # fmt: skip
    assert train == {(pixels[row].tobytes(), row // 8) for row in rows[rows % 8 < 6]}


def test_damaged_files_of_a_packed_mini_imagenet_are_named(packed_mini):
    folder, _ = packed_mini
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    with np.load(folder / "index.npz") as file:
        index = dict(file)

    def refused(name, data, message):
        (folder / name).write_bytes(data) if data is not None else (folder / name).unlink()
        with pytest.raises(InputError, match=message) as caught:
            load_images("mini-imagenet", folder.parent)
        assert "\n" not in str(caught.value) and name in str(caught.value)
        (folder / name).write_bytes(good[name])

    def reindexed(**columns):
        np.savez(folder / "new.npz", **index | columns)
        return (folder / "new.npz").read_bytes()

    broken = bytearray(good["images_01.bin"])
    start, stop = int(index["offset"][14]), int(index["offset"][14] + index["length"][14])
    broken[start:stop] = b"\0" * (stop - start)
    refused("images_01.bin", bytes(broken), r"^n00000001_14.jpg \(images_01.bin .*from byte \d+\) is damaged")
    refused("images_00.bin", good["images_00.bin"][:-1], "has .* bytes, expected")
    refused("images_00.bin", None, "is missing")
    refused("images_00.bin", b"", "is empty")
    refused("index.npz", None, "is missing")
    refused("index.npz", good["index.npz"][:300], "is damaged")
    refused("index.npz", reindexed(label=index["label"][:-1]), "columns of different lengths: .*'label': 23")
    refused("index.npz", reindexed(split=np.array(["train"] * 23 + ["dev"])), "the split 'dev'; accepted: train, val")
    refused("classes.csv", None, "is missing")
    refused("classes.csv", b"a,b\n1,2\n", "is damaged")
    load_images("mini-imagenet", folder.parent)  # whole again


def test_wrong_counts_of_mini_imagenet(packed_mini, monkeypatch):
    folder, _ = packed_mini
    csv = (folder / "classes.csv").read_text()
    (folder / "classes.csv").write_text(csv + "3,n00000003,fish\n")
    with pytest.raises(InputError, match=r"has 4 classes and labels 0 .. 2, expected 3 classes"):
        load_images("mini-imagenet", folder.parent)
    (folder / "classes.csv").write_text(csv)
    monkeypatch.setattr(mini_imagenet, "COUNTS", {"train": 50_000, "held out": 10_000})
    with pytest.raises(InputError, match="has {'train': 18, 'held out': 6} images, expected {'train': 50000"):
        load_images("mini-imagenet", folder.parent)


def serve_hub(server, monkeypatch, files: dict[str, bytes]) -> None:
    """The public copy's list of files and the files, on the local server."""
    monkeypatch.setattr(mini_imagenet, "HUB", server.address)
    place = f"/datasets/{mini_imagenet.REPOSITORY}/resolve/{mini_imagenet.REVISION}/data"
    server.bodies |= {f"{place}/{name}": data for name, data in files.items()}
    entries = [
        {"type": "file", "path": f"data/{name}", "size": len(data), "lfs": {"oid": hashlib.sha256(data).hexdigest()}}
        for name, data in files.items()
    ]
    listing = f"/api/datasets/{mini_imagenet.REPOSITORY}/tree/{mini_imagenet.REVISION}/data"
    server.bodies[listing] = json.dumps(entries).encode()


def test_mini_imagenet_from_the_public_copy(server, monkeypatch, tmp_path):
    pytest.importorskip("pyarrow", reason="the public copy of Mini-ImageNet is in parquet files")
    small_mini_imagenet(monkeypatch)
    pixels, classes = random_images(24, 16), ["n0", "n1", "n2"]
    labels = np.arange(24) % 3
    cuts = {"train-00000-of-00002.parquet": slice(0, 10), "train-00001-of-00002.parquet": slice(10, 18),
            "validation-00000-of-00001.parquet": slice(18, 24), "test-00000-of-00001.parquet": slice(0, 3)}  # fmt: skip
    files = {name: parquet_file(pixels[cut], labels[cut], classes) for name, cut in cuts.items()}
    serve_hub(server, monkeypatch, dict(reversed(files.items())))
    images = load_images("mini-imagenet", tmp_path, size=16)
    assert images.classes == classes and images.origin == "the public copy"
    np.testing.assert_array_equal(images.test.images, pixels[18:])
    np.testing.assert_array_equal(images.test.labels, labels[18:])
    both = torch.cat((images.train.images, images.validation.images)).numpy()
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in pixels[:18])
    assert not any("test-00000" in path.name for path in (tmp_path / "mini-imagenet").iterdir())
    small = load_images("mini-imagenet", tmp_path, size=8)  # another cache from the same files
    assert small.size == 8 and small.place != images.place

    broken = encoded(pixels[0], "PNG")[:60]
    monkeypatch.setattr("fake_images.encoded", lambda image, *_: broken)
    name = "train-00001-of-00002.parquet"
    data = parquet_file(pixels[10:18], labels[10:18], classes)
    (tmp_path / "mini-imagenet" / name).write_bytes(data)
    serve_hub(server, monkeypatch, files | {name: data})
    for listing in (tmp_path / "mini-imagenet").glob("files.json*"):
        listing.unlink()
    with pytest.raises(InputError, match=f"^0.png in .*{name} is damaged or no image"):
        load_images("mini-imagenet", tmp_path, size=4)


def test_the_public_copy_without_pyarrow_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="need pyarrow; accepted: python -m pip install pyarrow, or a packed copy"):
        load_images("mini-imagenet", tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [".lock"]


# ---------------------------------------------------------------------------------------------- folders
def test_a_folder_of_class_folders(tmp_path):
    write_class_folders(tmp_path / "pets", {"dog": 12, "cat": 30, ".hidden": 1})
    (tmp_path / "pets" / "cat" / ".DS_Store").write_bytes(b"x")
    images = load_images(tmp_path / "pets", tmp_path / "root", size=8)
    assert images.name == "pets" and images.classes == ["cat", "dog"] and images.size == 8
    parts = [split.labels.bincount().tolist() for split in (images.train, images.validation, images.test)]
    assert parts == [[24, 10], [3, 1], [3, 1]]
    files = sorted((tmp_path / "pets").glob("[!.]*/[!.]*"))
    wanted = {np.asarray(Image.open(p).resize((8, 8), Image.Resampling.LANCZOS, box=(1, 0, 11, 10))).tobytes(): p
              for p in files}  # fmt: skip
    for split in (images.train, images.validation, images.test):
        for image, label in zip(split.images.numpy(), split.labels.tolist()):
            assert wanted.pop(image.tobytes()).parent.name == images.classes[label]
    assert not wanted  # every file once


def test_a_folder_that_changes_is_read_again(tmp_path):
    write_class_folders(tmp_path / "pets", {"cat": 4, "dog": 5})
    first = load_images(tmp_path / "pets", tmp_path / "root", 8)
    assert load_images(tmp_path / "pets", tmp_path / "root", 8).sha256 == first.sha256
    Image.new("RGB", (9, 9), (200, 0, 0)).save(tmp_path / "pets" / "cat" / "001.png")
    assert load_images(tmp_path / "pets", tmp_path / "root", 8).sha256 != first.sha256
    write_class_folders(tmp_path / "other" / "pets", {"cat": 4, "dog": 5}, seed=8)
    other = load_images(tmp_path / "other" / "pets", tmp_path / "root", 8)
    assert other.place != first.place  # two folders of one name do not share a cache


@pytest.mark.parametrize("held", [("test",), ("val",), ("validation", "test"), ("val", "test")])
def test_a_folder_with_splits(tmp_path, held):
    for number, name in enumerate(("train", *held)):
        write_class_folders(tmp_path / "set" / name, {"a": 10 - number, "b": 20}, seed=number)
    images = load_images(tmp_path / "set", tmp_path / "root", 10)
    parts = [split.labels.bincount().tolist() for split in (images.train, images.validation, images.test)]
    assert parts == ([[9, 18], [1, 2], [9, 20]] if len(held) == 1 else [[10, 20], [9, 20], [8, 20]])


def pair(folder: Path, *options) -> Path:
    """Two sound classes, a and b, of five images."""
    write_class_folders(folder, {"a": 5, "b": 5}, *options)
    return folder


def splits(folder: Path, **counts) -> None:
    """For ``train_a=5``: five images in train/a."""
    write_class_folders(folder, {name.replace("_", "/"): count for name, count in counts.items()})


BAD_FOLDERS = {
    "no class folders": lambda f: None,
    "only the class 'a'; accepted: two or more": lambda f: write_class_folders(f, {"a": 5}),
    "empty has no images": lambda f: write_class_folders(f, {"a": 5, "b": 5, "empty": 0}),
    "notes.txt is no folder; accepted": lambda f: touch(pair(f) / "notes.txt"),
    "more is a folder": lambda f: (pair(f) / "b" / "more").mkdir(),
    "Thumbs.db is damaged or no image": lambda f: touch(pair(f) / "b" / "Thumbs.db"),
    "001.png is damaged or no image": lambda f: touch(pair(f) / "a" / "001.png", b""),
    "004.png is damaged or no image": lambda f: cut(pair(f) / "b" / "004.png"),
    "002.jpg is damaged or no image": lambda f: cut(pair(f, (40, 40), "jpg") / "a" / "002.jpg"),
    "gone.png is missing: a link": lambda f: (pair(f) / "a" / "gone.png").symlink_to(f / "nowhere.png"),
    "deep.png has pixels of kind I;16": lambda f: deep(pair(f) / "a" / "deep.png"),
    "class 'b' of .* has only 2 images; accepted: 3 or more": lambda f: write_class_folders(f, {"a": 5, "b": 2}),
    "train alone": lambda f: splits(f, train_a=5, train_b=5),
    "extra stands beside train": lambda f: splits(f, train_a=5, train_b=5, test_a=1, extra_a=1),
    "both validation and val": lambda f: splits(f, train_a=5, val_a=5, validation_a=1),
    "class 'c' is in only one of": lambda f: splits(f, train_a=5, train_b=5, test_a=1, test_b=1, test_c=1),
    "class 'b' .* has only 1 image; accepted: 2 or more": lambda f: splits(f, train_a=5, train_b=1, test_a=1, test_b=1),
}


def touch(path: Path, data: bytes = b"some bytes") -> None:
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def deep(path: Path) -> None:
    Image.fromarray(np.full((9, 9), 40_000, dtype=np.uint16)).save(path)


@pytest.mark.parametrize("message", BAD_FOLDERS)
def test_bad_folders_are_refused_in_one_line_that_names_the_fault(tmp_path, message):
    (tmp_path / "set").mkdir()
    BAD_FOLDERS[message](tmp_path / "set")
    with pytest.raises(InputError, match=message) as caught:
        load_images(tmp_path / "set", tmp_path / "root", 8)
    assert "\n" not in str(caught.value)
    left = [path.name for path in (tmp_path / "root").rglob("*") if path.is_file()]
    assert left in ([], [".lock"])  # nothing half-made


# ---------------------------------------------------------------------------------------------- pictures
def test_pictures_become_square_rgb():
    grey = encoded(np.full((20, 30), 77, dtype=np.uint8), "PNG")
    assert (decode(grey, "grey", 8) == 77).all() and decode(grey, "grey", 8).shape == (8, 8, 3)
    assert decode(grey, "grey").shape == (20, 30, 3)
    wide = np.zeros((16, 48, 3), dtype=np.uint8)
    wide[:, 16:32] = 255  # the middle square is white
    assert (decode(encoded(wide, "PNG"), "wide", 16) == 255).all()
    turned = Image.new("RGB", (8, 8), (0, 0, 255))
    turned.paste((255, 0, 0), (0, 0, 8, 4))  # red above blue; the note says that it was turned upside down
    exif = Image.Exif()
    exif[0x0112] = 3
    picture = decode(encoded(np.asarray(turned), "PNG", exif=exif), "turned", 8)
    assert picture[7, 0].tolist() == [255, 0, 0] and picture[0, 0].tolist() == [0, 0, 255]


def test_a_photograph_is_scaled_alike_by_the_quick_way_for_jpeg():
    image = random_images(1, 8)[0].repeat(32, 0).repeat(32, 1)
    plain = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.LANCZOS)).astype(int)
    quick = decode(encoded(image, "JPEG", quality=95), "photo", 32).astype(int)
    assert np.abs(quick - plain).mean() < 6


def test_pictures_come_in_order_from_several_threads(monkeypatch):
    monkeypatch.setattr("minigated.data.pictures.BLOCK", 7)
    read = lambda number: np.full((2, 2, 3), number, dtype=np.uint8)
    blocks = list(decode_blocks(iter(range(20)), 20, read, "test"))
    assert [len(block) for block in blocks] == [7, 7, 6]
    assert np.concatenate(blocks)[:, 0, 0, 0].tolist() == list(range(20))

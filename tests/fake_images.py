"""Small data sets in the layouts of the real ones."""

import hashlib
import io
import json
import pickle
import tarfile

import numpy as np
from PIL import Image

from minigated.data import cifar, mini_imagenet

GRID = 10  # 100 images a batch instead of 10,000


def random_images(count: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def fake_cifar10(monkeypatch) -> tuple[np.ndarray, np.ndarray]:
    """600 images and labels, six batches of 100, that from now on count as the official release."""
    images = random_images(6 * GRID**2, 4).repeat(8, 1).repeat(8, 2)  # of few colours: quick to pack
    labels = np.random.default_rng(1).permuted(np.tile(np.arange(100) % 10, (6, 1)), axis=1).ravel()
    sums = {}
    for number, name in enumerate(cifar.BINARY_MD5):
        batch = slice(number * 100, (number + 1) * 100)
        records = b"".join(
            bytes([label]) + image.transpose(2, 0, 1).tobytes() for image, label in zip(images[batch], labels[batch])
        )
        sums[name] = hashlib.md5(records).hexdigest()
    for name, value in {"GRID": GRID, "HELD_OUT": 5, "BINARY_MD5": sums}.items():
        monkeypatch.setattr(cifar, name, value)
    return images, labels


def write_packed_cifar10(folder, images, labels) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate(cifar.BINARY_MD5):
        picture = np.zeros((GRID * 32, GRID * 32, 3), dtype=np.uint8)
        for cell, image in enumerate(images[number * 100 : (number + 1) * 100]):
            row, column = divmod(cell, GRID)
            picture[row * 32 : (row + 1) * 32, column * 32 : (column + 1) * 32] = image
        Image.fromarray(picture).save(folder / f"{name}.webp", lossless=True, method=0)
    np.save(folder / "train_labels.npy", labels[:500].astype(np.uint8))
    np.save(folder / "test_labels.npy", labels[500:].astype(np.uint8))


def cifar10_archive(images, labels, CIFAR10, monkeypatch) -> bytes:
    """The Python release as a .tar.gz, its hashes put where torchvision and the package look for them."""
    files = {"batches.meta": {"label_names": cifar.CLASSES}}
    for number, name in enumerate(cifar.BINARY_MD5):
        batch = slice(number * 100, (number + 1) * 100)
        planes = images[batch].transpose(0, 3, 1, 2).reshape(100, -1)
        files[name] = {"data": planes, "labels": labels[batch].tolist()}
    packed = {name: pickle.dumps(content) for name, content in files.items()}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, data in packed.items():
            entry = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    md5 = {name: hashlib.md5(data).hexdigest() for name, data in packed.items()}
    names = list(cifar.BINARY_MD5)
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [[names[5], md5[names[5]]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.getvalue()).hexdigest())
    monkeypatch.setattr(cifar, "ARCHIVE_SHA256", hashlib.sha256(archive.getvalue()).hexdigest())
    return archive.getvalue()


def encoded(image: np.ndarray, kind: str = "WEBP", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def small_mini_imagenet(monkeypatch, classes=3, train=6, held_out=2) -> None:
    """From now on Mini-ImageNet has that many classes, and images a class; one is held out of train."""
    counts = {"train": classes * train, "held out": classes * held_out}
    for name, value in {"CLASSES": classes, "COUNTS": counts, "HELD_OUT": 1}.items():
        monkeypatch.setattr(mini_imagenet, name, value)


def write_packed_mini_imagenet(folder, classes=3, train=6, held_out=2) -> np.ndarray:
    """Two shards, the images of a class together, as in the real copy. Returns the images in order."""
    folder.mkdir(parents=True)
    each = train + held_out
    images = random_images(classes * each, 8, seed=2).repeat(8, 1).repeat(8, 2)
    shards, index = [b"", b""], {name: [] for name in ("shard", "offset", "length", "label", "split", "name")}
    for number, image in enumerate(images):
        shard = int(number >= len(images) // 2)
        data = encoded(image, lossless=True)
        row = (shard, len(shards[shard]), len(data), number // each, "train" if number % each < train else "val",
               f"n{number // each:08d}_{number}.jpg")  # fmt: skip
        for name, value in zip(index, row):
            index[name].append(value)
        shards[shard] += data
    for number, data in enumerate(shards):
        (folder / f"images_{number:02d}.bin").write_bytes(data)
    kinds = {"shard": np.uint8, "offset": np.uint32, "length": np.uint32, "label": np.int16}
    np.savez(folder / "index.npz", **{name: np.array(column, dtype=kinds.get(name)) for name, column in index.items()})
    names = ["bird, little bird", "cat", "dog"]
    lines = [f'{label},n{label:08d},"{name}"' for label, name in enumerate(names[:classes])]
    (folder / "classes.csv").write_text("\n".join(["label,wnid,words", *lines]) + "\n")
    return images


def parquet_file(images, labels, classes: list[str]) -> bytes:
    """One file as the data set's own library writes it; needs pyarrow."""
    import pyarrow
    from pyarrow import parquet

    rows = [{"bytes": encoded(image, "PNG"), "path": f"{number}.png"} for number, image in enumerate(images)]
    note = {"info": {"features": {"label": {"names": classes, "_type": "ClassLabel"}}}}
    schema = pyarrow.schema(
        {"image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}), "label": pyarrow.int64()},
        metadata={"huggingface": json.dumps(note)},
    )
    file = io.BytesIO()
    table = pyarrow.table({"image": rows, "label": [int(label) for label in labels]}, schema=schema)
    parquet.write_table(table, file, row_group_size=5)
    return file.getvalue()


def write_class_folders(folder, classes: dict[str, int], size=(12, 10), kind="png", seed=3) -> None:
    """`classes`: name -> number of images of `size` (width, height)."""
    draw = np.random.default_rng(seed)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            image = draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(image).save(folder / name / f"{number:03d}.{kind}")

"""The embedded sample, the memory-mapped cache, and batches as a function of (seed, step)."""

import errno
import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from fake_images import fake_cifar10, random_images, write_class_folders, write_packed_cifar10
from PIL import Image

from minigated.__main__ import main
from minigated.data import ImageBatches, ImageSplit, describe, load_images, prepare
from minigated.data import image_cache as cache_module
from minigated.data import image_sample as sample_module
from minigated.data import images as images_module
from minigated.data import sample_images as recipe
from minigated.data.cifar import pack_grid
from minigated.data.image_cache import Reading, Statistics, cached, hash_of
from minigated.data.splits import TEST, TRAIN, VALIDATION, hold_out
from minigated.errors import InputError

# Written down, not computed: a split or a record's seed must mean the same on every machine and in every version.
HELD = [14, 16, 19, 20, 25, 26, 49, 55, 67, 68, 69, 74]
FIRST_EPOCH = [6, 7, 9, 5, 1, 4, 8, 3, 0, 2]


@pytest.fixture(scope="module")
def sample():
    return load_images("cifar10-sample")


# ---------------------------------------------------------------------------------------------- the sample
def test_the_sample(sample):
    assert [len(s) for s in (sample.train, sample.validation, sample.test)] == [1800, 200, 500]
    for split, each in ((sample.train, 180), (sample.validation, 20), (sample.test, 50)):
        assert split.labels.bincount().tolist() == [each] * 10
        assert split.images.shape == (each * 10, 32, 32, 3) and split.images.dtype == torch.uint8
    assert sample.classes[3] == "cat" and sample.size == 32 and sample.sha256 == sample_module.SHA256
    assert sample.sha256 == "3e5d889754c369bd7a0a483b77b408897ac6000af1c958d24714190ba74c6670"
    assert sample_module.FILE.stat().st_size < 5_000_000
    pixels = sample.train.images.double() / 255
    torch.testing.assert_close(pixels.mean((0, 1, 2)), torch.tensor(sample.mean).double(), atol=1e-6, rtol=0)
    deviation = pixels.std((0, 1, 2), unbiased=False)
    torch.testing.assert_close(deviation, torch.tensor(sample.std).double(), atol=1e-6, rtol=0)


def test_no_image_of_the_sample_comes_twice(sample):
    splits = (sample.train, sample.validation, sample.test)
    seen = {image.numpy().tobytes() for split in splits for image in split.images}
    assert len(seen) == 2500


def test_a_changed_sample_is_refused(tmp_path):
    images, _ = recipe.choose(load_images("cifar10-sample"))
    images[17, 3, 4, 1] ^= 1  # the last bit of one value
    Image.fromarray(pack_grid(images, 50, 50)).save(tmp_path / "s.webp", "PNG", compress_level=0)
    with pytest.raises(InputError, match="s.webp has pixels of sha256 .* expected 3e5d.*restore"):
        sample_module.sample_arrays(tmp_path / "s.webp")
    (tmp_path / "s.webp").write_bytes((tmp_path / "s.webp").read_bytes()[:100_000])
    with pytest.raises(InputError, match="s.webp is damaged"):
        sample_module.sample_arrays(tmp_path / "s.webp")
    Image.fromarray(pack_grid(images[:100], 10, 10)).save(tmp_path / "s.webp", "PNG")
    with pytest.raises(InputError, match=r"s.webp has shape \(320, 320, 3\)"):
        sample_module.sample_arrays(tmp_path / "s.webp")


def test_the_sample_without_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match="need Pillow.*pip install pillow"):
        load_images("cifar10-sample")


def test_the_recipe_takes_the_first_of_each_class_in_turn(sample):
    images, labels = recipe.choose(sample, (20, 10, 30))
    assert labels.tolist() == list(range(10)) * 6
    for split, start, each in ((sample.train, 0, 2), (sample.validation, 20, 1), (sample.test, 30, 3)):
        for label in range(10):
            wanted = split.images[split.labels == label][:each].numpy()
            np.testing.assert_array_equal(images[start + label : start + 10 * each : 10], wanted)
    whole = recipe.choose(sample)
    assert hash_of([whole[0]], [whole[1]]) == sample_module.SHA256  # the sample chosen from itself is itself
    with pytest.raises(InputError, match="class 'airplane' .* has 20 images; accepted: 30 or more"):
        recipe.choose(sample, (20, 300, 30))


def test_the_recipe_makes_the_file_from_the_full_set(tmp_path, monkeypatch, capsys):
    images, labels = fake_cifar10(monkeypatch)
    write_packed_cifar10(tmp_path / "cifar10", images, labels)
    for name, value in {"GRID": 10, "COUNTS": (50, 20, 30), "FILE": tmp_path / "made.webp"}.items():
        monkeypatch.setattr(recipe, name, value)
    monkeypatch.setattr(recipe.choose, "__defaults__", ((50, 20, 30),))
    assert recipe.main(["--root", str(tmp_path), "--write"]) == 1 and "NOT as" in capsys.readouterr().out
    full = load_images("cifar10", tmp_path)
    chosen, _ = recipe.choose(full)
    picture = sample_module.decode(tmp_path / "made.webp", "made")
    np.testing.assert_array_equal(sample_module.unpack_grid(picture, 10, 10), chosen)
    assert recipe.main(["--root", os.devnull]) == 2


# ---------------------------------------------------------------------------------------------- the cache
def reading(images, parts, blocks=None, size=4) -> Reading:
    labels = np.arange(len(images)) % 2
    return Reading("a test", ["a", "b"], size, labels, np.array(parts), blocks or (lambda: iter([images])))


def test_the_cache_is_in_the_order_of_the_splits(tmp_path):
    images, parts = random_images(6, 4), [TEST, TRAIN, VALIDATION, TRAIN, TEST, TRAIN]
    blocks = lambda: iter([images[:1], images[1:5], images[5:]])
    note, pixels, labels = cached(tmp_path / "c", "x", lambda: reading(images, parts, blocks))
    np.testing.assert_array_equal(pixels, images[[1, 3, 5, 2, 0, 4]])
    assert labels.tolist() == [1, 1, 1, 0, 0, 0] and note["counts"] == [3, 1, 2]
    train = images[[1, 3, 5]] / 255
    np.testing.assert_allclose(note["mean"], train.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(note["std"], train.std((0, 1, 2)), atol=1e-6)
    assert sorted(os.listdir(tmp_path / "c")) == [".lock", "images.json", "images.npy", "labels.npy"]
    pixels[0] = 0  # stays in memory
    again = cached(tmp_path / "c", "x", lambda: pytest.fail("read again"))
    assert again[0] == note and again[1][0].any() and isinstance(again[1], np.memmap)


def test_a_damaged_or_outdated_cache_is_made_again(tmp_path, monkeypatch):
    images, calls = random_images(4, 4), []

    def read():
        calls.append(1)
        return reading(images, [TRAIN] * 4)

    def opened(stamp=""):
        return cached(tmp_path / "c", "x", read, stamp)

    opened(), opened()
    assert len(calls) == 1
    for harm in (
        lambda: os.truncate(tmp_path / "c" / "images.npy", 150),
        lambda: (tmp_path / "c" / "labels.npy").unlink(),
        lambda: (tmp_path / "c" / "images.json").write_text('{"format":'),
        lambda: (tmp_path / "c" / "images.json").write_text("[]"),
        lambda: monkeypatch.setattr(cache_module, "FORMAT", 2),
    ):
        harm()
        before = len(calls)
        np.testing.assert_array_equal(opened()[1], images)
        assert len(calls) == before + 1
        assert opened() and len(calls) == before + 1
    opened("changed"), opened("changed")
    assert len(calls) == 7


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError, OSError])
def test_an_interrupted_build_leaves_nothing_half_made(tmp_path, error):
    def blocks():
        yield random_images(2, 4)
        raise error(errno.EIO, "a fault", "somewhere") if error is OSError else error("a fault")

    with pytest.raises((error, InputError)):
        cached(tmp_path / "c", "x", lambda: reading(random_images(4, 4), [TRAIN] * 4, blocks))
    assert os.listdir(tmp_path / "c") == [".lock"]
    note, pixels, _ = cached(tmp_path / "c", "x", lambda: reading(random_images(4, 4), [TRAIN] * 4))
    np.testing.assert_array_equal(pixels, random_images(4, 4))


def test_an_interrupted_rebuild_does_not_leave_the_old_note_beside_new_pixels(tmp_path, monkeypatch):
    folder = tmp_path / "c"
    cached(folder, "x", lambda: reading(random_images(4, 4), [TRAIN] * 4), "old")
    replace = os.replace

    def once(source, target):
        replace(source, target)
        raise KeyboardInterrupt  # after the images, before the labels and the note

    monkeypatch.setattr(cache_module.os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        cached(folder, "x", lambda: reading(random_images(4, 4, seed=9), [TRAIN] * 4), "new")
    monkeypatch.undo()
    _, pixels, _ = cached(folder, "x", lambda: reading(random_images(4, 4), [TRAIN] * 4), "old")
    np.testing.assert_array_equal(pixels, random_images(4, 4))


def test_a_full_disk_gives_one_line(tmp_path, monkeypatch):
    build = lambda: cached(tmp_path / "c", "x", lambda: reading(random_images(4, 4), [TRAIN] * 4))

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", full)
    with pytest.raises(InputError, match="^cannot write .*images.npy.part: No space left on device$"):
        build()
    assert os.listdir(tmp_path / "c") == [".lock"]
    monkeypatch.undo()
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match="images take 0 MB, but .* has 0 MB free; choose another folder"):
        build()


def test_as_many_images_as_labels(tmp_path):
    for count in (3, 5):
        with pytest.raises(InputError, match=f"has {count} images.* but 4 labels"):
            blocks = functools.partial(iter, [random_images(count, 4)])
            cached(tmp_path / "c", "x", functools.partial(reading, random_images(4, 4), [TRAIN] * 4, blocks))


def test_statistics_over_blocks_are_those_of_all():
    statistics, images = Statistics(), random_images(7, 5)
    statistics.add(images[:3]), statistics.add(images[3:])
    mean, deviation = statistics.mean_and_deviation()
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(deviation, (images / 255).std((0, 1, 2)), atol=1e-6)


def test_what_is_held_out_is_balanced_fixed_and_only_train():
    labels = np.arange(100) % 4
    parts = np.where(np.arange(100) < 80, TRAIN, TEST)
    held = hold_out(labels, parts, 3)
    assert np.bincount(labels[held == VALIDATION]).tolist() == [3] * 4
    assert (held[80:] == TEST).all() and (parts != VALIDATION).all()
    assert np.flatnonzero(held == VALIDATION).tolist() == HELD
    held = hold_out(labels, parts, np.arange(4))
    assert np.bincount(labels[held == VALIDATION], minlength=4).tolist() == [0, 1, 2, 3]


# ---------------------------------------------------------------------------------------------- batches
@pytest.fixture
def split():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 2, 2, 3).contiguous()
    return ImageSplit(images, torch.arange(10))


def once_an_epoch(batches, epochs=3) -> bool:
    """Whether every image comes once in every epoch's worth of positions."""
    size, steps = len(batches.split), epochs * len(batches.split) // batches.batch
    drawn = torch.cat([batches.at(step)[1] for step in range(steps)])
    return all(part.sort()[0].tolist() == list(range(size)) for part in drawn.split(size) if len(part) == size)


@pytest.mark.parametrize("batch", [1, 3, 5, 10, 15])
def test_every_image_once_an_epoch(split, batch):
    assert once_an_epoch(ImageBatches(split, batch), epochs=6)


def test_drawing_with_replacement_is_seen(split, monkeypatch):
    drawn = lambda batches, step: np.random.default_rng(step).integers(0, 10, batches.batch)
    monkeypatch.setattr(ImageBatches, "rows", drawn)
    assert not once_an_epoch(ImageBatches(split, 5))


def test_batches_are_a_function_of_seed_and_step(split):
    batches, other = ImageBatches(split, 4, seed=3), ImageBatches(split, 4, seed=3)
    backwards = [other.at(step)[1] for step in range(20, -1, -1)][::-1]  # epochs visited in another order
    for step in range(21):
        images, labels = batches.at(step)
        assert labels.equal(backwards[step]) and labels.dtype == torch.int64
        assert images[:, 0, 0, 0].long().equal(labels) and images.shape == (4, 2, 2, 3)
    epochs = [ImageBatches(split, 10, seed).at(step)[1].tolist() for seed in (0, 1) for step in (0, 1)]
    assert len(set(map(tuple, epochs))) == 4
    assert ImageBatches(split, 10, 0).at(0)[1].tolist() == FIRST_EPOCH


def disjoint(batches, step, world) -> bool:
    parts = [batches.at(step, rank, world)[1].tolist() for rank in range(world)]
    return sum(parts, []) == batches.at(step)[1].tolist() and len(set(sum(parts, []))) == batches.batch


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_parts_of_the_ranks_are_disjoint_and_the_batch_of_one_process(world):
    split = ImageSplit(torch.zeros(40, 2, 2, 3, dtype=torch.uint8), torch.arange(40))
    assert all(disjoint(ImageBatches(split, 8, seed=1), step, world) for step in range(5))


def test_ranks_that_draw_the_same_part_are_seen(monkeypatch):
    split = ImageSplit(torch.zeros(40, 2, 2, 3, dtype=torch.uint8), torch.arange(40))
    monkeypatch.setattr(images_module, "share", lambda batch, rank, world: slice(0, batch // world))
    assert not disjoint(ImageBatches(split, 8), 0, 2)


def test_in_order_for_evaluation(split):
    batches = ImageBatches(split, 4)
    assert [labels.tolist() for _, labels in batches.sequential()] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(list(batches.sequential(2))) == 2 and batches.steps_per_epoch == 2.5


def test_wrong_batches_and_splits(split):
    wrong = {
        "batch 0 is too small": lambda: ImageBatches(split, 0),
        "the split has no images": lambda: ImageBatches(ImageSplit(split.images[:0], split.labels[:0])),
        "step -1 is out of range": lambda: ImageBatches(split, 2).at(-1),
        "3 processes cannot share a batch of 4": lambda: ImageBatches(split, 4).at(0, 0, 3),
        "rank 2 is outside the 2 processes": lambda: ImageBatches(split, 4).at(0, 2, 2),
        "images are torch.float32": lambda: ImageSplit(split.images.float(), split.labels),
        r"images are torch.uint8 of shape \(10, 3, 2, 2\)": lambda: ImageSplit(
            split.images.permute(0, 3, 1, 2), split.labels
        ),
        r"labels are torch.int64 of shape \(9,\).*the 10 images": lambda: ImageSplit(split.images, split.labels[:9]),
        "labels are torch.int32": lambda: ImageSplit(split.images, split.labels.int()),
    }
    for message, call in wrong.items():
        with pytest.raises(InputError, match=message):
            call()


def test_a_split_moves_to_a_device(split, device):
    images, labels = ImageBatches(split.to(device), 4).at(2)
    assert images.device.type == device and labels.cpu().equal(ImageBatches(split, 4).at(2)[1])


# ---------------------------------------------------------------------------------------------- by name
def test_wrong_names_and_sizes(tmp_path):
    (tmp_path / "file.png").write_bytes(b"x")
    wrong = {
        ("cifar100", None): "'cifar100' is no folder and no known set.*cifar10-sample, mini-imagenet, or a folder",
        (str(tmp_path / "file.png"), None): "is a file, no folder",
        ("cifar10-sample", 64): "cifar10-sample has images of 32 x 32, not 64",
        ("cifar10", 16): "cifar10 has images of 32 x 32, not 16",
        ("mini-imagenet", 0): "size 0 is too small",
    }
    for (name, size), message in wrong.items():
        with pytest.raises(InputError, match=message):
            load_images(name, tmp_path, size)


def test_describe(sample, tmp_path, capsys):
    facts = prepare("cifar10-sample")
    assert facts["sha256"] == sample.sha256 and facts["classes"] == 10
    assert main(["data", "cifar10-sample"]) == 0
    page = capsys.readouterr().out
    for part in ("1,800 / 200 / 500 images", sample.sha256, "32 x 32, 10 classes", "state none", "Krizhevsky", "2009"):
        assert part in page
    write_class_folders(tmp_path / "pets", {"cat": 4, "dog": 5})
    assert main(["data", str(tmp_path / "pets"), "--root", str(tmp_path / "root"), "--size", "8"]) == 0
    assert "8 x 8, 2 classes" in capsys.readouterr().out
    assert main(["data", str(tmp_path / "none"), "--root", str(tmp_path / "root")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_describe_notices_a_changed_pixel(tmp_path):
    write_class_folders(tmp_path / "pets", {"cat": 4, "dog": 5})
    place = load_images(tmp_path / "pets", tmp_path / "root", 8).place
    describe(str(tmp_path / "pets"), tmp_path / "root", 8)
    with open(place / "images.npy", "r+b") as file:
        file.seek(1000)
        value = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([value ^ 1]))
    with pytest.raises(InputError, match="has sha256 .*, expected .*; delete the folder"):
        describe(str(tmp_path / "pets"), tmp_path / "root", 8)


def test_the_import_takes_neither_torchvision_nor_pillow():
    script = (
        "import torch, sys; before = set(sys.modules)\n"
        "import minigated.data\n"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"PIL", "torchvision", "tqdm", "pyarrow"} & set(eval(result.stdout)), result.stdout


def test_the_note_is_plain_json(tmp_path):
    write_class_folders(tmp_path / "pets", {"cat": 4, "dog": 5})
    images = load_images(tmp_path / "pets", tmp_path / "root", 8)
    note = json.loads((images.place / "images.json").read_text())
    assert note["classes"] == images.classes == ["cat", "dog"] and note["sha256"] == images.sha256
    assert note["counts"] == [5, 2, 2] and note["format"] == 1 and note["size"] == 8

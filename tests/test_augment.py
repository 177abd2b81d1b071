"""Augmentation in batches, against plain loops over single images and against Pillow."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from minigated.data import Augment, AugmentConfig, ImageBatches, load_images
from minigated.data import augment as augment_module
from minigated.data import rand_augment as rand_module
from minigated.data.augment import COLUMNS, normalise
from minigated.data.augment_parts import below, beta_quantiles, box, noise, quantile
from minigated.data.rand_augment import MOVE, NONE, OPERATIONS, apply_operations
from minigated.errors import InputError

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
FULL = {"rand_layers": 2, "mixup": 0.8, "cutmix": 1.0, "erase": 0.25, "smoothing": 0.1}
OFF = {"padding": 0, "flip": False}


def config(**options) -> AugmentConfig:
    return AugmentConfig(**{"classes": 5, "mean": MEAN, "std": STD} | options)


def batch(count=8, height=9, width=7, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels), torch.arange(count) % 5


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    """[24, 32, 32, 3] uint8, real ones."""
    return load_images("cifar10-sample").train.images[:24]


def pixels_of(output: torch.Tensor) -> np.ndarray:
    """Undoes the normalising: [B, h, w, 3], values 0 to 255."""
    back = output.permute(0, 2, 3, 1) * torch.tensor(STD) + torch.tensor(MEAN)
    return (255 * back).numpy()


def column(draws: torch.Tensor, name: str) -> np.ndarray:
    return draws[:, COLUMNS.index(name)].double().numpy()


# ---------------------------------------------------------------------------------------------- the whole
def test_normalised_and_channels_last():
    images, labels = batch()
    output, shares = Augment(config(**OFF))(images, labels, (0, 0))
    wanted = (images.double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(output.double(), wanted.permute(0, 3, 1, 2), atol=1e-5, rtol=0)
    assert output.shape == (8, 3, 9, 7) and output.dtype == torch.float32
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert shares.equal(torch.nn.functional.one_hot(labels, 5).float())
    assert Augment(config(**FULL)).eval_transform(images).equal(output)
    assert normalise(images, MEAN, STD).equal(output)


@pytest.mark.parametrize("options", [{}, FULL, {"padding_mode": "zero", "cutmix": 1.0}], ids=["plain", "full", "zero"])
def test_the_same_numbers_give_the_same_images(options, device):
    images, labels = batch(6, 12, 12)
    given = images.clone()
    augment = Augment(config(**options))
    first, shares = augment(images, labels, (3, 7))
    for other in (augment, Augment(config(**options))):  # no state is carried along
        again, again_shares = other(images.to(device), labels.to(device), (3, 7))
        torch.testing.assert_close(again.cpu(), first, atol=0.03, rtol=0)  # a rounding may fall otherwise on a GPU
        torch.testing.assert_close(again_shares.cpu(), shares)
    assert device != "cpu" or again.equal(first)
    for source in ((3, 8), (4, 7), (3, 7, 1)):
        assert not augment(images.to(device), labels.to(device), source)[0].cpu().equal(first)
    assert images.equal(given)


def test_a_generator_is_a_source_too():
    images, labels = batch()
    augment = Augment(config(**FULL))
    one, two, three = (augment(images, labels, torch.Generator().manual_seed(seed))[0] for seed in (5, 5, 6))
    assert one.equal(two) and not one.equal(three)


def test_the_numbers_are_written_down():
    numbers = Augment(config()).draw(2, (0, 0))
    assert numbers.shape == (2, len(COLUMNS)) and numbers.dtype == torch.float32
    # A record's seed must mean the same on every machine and in every version.
    assert (numbers[0, :3] * 2**24).long().tolist() == [5718520, 6507037, 6508064]


def test_switching_a_part_off_leaves_the_others_numbers():
    plain, full = Augment(config()).draw(16, (1, 2)), Augment(config(**FULL)).draw(16, (1, 2))
    assert full[:, : plain.shape[1]].equal(plain)
    images, labels = batch(16)
    mixed_less = FULL | {"mix_chance": 0.5}
    with_mix, _ = Augment(config(**mixed_less))(images, labels, (1, 2))
    without, _ = Augment(config(**mixed_less | {"mixup": 0.0, "cutmix": 0.0}))(images, labels, (1, 2))
    alone = torch.from_numpy(column(full, "mix") >= 0.5)
    assert 0 < alone.sum() < 16 and with_mix[alone].equal(without[alone])


def test_it_compiles_without_a_break_and_gives_the_same():
    images, labels = batch(8, 12, 12)
    augment = Augment(config(**FULL))
    draws = augment.draw(8, (0, 1))
    torch._dynamo.reset()
    compiled = torch.compile(augment.transform, backend="eager", fullgraph=True)  # a look at a value would break it
    for given, wanted in zip(compiled(images, labels, draws), augment.transform(images, labels, draws)):
        torch.testing.assert_close(given, wanted, atol=1e-5, rtol=0)


def test_under_autocast_nothing_is_rounded():
    images, labels = batch(8, 12, 12)
    augment = Augment(config(**FULL))
    wanted = augment(images, labels, (0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        given = augment(images, labels, (0, 1))
    assert all(a.equal(b) for a, b in zip(given, wanted))


# ---------------------------------------------------------------------------------------------- crop and flip
def cropped(image: np.ndarray, numbers, padding: int, mode: str, flip: bool) -> np.ndarray:
    height, width, _ = image.shape
    around = ((padding, padding), (padding, padding), (0, 0))
    padded = np.pad(image, around, mode="reflect") if mode == "reflect" else np.pad(image, around)
    top, left = (int(number * (2 * padding + 1)) for number in numbers[:2])
    out = padded[top : top + height, left : left + width]
    return out[:, ::-1] if flip and numbers[2] >= 0.5 else out


def crop_error(augment: Augment) -> float:
    images, labels = batch(40)
    draws = augment.draw(40, (0, 0))
    wanted = [cropped(image, row, augment.config.padding, augment.config.padding_mode, augment.config.flip)
              for image, row in zip(images.numpy(), draws.double().numpy())]  # fmt: skip
    return float(np.abs(pixels_of(augment.transform(images, labels, draws)[0]) - np.stack(wanted)).max())


@pytest.mark.parametrize("mode", ["reflect", "zero"])
@pytest.mark.parametrize(("padding", "flip"), [(4, True), (2, False), (6, True), (0, True)])
def test_crop_and_flip_are_those_of_a_loop(mode, padding, flip):
    assert crop_error(Augment(config(padding=padding, padding_mode=mode, flip=flip))) < 1e-3


def test_planted_faults_of_the_crop_are_seen(monkeypatch):
    augment = Augment(config())
    repeated = lambda index, side: torch.where(index < 0, -1 - index, index).clamp(max=side - 1)
    with monkeypatch.context() as patch:
        patch.setattr(augment_module, "_reflect", repeated)  # the border pixel comes twice
        assert crop_error(augment) > 100
    with monkeypatch.context() as patch:
        patch.setattr(augment_module, "below", lambda uniform, limit: (uniform * (limit - 1)).long())
        assert crop_error(augment) > 100


# ---------------------------------------------------------------------------------------------- RandAugment
def applied(images: torch.Tensor, name: str, level: float, sign: float = 1.0) -> torch.Tensor:
    numbers = torch.full((len(images),), OPERATIONS.index(name))
    level, sign = (torch.full((len(images),), value) for value in (level, sign))
    return apply_operations(images, numbers, level, sign, torch.tensor([100.0, 50.0, 0.0]))


def solarize_add(image: Image.Image, add: int) -> Image.Image:
    return image.point([min(255, value + add) if value < 128 else value for value in range(256)] * 3)


PILLOW = {
    "autocontrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "invert": lambda image, level, sign: ImageOps.invert(image),
    "posterize": lambda image, level, sign: ImageOps.posterize(image, 4 - int(4 * level)),
    "solarize": lambda image, level, sign: ImageOps.solarize(image, 256 - int(256 * level)),
    "solarize_add": lambda image, level, sign: solarize_add(image, int(110 * level)),
    "contrast": lambda image, level, sign: ImageEnhance.Contrast(image).enhance(1 + sign * 0.9 * level),
    "brightness": lambda image, level, sign: ImageEnhance.Brightness(image).enhance(1 + sign * 0.9 * level),
    "color": lambda image, level, sign: ImageEnhance.Color(image).enhance(1 + sign * 0.9 * level),
    "sharpness": lambda image, level, sign: ImageEnhance.Sharpness(image).enhance(1 + sign * 0.9 * level),
}


def pillow_error(photographs, name: str, level: float, sign: float) -> int:
    wanted = [np.asarray(PILLOW[name](Image.fromarray(image), level, sign)) for image in photographs.numpy()]
    return int(np.abs(applied(photographs, name, level, sign).numpy().astype(int) - np.stack(wanted)).max())


@pytest.mark.parametrize("name", PILLOW)
def test_operations_on_values_are_pillows(photographs, name):
    worst = max(pillow_error(photographs, name, level, sign) for level in (0.3, 0.7, 0.95) for sign in (1.0, -1.0))
    # Pillow cuts fractions off where this rounds, and contrast starts from a mean that is itself cut.
    assert worst <= {"contrast": 2, "color": 2, "sharpness": 2, "autocontrast": 1, "brightness": 1}.get(name, 0)


def test_planted_faults_of_the_operations_are_seen(photographs, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(rand_module, "GREY", (1 / 3, 1 / 3, 1 / 3))
        assert pillow_error(photographs, "color", 0.7, 1.0) > 5
    with monkeypatch.context() as patch:
        patch.setattr(rand_module, "_cells", lambda images: torch.arange(len(images)).view(-1, 1, 1, 1) * 256 + images)
        assert pillow_error(photographs, "autocontrast", 0.7, 1.0) > 5  # one table for three channels


def moved(image: np.ndarray, name: str, strength: float, fill) -> np.ndarray:
    """One image by loops over its pixels: where each comes from, and what lies there by linear interpolation."""
    height, width, _ = image.shape
    out = np.zeros(image.shape)
    angle = math.radians(30 * strength)

    def value(row: int, column: int):
        return image[row, column] if 0 <= row < height and 0 <= column < width else fill

    for row in range(height):
        for col in range(width):
            y, x = row - (height - 1) / 2, col - (width - 1) / 2
            from_y, from_x = {
                "rotate": (math.sin(angle) * x + math.cos(angle) * y, math.cos(angle) * x - math.sin(angle) * y),
                "shear_x": (y, x + 0.3 * strength * y),
                "shear_y": (y + 0.3 * strength * x, x),
                "translate_x": (y, x + 0.45 * strength * width),
                "translate_y": (y + 0.45 * strength * height, x),
            }[name]
            from_y, from_x = from_y + (height - 1) / 2, from_x + (width - 1) / 2
            y, x = math.floor(from_y), math.floor(from_x)
            b, a = from_y - y, from_x - x
            out[row, col] = ((1 - b) * ((1 - a) * value(y, x) + a * value(y, x + 1))
                             + b * ((1 - a) * value(y + 1, x) + a * value(y + 1, x + 1)))  # fmt: skip
    return out


@pytest.mark.parametrize("name", MOVE)
def test_operations_that_move_pixels_are_those_of_a_loop(name):
    images, _ = batch(3, 9, 14)  # not square: the sides' ratio counts
    fill = np.array([100.0, 50.0, 0.0])
    for level, sign in ((0.9, 1.0), (0.35, -1.0)):
        wanted = np.stack([moved(image.astype(float), name, sign * level, fill) for image in images.numpy()])
        assert np.abs(applied(images, name, level, sign).numpy() - wanted).max() < 0.51
        other = np.stack([moved(image.astype(float), name, -sign * level, fill) for image in images.numpy()])
        assert np.abs(applied(images, name, level, sign).numpy() - other).max() > 50


def test_every_image_gets_its_own_operation(photographs):
    many = torch.arange(24) % (len(OPERATIONS) + 1) + NONE  # each operation, and none
    level, sign = torch.linspace(0.1, 1, 24), torch.where(torch.arange(24) % 2 > 0, 1.0, -1.0)
    together = apply_operations(photographs, many, level, sign, torch.zeros(3), select=False)
    assert apply_operations(photographs, many, level, sign, torch.zeros(3), select=True).equal(together)
    for row in range(24):
        one = slice(row, row + 1)
        alone = apply_operations(photographs[one], many[one], level[one], sign[one], torch.zeros(3), select=False)
        assert alone.equal(together[one])
        assert together[row].equal(photographs[row]) == (many[row] == NONE)


def test_tiny_and_plain_images_survive_every_operation():
    for images in (torch.full((2, 1, 1, 3), 7, dtype=torch.uint8), torch.full((2, 2, 5, 3), 200, dtype=torch.uint8)):
        for name in OPERATIONS:
            output = applied(images, name, 0.5)
            assert output.shape == images.shape and output.dtype == torch.uint8
            if name in ("autocontrast", "equalize", "color", "sharpness"):
                assert output.equal(images)  # nothing to stretch or sharpen


def test_chance_magnitude_and_choice_of_operations(photographs, monkeypatch):
    seen = []
    monkeypatch.setattr(augment_module, "apply_operations", lambda images, *given: seen.append(given) or images)
    images = photographs[:1, :4, :4].repeat(4000, 1, 1, 1)
    options = {"rand_layers": 2, "rand_chance": 0.25, "rand_operations": ("invert", "rotate", "color")}
    Augment(config(**OFF, **options))(images, torch.zeros(4000).long(), (0, 0))
    (first, level, sign, fill), (second, *_) = seen
    assert first.ne(second).any() and fill.tolist() == pytest.approx([127.5, 102, 76.5])
    counts = {OPERATIONS[number] if number >= 0 else None: count for number, count in
              zip(*(values.tolist() for values in first.unique(return_counts=True)))}  # fmt: skip
    assert set(counts) == {None, "invert", "rotate", "color"} and counts[None] == pytest.approx(3000, abs=110)
    assert counts["rotate"] == pytest.approx(333, abs=70)
    assert float((sign > 0).float().mean()) == pytest.approx(0.5, abs=0.04)
    inner = 10 * level[level < 1]
    assert level.max() == 1 and inner.median() == pytest.approx(9, abs=0.05)
    assert (inner - 9).abs().median() == pytest.approx(0.5 * 0.6745, abs=0.05)
    seen.clear()
    Augment(config(**OFF, rand_layers=1, rand_noise=0.0, rand_magnitude=4.0))(images[:9], torch.zeros(9).long(), (0, 0))
    assert seen[0][1].tolist() == pytest.approx([0.4] * 9)


# ---------------------------------------------------------------------------------------------- erasing and mixing
def test_erasing():
    images, labels = torch.full((300, 20, 30, 3), 255, dtype=torch.uint8), torch.zeros(300).long()
    augment = Augment(config(**OFF, erase=0.4, erase_fill="mean"))
    draws = augment.draw(300, (0, 0))
    erased = augment.transform(images, labels, draws)[0].permute(0, 2, 3, 1).eq(0)
    assert erased.all(3).equal(erased.any(3))  # all three channels
    touched = erased.flatten(1).any(1)
    assert touched.equal(torch.from_numpy(column(draws, "erase") < 0.4))
    for mask in erased.all(3)[touched]:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        assert mask.sum() == len(rows) * len(columns)  # a rectangle
        assert rows[-1] - rows[0] == len(rows) - 1 and columns[-1] - columns[0] == len(columns) - 1
    share = erased.all(3)[touched].float().mean((1, 2))
    assert share.min() >= 0.01 and share.max() <= 0.36 and share.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.03)
    noisy = Augment(config(**OFF, erase=1.0)).transform(images, labels, draws)[0].permute(0, 2, 3, 1)
    filled = noisy[noisy != augment.eval_transform(images).permute(0, 2, 3, 1)]
    assert float(filled.mean()) == pytest.approx(0, abs=0.02) and float(filled.std()) == pytest.approx(1, abs=0.02)


def test_noise_differs_from_place_to_place_and_image_to_image():
    values = noise((3, 16, 16, 3), torch.tensor([1, 2, 1]))
    assert values[0].equal(values[2]) and not values[0].equal(values[1])
    assert values[0].unique().numel() == 16 * 16 * 3
    flat = noise((64, 8, 8, 3), torch.arange(64)).flatten(1).double()
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.4  # 192 values a row: chance alone gives 0.3


@pytest.mark.parametrize("options", [{"mixup": 0.7}, {"cutmix": 1.0}, {"mixup": 0.7, "cutmix": 1.0, "mix_chance": 0.6}])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_mixing_is_that_of_a_loop(options, smoothing):
    images, labels = batch(60, 10, 14)
    augment = Augment(config(**OFF, **options, smoothing=smoothing))
    draws = augment.draw(60, (0, 4))
    output, shares = augment.transform(images, labels, draws)
    soft = np.full((60, 5), smoothing / 5)
    soft[np.arange(60), labels] += 1 - smoothing
    partners, kinds = column(draws, "partner").argsort(), set()
    for row, partner in enumerate(partners):
        one, two = images[row].numpy().astype(float), images[partner].numpy().astype(float)
        both = "mixup" in options and "cutmix" in options
        cut = "mixup" not in options or (both and column(draws, "cut")[row] < 0.5)
        weight = np.ones((10, 14))
        if column(draws, "mix")[row] < options.get("mix_chance", 1.0):
            kinds.add(cut)
            share = torch.tensor(column(draws, "share")[row : row + 1]).float()
            own = float(quantile(beta_quantiles(options["cutmix" if cut else "mixup"]), share))
            weight[:] = own
            if cut:
                middle = int(column(draws, "box_y")[row] * 10), int(column(draws, "box_x")[row] * 14)
                half = int(10 * math.sqrt(1 - own) / 2), int(14 * math.sqrt(1 - own) / 2)
                weight[:] = 1
                weight[max(0, middle[0] - half[0]) : middle[0] + half[0],
                       max(0, middle[1] - half[1]) : middle[1] + half[1]] = 0  # fmt: skip
        wanted = weight[..., None] * one + (1 - weight[..., None]) * two
        assert np.abs(pixels_of(output[row : row + 1])[0] - wanted).max() < 1e-2, row
        label = weight.mean() * soft[row] + (1 - weight.mean()) * soft[partner]
        assert np.abs(shares[row].numpy() - label).max() < 1e-5, row  # by the pixels that are really there
    assert kinds == {name == "cutmix" for name in options if name != "mix_chance"}
    torch.testing.assert_close(shares.sum(1), torch.ones(60))


def test_shares_that_forget_the_border_are_seen(monkeypatch):
    with monkeypatch.context() as patch:
        whole = lambda like, top, bottom, left, right: box(like, top - top, bottom - top, left - left, right - left)
        patch.setattr(augment_module, "box", whole)  # a box that does not lie where it was drawn
        with pytest.raises(AssertionError):
            test_mixing_is_that_of_a_loop({"cutmix": 1.0}, 0.0)


@pytest.mark.parametrize("a", [0.2, 0.5, 0.8, 1.0, 2.0, 8.0])
def test_shares_follow_the_beta_distribution(a):
    table = beta_quantiles(a).double()
    assert table[0] == 0 and table[-1] == 1 and (table.diff() >= 0).all() and table[512] == pytest.approx(0.5)
    closed = {0.5: lambda x: 2 / math.pi * x.sqrt().asin(), 1.0: lambda x: x, 2.0: lambda x: x**2 * (3 - 2 * x)}
    chance = torch.linspace(0, 1, 1025, dtype=torch.float64)
    if a in closed:
        torch.testing.assert_close(closed[a](table), chance, atol=2e-5, rtol=0)
    drawn = quantile(beta_quantiles(a), torch.rand(100_000, generator=torch.Generator().manual_seed(0))).double()
    assert float(drawn.var()) == pytest.approx(1 / (4 * (2 * a + 1)), rel=0.02)  # of Beta(a, a)
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.005)


def test_numbers_stay_below_their_limit():
    largest = torch.tensor([1 - 2.0**-24])
    assert all(int(below(largest, limit)) == limit - 1 for limit in range(1, 3000))
    assert float(quantile(beta_quantiles(0.8), largest)) <= 1


# ---------------------------------------------------------------------------------------------- what is refused
def test_wrong_settings():
    wrong = {
        "classes is 0": {"classes": 0},
        "padding is -1": {"padding": -1},
        "padding is 2.5": {"padding": 2.5},
        "rand_layers is True": {"rand_layers": True},
        "rand_magnitude is 11": {"rand_magnitude": 11},
        "mixup is -0.1; accepted: 0 to 100": {"mixup": -0.1},
        "erase is nan": {"erase": float("nan")},
        "smoothing is 2": {"smoothing": 2},
        "unknown padding_mode 'wrap'; accepted: reflect, zero": {"padding_mode": "wrap"},
        "unknown erase_fill 'black'": {"erase_fill": "black"},
        "unknown operation 'cutout'; accepted: autocontrast": {"rand_operations": ("invert", "cutout")},
        "rand_operations is empty": {"rand_operations": ()},
        "std has 1 values": {"std": (0.2,)},
        r"std is \(0.2, 0, 0.2\)": {"std": (0.2, 0, 0.2)},
    }
    for message, options in wrong.items():
        with pytest.raises(InputError, match=message):
            config(**options)


def test_wrong_batches():
    images, labels = batch()
    augment = Augment(config(classes=5))
    wrong = {
        "images are torch.float32": (images.float(), labels),
        r"images are torch.uint8 of shape \(8, 7, 3\)": (images[:, 0], labels),
        r"labels are torch.int64 of shape \(7,\)": (images, labels[:7]),
        "labels are torch.int32": (images, labels.int()),
        "labels are 0 .. 5; accepted: 0 .. 4": (images, torch.tensor([0] * 7 + [5])),
        "labels are -1 .. 0": (images, torch.tensor([0] * 7 + [-1])),
        "padding 4 for images of 4 x 7": (images[:, :4], labels),
    }
    for message, (pixels, classes) in wrong.items():
        with pytest.raises(InputError, match=message):
            augment(pixels, classes, (0, 0))
    with pytest.raises(InputError, match=r"draws have shape \(8, 3\)"):
        augment.transform(images, labels, torch.zeros(8, 3))
    for source, message in {
        5: "source is 5",
        (0, 1, 2, 3): "source is",
        (0, -1): "step -1",
        (0, 0, -1): "rank",
    }.items():
        with pytest.raises(InputError, match=message):
            augment.draw(4, source)
    with pytest.raises(InputError, match="images are torch.float32"):
        normalise(images.float(), MEAN, STD)


def test_settings_are_plain_data():
    sample = load_images("cifar10-sample")
    made = AugmentConfig.of(sample, mixup=0.8)
    assert made.classes == 10 and made.mean == sample.mean and made.std == sample.std and made.mixup == 0.8
    back = json.loads(json.dumps(dataclasses.asdict(made)))
    assert AugmentConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in back.items()}) == made


def test_an_epoch_of_the_sample_is_augmented_evenly():
    sample = load_images("cifar10-sample")
    augment, batches = Augment(AugmentConfig.of(sample, **FULL)), ImageBatches(sample.train, 600)
    outputs = [augment(*batches.at(step), (0, step)) for step in range(3)]
    pixels = torch.cat([output for output, _ in outputs])
    assert pixels.isfinite().all() and abs(float(pixels.mean())) < 0.15 and 0.7 < float(pixels.std()) < 1.1
    mass = torch.cat([shares for _, shares in outputs]).sum(0)
    torch.testing.assert_close(mass, torch.full((10,), 180.0), atol=25, rtol=0)

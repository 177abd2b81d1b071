"""What is done to training images, as plain data."""

from dataclasses import dataclass

from minigated.data.images import ImageSet
from minigated.data.rand_augment import OPERATIONS
from minigated.errors import InputError, one_of

PADDING_MODES = ("reflect", "zero")
ERASE_FILLS = ("noise", "mean")


@dataclass(frozen=True)
class AugmentConfig:
    """Every setting of `minigated.data.augment.Augment`; JSON-able by `dataclasses.asdict`.

    As it stands, it pads by four pixels, crops and flips. 0 switches a part off.

    Attributes:
        classes: how many there are.
        mean, std: of red, green and blue, for values 0 to 1.
        padding: pixels put around the image before it is cropped to its size at random.
        padding_mode: "reflect" (the border pixels not repeated) or "zero" (black).
        flip: whether half of the images are mirrored left to right.
        rand_layers: operations of RandAugment an image goes through.
        rand_magnitude: their level, 0 to 10; rand_noise: its standard deviation from image to image.
        rand_chance: chance that an operation is carried out.
        rand_operations: names out of `minigated.data.rand_augment.OPERATIONS`, drawn with equal chance.
        mixup, cutmix: the parameter a of the Beta(a, a) that the share of an image is drawn from.
        mix_chance: chance that an image is mixed with another one at all; with both, half by each.
        erase: chance that a rectangle of 2 % to a third of the image is erased.
        erase_fill: "noise" of mean 0 and deviation 1 for each value, or the "mean" colour.
        smoothing: share of the label that is spread evenly over all classes.

    Raises:
        InputError: a value is impossible; the message names it and what is accepted.
    """

    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    padding: int = 4
    padding_mode: str = "reflect"
    flip: bool = True
    rand_layers: int = 0
    rand_magnitude: float = 9.0
    rand_noise: float = 0.5
    rand_chance: float = 0.5
    rand_operations: tuple[str, ...] = OPERATIONS
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_chance: float = 1.0
    erase: float = 0.0
    erase_fill: str = "noise"
    smoothing: float = 0.0

    def __post_init__(self):
        for name, low in {"classes": 1, "padding": 0, "rand_layers": 0}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise InputError(f"{name} is {value!r}; accepted: a whole number, {low} or more")
        bounds = {"rand_magnitude": 10, "rand_noise": 10, "rand_chance": 1, "mixup": 100, "cutmix": 100,
                  "mix_chance": 1, "erase": 1, "smoothing": 1}  # fmt: skip
        for name, high in bounds.items():
            if not 0 <= getattr(self, name) <= high:
                raise InputError(f"{name} is {getattr(self, name)!r}; accepted: 0 to {high}")
        one_of("padding_mode", self.padding_mode, PADDING_MODES)
        one_of("erase_fill", self.erase_fill, ERASE_FILLS)
        if not self.rand_operations:
            raise InputError(f"rand_operations is empty; accepted: names out of {', '.join(OPERATIONS)}")
        for name in self.rand_operations:
            one_of("operation", name, OPERATIONS)
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise InputError(f"{name} has {len(getattr(self, name))} values; accepted: three, one a channel")
        if min(self.std) <= 0:
            raise InputError(f"std is {self.std}; accepted: values above 0")

    @classmethod
    def of(cls, images: ImageSet, **options) -> "AugmentConfig":
        """With the classes, mean and deviation of a set of images."""
        return cls(len(images.classes), images.mean, images.std, **options)

"""Rotary position embedding (RoFormer, arXiv 2104.09864), the rotate-half layout that Llama and Qwen use.

Chapter 8 turns pairs slower, so that positions beyond the trained length give angles that training has seen: a larger
base, position interpolation (arXiv 2306.15595), YaRN (arXiv 2309.00071).
"""

import math

import torch
from torch import Tensor, nn

from minigated.errors import InputError, one_of

SCALINGS = ("none", "base", "interpolation", "yarn")
RAMPS = ("turns", "index")
FAST, SLOW = 32.0, 1.0  # YaRN's beta and alpha: turns within the trained length that end its ramp


# ---------------------------------------------------------------------------------------------- frequencies
def rotary_frequencies(width: int, base: float = 10_000.0) -> Tensor:
    """Radians a position for every pair of channels: base^(-2i / width), from 1 down. [width / 2] float32."""
    if width % 2:
        raise InputError(f"rotary positions need an even head width, got {width}")
    return base ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)


def base_for_length(base: float, factor: float, width: int) -> float:
    """The base at which the slowest pair turns `factor` times slower and the fastest as before ("NTK-aware").

    Args:
        base: of the trained model. factor: s, longer length over trained length. width: D, more than 2.
    """
    if width < 4:
        raise InputError(f"a larger base slows no pair of a head of width {width}; accepted: an even width from 4")
    return base * factor ** (width / (width - 2))


def yarn_ramp(frequencies: Tensor, trained: int) -> Tensor:
    """YaRN's gamma: 1 for pairs that keep their frequency, 0 for those slowed by s, straight in turns between.

    Args:
        frequencies: [D/2], radians a position. trained: length of training, in positions.

    Returns:
        [D/2], clip((r - 1) / (32 - 1), 0, 1), with r the pair's turns within the trained length.
    """
    turns = trained * frequencies / (2 * math.pi)
    return ((turns - SLOW) / (FAST - SLOW)).clamp(0, 1)


def yarn_ramp_by_index(width: int, base: float, trained: int) -> Tensor:
    """The ramp of the released code and of transformers: straight in the pair's number, not in its turns.

    Both ramps have the same ends, but for the rounding of this one to whole pairs.

    Args:
        width: D. base: of the frequencies. trained: length of training, in positions.

    Returns:
        [D/2], 1 for pairs that keep their frequency.
    """

    def pair_with(turns: float) -> float:
        return width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(pair_with(FAST)), 0), min(math.ceil(pair_with(SLOW)), width - 1)
    pairs = torch.arange(width // 2, dtype=torch.float32)
    return 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)


def scaled_frequencies(
    width: int,
    base: float = 10_000.0,
    scaling: str = "none",
    factor: float = 1.0,
    trained: int | None = None,
    ramp: str = "turns",
) -> Tensor:
    """Frequencies for sequences `factor` times as long as those of training.

    Args:
        width: D, even. base: of the trained model.
        scaling: "none"; "base", a larger base by `base_for_length`; "interpolation", every frequency divided by s,
            which is every position divided by s; "yarn", only slow pairs divided by s.
        factor: s, at least 1; 1 changes nothing.
        trained: length of training; "yarn" needs it.
        ramp: of "yarn": "turns" as in the paper, "index" as in the released code.

    Returns:
        [D/2] float32, radians a position.

    Raises:
        InputError: an unknown form, a factor that is below 1 or has no effect, or no trained length where needed.
    """
    check_scaling(scaling, factor, trained, ramp)
    if scaling == "base":
        return rotary_frequencies(width, base_for_length(base, factor, width))
    frequencies = rotary_frequencies(width, base)
    if scaling == "interpolation":
        return frequencies / factor
    if scaling == "yarn":
        gamma = yarn_ramp(frequencies, trained) if ramp == "turns" else yarn_ramp_by_index(width, base, trained)
        return frequencies * ((1 - gamma) / factor + gamma)
    return frequencies


def check_scaling(scaling: str, factor: float, trained: int | None, ramp: str = "turns") -> None:
    """Refuses what `scaled_frequencies` refuses."""
    one_of("rope scaling", scaling, SCALINGS)
    one_of("yarn ramp", ramp, RAMPS)
    if not (1 <= factor < math.inf):
        raise InputError(f"rope factor is {factor!r}; accepted: a number from 1 (longer length over trained length)")
    if scaling == "none" and factor != 1:
        raise InputError(f"rope factor {factor:g} has no effect without a scaling; accepted: {', '.join(SCALINGS[1:])}")
    if scaling == "yarn" and (trained is None or trained < 1):
        raise InputError(f"yarn needs the trained length, at least 1, got {trained}")


def yarn_loop(width: int, base: float, factor: float, trained: int) -> list[float]:
    """Reference form of "yarn", a pair at a time in Python's numbers: [D/2] radians a position."""
    frequencies = []
    for pair in range(width // 2):
        theta = base ** (-2 * pair / width)
        wavelength = 2 * math.pi / theta  # positions a turn
        gamma = min(max((trained / wavelength - SLOW) / (FAST - SLOW), 0.0), 1.0)
        frequencies.append((1 - gamma) * theta / factor + gamma * theta)
    return frequencies


def attention_factor(scaling: str, factor: float) -> float:
    """What YaRN multiplies cosines and sines by, 0.1 ln s + 1, and so attention logits by its square; else 1."""
    return 0.1 * math.log(factor) + 1 if scaling == "yarn" else 1.0


# ---------------------------------------------------------------------------------------------- rotation
def rotary_angles(length: int, width: int, base: float = 10_000.0, **scaled) -> Tensor:
    """Angle of every position for every pair of channels: position * frequency.

    Args:
        length: number of positions.
        width: channels that are rotated, an even number.
        base: the wavelength base; 10,000 in the papers.
        **scaled: scaling, factor, trained and ramp of `scaled_frequencies`.

    Returns:
        Float32 tensor [length, width / 2], radians.
    """
    return torch.outer(torch.arange(length, dtype=torch.float32), scaled_frequencies(width, base, **scaled))


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channel pairs (i, i + D/2) of `x` by the angle of their position.

    Args:
        x: queries or keys, [B, T, H, D].
        cos: cosines, [T, D/2], float32.
        sin: sines, [T, D/2], float32.

    Returns:
        [B, T, H, D] in the dtype of `x`; the rotation itself runs in float32.
    """
    cos, sin = cos[:, None, :], sin[:, None, :]  # [T, 1, D/2]
    first, second = x.chunk(2, dim=-1)  # [B, T, H, D/2] each
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)  # [B, T, H, D]
    return rotated.to(x.dtype)


class RotaryTable(nn.Module):
    """Cosines and sines for positions 0 .. length-1, built once and never trained.

    Args:
        length: number of positions. width: D. base: of the frequencies.
        scaling, factor, trained, ramp: see `scaled_frequencies`. YaRN's `attention_factor` is part of the table; a
            QK-norm that comes after the rotation would cancel it.
    """

    def __init__(
        self,
        length: int,
        width: int,
        base: float = 10_000.0,
        scaling: str = "none",
        factor: float = 1.0,
        trained: int | None = None,
        ramp: str = "turns",
    ):
        super().__init__()
        self.length, self.width, self.base = length, width, base
        self.scaled = {"scaling": scaling, "factor": factor, "trained": trained, "ramp": ramp}
        self.register_buffer("cos", torch.empty(length, width // 2), persistent=False)
        self.register_buffer("sin", torch.empty(length, width // 2), persistent=False)
        self._fill(self.cos.device)

    def _fill(self, device: torch.device) -> None:
        with torch.device(device):
            angles = rotary_angles(self.length, self.width, self.base, **self.scaled)
        size = attention_factor(self.scaled["scaling"], self.scaled["factor"])
        self.cos, self.sin = angles.cos() * size, angles.sin() * size  # [length, width/2]

    def _apply(self, function, recurse=True):
        # model.to(torch.bfloat16) would round the angles of far positions to whole turns, and to_empty leaves what was
        # on meta without numbers: make the table anew
        empty = self.cos.is_meta
        super()._apply(function, recurse)
        if self.cos.dtype != torch.float32 or (empty and not self.cos.is_meta):
            self._fill(self.cos.device)
        return self

    def forward(self, start: int | Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions start .. start+count-1, [count, width/2] each.

        A `start` that is a tensor [1] on the table's device is looked up there, unchecked and for `count` 1 alone, so
        that the position may change without a new graph.
        """
        if isinstance(start, Tensor):
            return self.cos.index_select(0, start), self.sin.index_select(0, start)  # [1, width/2]
        if start + count > self.length:
            raise InputError(
                f"{start + count} positions are longer than the rotary table of {self.length}; "
                f"build the model with context={start + count} or more, or shorten the input"
            )
        return self.cos[start : start + count], self.sin[start : start + count]

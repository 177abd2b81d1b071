"""What this machine can do at best, measured: the rate of large matrix products and of copying memory."""

import torch

from minigated.bench.timing import LEAST_SAMPLES, Timer, spread, warm_up

SIZES = {"cpu": {"matrix": 512, "copy_mib": 64}, "gpu": {"matrix": 8192, "copy_mib": 2048}}


def matrix_rate(timer: Timer, size: int, dtype: torch.dtype, samples: int = 10) -> float:
    """Operations a second of a `size` cubed matrix product, a multiply and an add counted as two; the median sample.

    float32 is measured as this process runs it: TF32 only where the caller has allowed it.
    """
    a, b = (torch.randn(size, size, device=timer.device, dtype=dtype) for _ in "ab")
    out = torch.empty_like(a)
    step = lambda: torch.mm(a, b, out=out)
    slow = warm_up(step, timer)[1] > 0.5  # a processor at a GPU's size: every call is a sample, and few will do
    times = [timer.seconds(step, 1 if slow else 3) for _ in range(min(samples, LEAST_SAMPLES) if slow else samples)]
    return 2 * size**3 / spread(times)[1]


def copy_bandwidth(timer: Timer, mebibytes: int, samples: int = 10) -> float:
    """Bytes a second of copying a block much larger than any cache, read and written bytes added up; the median."""
    source = torch.zeros(mebibytes * 2**18, device=timer.device)
    target = torch.empty_like(source)
    step = lambda: target.copy_(source)
    warm_up(step, timer)
    times = [timer.seconds(step, 3) for _ in range(samples)]
    return 2 * source.numel() * source.element_size() / spread(times)[1]


def measure_ceilings(timer: Timer, scale: str) -> dict[str, float]:
    """Matrix-product rates in float32 and bfloat16 (operations a second) and copy bandwidth (bytes a second)."""
    sizes = SIZES[scale]
    return {
        "float32": matrix_rate(timer, sizes["matrix"], torch.float32),
        "bfloat16": matrix_rate(timer, sizes["matrix"], torch.bfloat16, 10 if timer.device.type == "cuda" else 2),
        "copy": copy_bandwidth(timer, sizes["copy_mib"]),
    }

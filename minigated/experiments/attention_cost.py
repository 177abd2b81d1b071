"""`ch01_attention_cost`: time and memory of naive against fused attention over the sequence length."""

import time
from pathlib import Path

import torch
from tqdm import tqdm

from minigated import records
from minigated.attention import attention_blocks, attention_matrix, attention_sdpa, causal_mask
from minigated.cost import attention_cost
from minigated.device import choose_device
from minigated.errors import InputError

FILES = ["minigated/attention.py", "minigated/cost.py", "minigated/experiments/attention_cost.py"]
BATCH, HEADS, WIDTH = 1, 16, 64
LENGTHS = {"cpu": (128, 256, 512, 1024), "gpu": (1024, 2048, 4096, 8192, 16384)}


def naive(q, k, v):
    """The matrix form with its mask, all scores in memory."""
    return attention_matrix(q, k, v, causal_mask(q.shape[-2], k.shape[-2], q.device))


FORMS = {"naive": naive, "blocks": attention_blocks, "sdpa": attention_sdpa}


def _milliseconds(step, device: torch.device, repetitions: int) -> list[float]:
    """Wall time of each call, the device idle before and after."""
    for _ in range(3):
        step()
    times = []
    for _ in range(repetitions):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _measure(form: str, tokens: int, backward: bool, device: torch.device, dtype, repetitions: int) -> dict:
    """One row: times and peak memory of a form at a length."""
    q, k, v = (
        torch.randn(BATCH, HEADS, tokens, WIDTH, device=device, dtype=dtype, requires_grad=backward) for _ in "qkv"
    )
    grown = torch.randn_like(q)

    def step():
        if not backward:
            with torch.no_grad():
                FORMS[form](q, k, v)
            return
        FORMS[form](q, k, v).backward(grown)
        q.grad = k.grad = v.grad = None

    peak = None
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        peak = (torch.cuda.max_memory_allocated() - held) / 2**20
    cost = attention_cost(BATCH, tokens, HEADS, WIDTH, item=q.element_size(), fused=form == "sdpa")
    return records.row(
        f"{form} {tokens}" + (" backward" if backward else ""),
        _milliseconds(step, device, repetitions),
        form=form,
        tokens=tokens,
        backward=backward,
        peak_mib=peak,
        flops=cost.flops,
        bytes=cost.bytes,
    )


def _note(rows: list[dict], longest: int) -> str:
    """How far naive and fused are apart at the longest length."""
    times = {entry["name"]: entry["mean"] for entry in rows}
    forward = times[f"naive {longest}"] / times[f"sdpa {longest}"]
    both = times[f"naive {longest} backward"] / times[f"sdpa {longest} backward"]
    return (
        f"Causal. At {longest} tokens the naive form takes {forward:.1f} times as long as the fused one forward, "
        f"{both:.1f} times forward and backward. Blocks is the online softmax in plain tensor operations, forward only."
    )


def run(scale="cpu", seeds=None, device="auto", out=None, text=None, resume=False, names=None) -> dict:
    """Times every form at every length and writes the record. `seeds` is the number of repetitions (20)."""
    if text or names:
        raise InputError(f"ch01_attention_cost takes no --text and no --only, got {text or names!r}")
    chosen = choose_device("cuda" if scale == "gpu" and device == "auto" else device)
    dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    start, repetitions = time.perf_counter(), seeds or 20
    torch.manual_seed(0)
    plan = [(f, t, False) for t in LENGTHS[scale] for f in FORMS]
    plan += [(f, t, True) for t in LENGTHS[scale] for f in ("naive", "sdpa")]  # blocks keep every score for autograd
    rows = [
        _measure(form, tokens, backward, chosen, dtype, repetitions)
        for form, tokens, backward in tqdm(plan, desc="ch01_attention_cost", unit="row")
    ]
    record = records.make(
        files=FILES,
        id="ch01_attention_cost",
        chapter=1,
        claim="naive attention needs memory that grows with the square of the length; the fused form is faster without",
        command=f"python -m minigated run ch01_attention_cost --scale {scale}",
        config={
            "batch": BATCH,
            "heads": HEADS,
            "head_width": WIDTH,
            "lengths": list(LENGTHS[scale]),
            "dtype": str(dtype),
        },
        seeds=list(range(repetitions)),
        metric={"name": "milliseconds a call", "split": "repetitions", "better": "lower"},
        rows=rows,
        verdict=None,
        data={"name": "random normal", "sha256": ""},
        seconds=time.perf_counter() - start,
        note=_note(rows, LENGTHS[scale][-1]),
    )
    folder = out or (records.FOLDER if scale == "gpu" else Path("runs"))
    print(f"wrote {records.write(record, folder)}")
    return record

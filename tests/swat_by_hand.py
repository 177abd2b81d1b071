"""The whole SWAT mixer cell by cell in float64, from the equations of chapter 6, sharing no code with the package.

Every open reading is written out here a second time. `test_swat.py` compares the package with it.
"""

import math

import torch

SLOPES = {  # head h of H -> slope
    "swat": lambda h, H: 2.0 ** -(h + 1) if h < H // 2 else -(2.0 ** -(h - H // 2 + 1)),
    "alibi": lambda h, H: (1 if h < H // 2 else -1) * 2.0 ** (-16 * (h % (H // 2) + 1) / H),
    "one_sided": lambda h, H: -(2.0 ** (-8 * (h + 1) / H)),
}
SIGNS = {"same": lambda h: 1, "opposed": lambda h: -1, "quadrants": lambda h: -1 if h % 2 else 1}


class Place:
    """Where a cell of one axis lies: its window, its index there, and its region."""

    def __init__(self, cell: int, side: int, window: int | None, shifted: bool):
        window = side if window is None else min(window, side)
        shift = window // 2 if shifted and side > window else 0
        padded = math.ceil(side / window) * window
        self.size = window
        self.window, self.index = divmod((cell - shift) % padded, window)
        self.region = self.window, cell < shift  # what came round the edge is a region of its own


def angles(places: tuple[Place, Place], width: int) -> list[float]:
    index = places[0].index * places[1].size + places[1].index
    return [index * 10_000 ** -(pair / max(width // 2 - 1, 1)) for pair in range(width // 2)]


def rotated(x: torch.Tensor, places, width: int) -> torch.Tensor:
    out = torch.empty_like(x)
    for pair, angle in enumerate(angles(places, width)):
        a, b, cos, sin = x[2 * pair], x[2 * pair + 1], math.cos(angle), math.sin(angle)
        out[2 * pair], out[2 * pair + 1] = a * cos - b * sin, a * sin + b * cos
    return out


def inside_and_outside(o, head: int, heads: int, rate: float, delta: int, height_pass: bool) -> tuple[float, float]:
    """What is added inside the sigmoid and what multiplies outside."""
    slope = (
        0.0 if o.alibi == "none" else SLOPES[o.slopes](head, heads) * (SIGNS[o.pass_signs](head) if height_pass else 1)
    )
    decay = math.exp(rate * abs(delta)) if o.decay else 1.0
    if o.alibi == "outer":
        return 0.0, math.exp(slope * abs(delta))
    if o.alibi == "magnitude":
        return 0.0, math.exp(-abs(slope) * abs(delta))
    return slope * (delta if o.distance == "signed" else abs(delta)), decay


def one_pass(o, q, k, v, places, rates, height_pass: bool):
    """q, k, v: {(row, column): [H, D]}."""
    axis, result = 0 if height_pass else 1, {}
    for here in q:
        line = [
            j
            for j in q
            if j[1 - axis] == here[1 - axis] and places[axis][j[axis]].region == places[axis][here[axis]].region
        ]
        size, out = places[axis][here[axis]].size, torch.zeros_like(v[here])
        for head, rate in enumerate(rates):
            weights = []
            for j in line:
                delta = places[axis][here[axis]].index - places[axis][j[axis]].index
                inside, outside = inside_and_outside(o, head, len(rates), rate, delta, height_pass)
                score = float(q[here][head] @ k[j][head]) / math.sqrt(q[here].shape[1]) + inside
                score -= math.log(size) if o.norm == "log_window" else 0.0
                weights.append(outside / (1 + math.exp(-score)) / (size if o.norm == "window" else 1))
            total = sum(weights) + 1e-6 if o.norm == "row_sum" else 1.0
            for weight, j in zip(weights, line):
                out[head] += weight / total * v[j][head]
        result[here] = out
    return result


def convolved(conv, x, places, within_windows: bool):
    """The k x k depth-wise filter at every cell, zeros beyond the map or beyond the cell's window."""
    kernel, bias = conv.conv.weight[:, 0], conv.conv.bias  # [C, k, k]
    reach, result = kernel.shape[-1] // 2, {}
    by_index = {tuple((places[a][c[a]].window, places[a][c[a]].index) for a in (0, 1)): c for c in x}
    for here in x:
        out = bias.clone()
        for dy in range(-reach, reach + 1):
            for dx in range(-reach, reach + 1):
                there = here[0] + dy, here[1] + dx
                if within_windows:
                    rolled = [places[a][here[a]] for a in (0, 1)]
                    there = by_index.get(tuple((p.window, p.index + d) for p, d in zip(rolled, (dy, dx))))
                if there in x:
                    out = out + kernel[:, dy + reach, dx + reach] * x[there]
        result[here] = out
    return result


def normed(o, norm, x, heads: int):
    groups = {"layer": [slice(None)], "rms": [slice(None)], "none": [], "row_sum": [], "window": [], "log_window": []}
    width = len(x) // heads
    groups["head"] = [slice(h * width, (h + 1) * width) for h in range(heads)]
    out = x.clone()
    for part in groups[o.norm]:
        mean = 0.0 if o.norm == "rms" else x[part].mean()
        out[part] = (x[part] - mean) / torch.sqrt(((x[part] - mean) ** 2).mean() + 1e-6)
    if groups[o.norm]:
        out = out * norm.weight + (0.0 if o.norm == "rms" else norm.bias)
    return out


def values(o, module, parts):
    silu = lambda t: t / (1 + torch.exp(-t))
    value = parts[-1]
    if o.value == "plain":
        return value, value
    if o.value == "self":
        return value * silu(module.gate_proj.weight @ value + module.gate_proj.bias), value
    gated = silu(parts[0]) * value
    return (module.down_proj.weight @ gated + module.down_proj.bias if o.value == "mlp" else gated), value


def mixer(module, x, options, rates, window, shifted):
    """What `SwatAttention` must give for one map x [h, w, C]; the module lends its weights."""
    height, width, channels = x.shape
    heads, o = module.heads, options
    places = [[Place(c, n, window, shifted) for c in range(n)] for n in (height, width)]
    q, k, v, gated, raw = {}, {}, {}, {}, {}
    for row in range(height):
        for column in range(width):
            here, at = (row, column), (places[0][row], places[1][column])
            parts = (module.qkv.weight @ x[here] + module.qkv.bias).split(channels)
            split = [part.view(heads, -1) for part in parts[:2]]
            if o.rotation:
                split = [torch.stack([rotated(t, at, channels // heads) for t in part]) for part in split]
            q[here], k[here] = split
            gated[here], raw[here] = values(o, module.value, parts[2:])
            v[here] = gated[here].view(heads, -1)
    z = one_pass(o, q, k, v, places, rates, height_pass=False)
    z = one_pass(o, q, k, z, places, rates, height_pass=True)
    source = {"gated": gated, "raw": raw, "none": None}[o.lce]
    local = None if source is None else convolved(module.lce, source, places, o.lce_place == "window")
    out = torch.empty_like(x)
    for here in q:
        y, near = z[here].flatten(), 0.0 if local is None else local[here]
        y = (
            normed(o, module.norm, y + near, heads)
            if o.norm_place == "after_lce"
            else normed(o, module.norm, y, heads) + near
        )
        out[here] = module.out_proj.weight @ y + module.out_proj.bias
    return out

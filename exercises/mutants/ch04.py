"""Wrong answers to chapter 4, each with the hint that must refuse it. They keep the name of the right answer."""

import torch

from minigated.grader import Mutants

wrong = Mutants()


# ---------------------------------------------------------------------------------------------- 4.1
def split(x, w):
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // w, w, width // w, w, channels)


@wrong("4.1", says="a plain reshape")
def cut_into_windows(x, window):
    return x.reshape(-1, window, window, x.shape[-1])


@wrong("4.1", says="the batch must stay outermost")
def cut_into_windows(x, window):
    return split(x, window).permute(1, 3, 0, 2, 4, 5).reshape(-1, window, window, x.shape[-1])


@wrong("4.1", says="counted column by column")
def cut_into_windows(x, window):
    return split(x, window).permute(0, 3, 1, 2, 4, 5).reshape(-1, window, window, x.shape[-1])


@wrong("4.1", says="swapped inside each window")
def cut_into_windows(x, window):
    return split(x, window).permute(0, 1, 3, 4, 2, 5).reshape(-1, window, window, x.shape[-1])


@wrong("4.1", says="shape [2, 6, 2, 2, 3], expected [12, 2, 2, 3]")
def cut_into_windows(x, window):
    return split(x, window).transpose(2, 3).flatten(1, 2)


@wrong("4.1", says="no gradient")
def cut_into_windows(x, window):
    return split(x.detach(), window).transpose(2, 3).reshape(-1, window, window, x.shape[-1])


# ---------------------------------------------------------------------------------------------- 4.2
def plan(side, window, shifted):
    if window < 1:
        raise ValueError(window)
    window = min(window, side)
    return window, window // 2 if shifted and side > window else 0, -side % window


@wrong("4.2", says="a window is never larger than the map")
def plan_of_an_axis(side, window, shifted):
    if window < 1:
        raise ValueError(window)
    return window, window // 2 if shifted else 0, -side % window


@wrong("4.2", says="one window covers the axis")
def plan_of_an_axis(side, window, shifted):
    used, _, padding = plan(side, window, shifted)
    return used, used // 2 if shifted else 0, padding


@wrong("4.2", says="in a layer that does not shift")
def plan_of_an_axis(side, window, shifted):
    used, _, padding = plan(side, window, shifted)
    return used, used // 2 if side > used else 0, padding


@wrong("4.2", says="rounded down")
def plan_of_an_axis(side, window, shifted):
    used, shift, padding = plan(side, window, shifted)
    return used, (used + 1) // 2 if shift or (shifted and side > used) else 0, padding


@wrong("4.2", says="although the windows divide the side")
def plan_of_an_axis(side, window, shifted):
    used, shift, _ = plan(side, window, shifted)
    return used, shift, used - side % used


@wrong("4.2", says="how many cells are missing")
def plan_of_an_axis(side, window, shifted):
    used, shift, _ = plan(side, window, shifted)
    return used, shift, side % used


@wrong("4.2", says="must be refused")
def plan_of_an_axis(side, window, shifted):
    return plan(side, max(1, window), shifted)


# ---------------------------------------------------------------------------------------------- 4.3
def looks(side, window, shift):
    region = (torch.arange(side) >= side - shift).view(-1, window)
    return region[:, :, None] == region[:, None, :]


@wrong("4.3", says="the mask is inverted")
def who_may_look(side, window, shift):
    return ~looks(side, window, shift)


@wrong("4.3", says="after a roll to the wrong side")
def who_may_look(side, window, shift):
    return looks(side, window, shift).flip(0)


@wrong("4.3", says="nothing is forbidden")
def who_may_look(side, window, shift):
    return torch.ones(side // window, window, window, dtype=torch.bool)


@wrong("4.3", says="every window is divided")
def who_may_look(side, window, shift):
    return looks(side, window, shift)[-1:].expand(side // window, -1, -1)


@wrong("4.3", says="forbid both")
def who_may_look(side, window, shift):
    return looks(side, window, shift) | (torch.arange(window)[:, None] >= window - shift)


@wrong("4.3", says="divided at the wrong place")
def who_may_look(side, window, shift):
    region = (torch.arange(side) >= side - (window - shift) % window).view(-1, window)
    return region[:, :, None] == region[:, None, :]


@wrong("4.3", says="may look at itself")
def who_may_look(side, window, shift):
    return looks(side, window, shift) & ~torch.eye(window, dtype=torch.bool)


@wrong("4.3", says="torch.bool")
def who_may_look(side, window, shift):
    return looks(side, window, shift).float()


# ---------------------------------------------------------------------------------------------- 4.4
def segments(q, k, v, window, allowed, scale=None, after=None, fill=float("-inf")):
    cut = lambda x: x.unflatten(2, (-1, window))
    scores = cut(q) @ cut(k).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = torch.softmax(scores.masked_fill(~allowed, fill), -1)
    return ((weights if after is None else weights * after) @ cut(v)).flatten(2, 3)


@wrong("4.4", says="the mask is not used")
def rows_in_segments(q, k, v, window, allowed):
    return segments(q, k, v, window, torch.ones_like(allowed))


@wrong("4.4", says="the mask comes after the softmax")
def rows_in_segments(q, k, v, window, allowed):
    return segments(q, k, v, window, torch.ones_like(allowed), after=allowed)


@wrong("4.4", says="a masked score of 0 still gets a weight")
def rows_in_segments(q, k, v, window, allowed):
    return segments(q, k, v, window, allowed, fill=0.0)


@wrong("4.4", says="True is where a cell may look")
def rows_in_segments(q, k, v, window, allowed):
    return segments(q, k, v, window, ~allowed | torch.eye(window, dtype=torch.bool))


@wrong("4.4", says="in reverse order")
def rows_in_segments(q, k, v, window, allowed):
    return segments(q, k, v, window, allowed.flip(0))


@wrong("4.4", says="the scale 1 / sqrt(D) is missing")
def rows_in_segments(q, k, v, window, allowed):
    return segments(q, k, v, window, allowed, scale=1.0)


@wrong("4.4", says="that is the height pass")
def rows_in_segments(q, k, v, window, allowed):
    turned = [x.transpose(1, 2) for x in (q, k, v)]
    if q.shape[1] % window:
        return segments(q, k, v, window, allowed)
    return segments(*turned, window, allowed).transpose(1, 2)


@wrong("4.4", says="the whole row is one segment")
def rows_in_segments(q, k, v, window, allowed):
    return segments(q, k, v, q.shape[2], torch.ones(1, 1, 1, dtype=torch.bool))


@wrong("4.4", says="in place")
def rows_in_segments(q, k, v, window, allowed):
    q /= q.shape[-1] ** 0.5
    return segments(q, k, v, window, allowed, scale=1.0)


# ---------------------------------------------------------------------------------------------- 4.5
def case(*numbers):
    def leaky_map():
        return numbers

    return leaky_map


wrong("4.5", says="there is no padding")(case(8, 4, 2))
wrong("4.5", says="without a shift nothing is rolled")(case(9, 4, 0))
wrong("4.5", says="begin a window of their own")(case(10, 4, 2))
wrong("4.5", says="nothing is shifted there")(case(3, 4, 1))
wrong("4.5", says="side up to 64")(case(65, 4, 2))
wrong("4.5", says="0 <= shift < window")(case(9, 4, 4))
wrong("4.5", says="three whole numbers")(case(9, 4))


# ---------------------------------------------------------------------------------------------- 4.6
def moved_by(mix, x, cell, noise):
    other = x.clone()
    other[0, cell[0], cell[1]] += noise
    return (mix(other) - mix(x)).abs().amax(-1) > 1e-9


def region_of(height, width, cell):
    rows, columns = ((torch.arange(side) + 2) // 4 for side in (height, width))
    return (rows == rows[cell[0]])[:, None] & (columns == columns[cell[1]])


@wrong("4.6", says="turns down a right implementation")
def stays_in_its_region(mix):
    x = torch.randn(1, 8, 8, 3, dtype=torch.float64)
    rows = torch.arange(8) // 4  # borders of windows that were not shifted
    return torch.equal(moved_by(mix, x, (0, 0), torch.randn(3))[0], (rows == 0)[:, None] & (rows == 0))


@wrong("4.6", says="one it lets through: rolled before it was padded")
def stays_in_its_region(mix):
    x = torch.randn(2, 8, 12, 3, dtype=torch.float64)
    cells = [(r, c) for r in range(8) for c in range(12)]
    moved = [moved_by(mix, x, cell, torch.randn(3)) for cell in cells]
    return all(torch.equal(m[0], region_of(8, 12, c)) and not m[1].any() for m, c in zip(moved, cells))


@wrong("4.6", says="one it lets through: nothing is mixed")
def stays_in_its_region(mix):
    for height, width in ((8, 12), (9, 7)):
        x = torch.randn(2, height, width, 3, dtype=torch.float64)
        for cell in [(r, c) for r in range(height) for c in range(width)]:
            moved = moved_by(mix, x, cell, torch.randn(3))
            if moved[1].any() or (moved[0] & ~region_of(height, width, cell)).any():
                return False
    return True


@wrong("4.6", says="one it lets through: images of a batch see each other")
def stays_in_its_region(mix):
    for height, width in ((8, 12), (9, 7)):
        x = torch.randn(1, height, width, 3, dtype=torch.float64)
        for cell in [(r, c) for r in range(height) for c in range(width)]:
            if not torch.equal(moved_by(mix, x, cell, torch.randn(3))[0], region_of(height, width, cell)):
                return False
    return True


@wrong("4.6", says="catches 0 of")
def stays_in_its_region(mix):
    return True


@wrong("4.6", says="turns down a right implementation")
def stays_in_its_region(mix):
    return False


# ---------------------------------------------------------------------------------------------- 4.7
def costs(h, w, W, C, **changed):
    cells = h * w
    right = {
        "whole": 2 * cells * cells * C,
        "window": 2 * cells * W * W * C,
        "decomposed": 4 * cells * W * C,
        "masks": h // W + w // W - 1,
    }
    return right | changed


@wrong("4.7", says="'whole' for a map of 8 x 12, W = 4, C = 3 is 27,648: count the products with the values too")
def cost_of_windows(h, w, W, C):
    return costs(h, w, W, C, whole=(h * w) ** 2 * C)


@wrong("4.7", says="a window has W * W cells, not W")
def cost_of_windows(h, w, W, C):
    return costs(h, w, W, C, window=2 * h * w * W * C)


@wrong("4.7", says="that is one window; there are many")
def cost_of_windows(h, w, W, C):
    return costs(h, w, W, C, window=2 * W**4 * C)


@wrong("4.7", says="there are two passes")
def cost_of_windows(h, w, W, C):
    return costs(h, w, W, C, decomposed=2 * h * w * W * C)


@wrong("4.7", says="in a pass a cell looks at W cells")
def cost_of_windows(h, w, W, C):
    return costs(h, w, W, C, decomposed=4 * h * w * W * W * C)


@wrong("4.7", says="a pass stays inside its window")
def cost_of_windows(h, w, W, C):
    return costs(h, w, W, C, decomposed=2 * h * w * (h + w) * C)


@wrong("4.7", says="count it once")
def cost_of_windows(h, w, W, C):
    return costs(h, w, W, C, masks=h // W + w // W)


@wrong("4.7", says="only those at the end of an axis")
def cost_of_windows(h, w, W, C):
    return costs(h, w, W, C, masks=(h // W) * (w // W))


@wrong("4.7", says="no entry 'masks'")
def cost_of_windows(h, w, W, C):
    return {name: value for name, value in costs(h, w, W, C).items() if name != "masks"}

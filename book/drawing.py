"""Draws docs/assets/gate-positions.svg, the picture of the home page: `python book/drawing.py`.

Left: an attention layer and the five places for a gate. Right: what the paper measured for each, from the table of
variants.
"""

from pathlib import Path

from minigated.variants import VARIANTS

TARGET = Path(__file__).resolve().parent.parent / "docs" / "assets" / "gate-positions.svg"
INK, STRONG = "#7a7f87", "#0072B2"  # as in minigated.plots: read on white and on dark pages
WIDTH, HEIGHT = 500, 400
POSITIONS = ("g1", "g2", "g4", "g3", "g5")
ALT = (
    "An attention layer from its normalised input through W_Q, W_K and W_V, the weighted sum and W_O to its output. "
    "Gates can stand at five places: G4 on the queries, G3 on the keys, G2 on the values, G1 on the attention "
    "output, G5 after W_O. "
)


def text(x: float, y: float, words: str, anchor: str = "middle", weight: str = "normal", size: int = 14) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}" font-size="{size}">{words}</text>'


def box(x: float, y: float, width: float, words: str) -> str:
    """A box of height 30 around its centre."""
    frame = f'<rect x="{x - width / 2}" y="{y - 15}" width="{width}" height="30" rx="4"/>'
    return frame + text(x, y + 5, words)


def line(*points: tuple[float, float]) -> str:
    return '<path d="M' + " L".join(f"{x} {y}" for x, y in points) + '"/>'


def gate(x: float, y: float, name: str) -> str:
    """A gate; the one that the paper recommends has a double ring and bold letters."""
    best = name == "G1"
    rings = f'<circle cx="{x}" cy="{y}" r="15" stroke="{STRONG}" stroke-width="{3 if best else 1.5}"/>'
    if best:
        rings += f'<circle cx="{x}" cy="{y}" r="20" stroke="{STRONG}"/>'
    return rings + text(x, y + 5, name, weight="bold" if best else "normal", size=13)


def layer() -> list[str]:
    """The left half."""
    q, k, v, mid = 45, 120, 195, 120
    parts = [text(mid, 20, "normalised input X")]
    parts += [line((mid, 28), (mid, 38), (x, 38), (x, 50)) for x in (q, k, v)]
    parts += [box(q, 65, 56, "W_Q"), box(k, 65, 56, "W_K"), box(v, 65, 56, "W_V")]
    for x, name in ((q, "G4"), (k, "G3"), (v, "G2")):
        parts += [line((x, 80), (x, 100)), gate(x, 115, name), line((x, 130), (x, 150))]
    parts += [box(mid, 165, 206, "softmax(Q Kᵀ / √D) V"), line((mid, 180), (mid, 200)), gate(mid, 220, "G1")]
    parts += [line((mid, 240), (mid, 260)), box(mid, 275, 206, "heads side by side, W_O")]
    parts += [line((mid, 290), (mid, 310)), gate(mid, 325, "G5"), line((mid, 340), (mid, 362))]
    return [*parts, text(mid, 380, "to the residual stream")]


def bar(y: int, start: int, share: float, value: float) -> str:
    """A bar of up to 110 with its number behind it."""
    length = 110 * share
    shape = f'<rect x="{start}" y="{y + 2}" width="{length:.1f}" height="15" fill="{STRONG}" stroke="none"/>'
    return shape + text(start + 6 + length, y + 14, f"{value:.3f}", "start", size=13)


def numbers() -> list[str]:
    """The right half: perplexity won by each place, and the sink."""
    none, best, left = VARIANTS["none"].paper, VARIANTS["g1_elementwise"].paper, 280
    parts = [text(left, 46, "Perplexity won by a gate", "start", "bold")]
    parts += [text(left, 65, f"(without: {none.ppl:.3f})", "start")]
    won = {p: none.ppl - VARIANTS[f"{p}_elementwise"].paper.ppl for p in POSITIONS}
    for i, (position, gain) in enumerate(won.items()):
        y = 82 + 26 * i
        parts.append(text(left, y + 14, position.upper(), "start", "bold" if position == "g1" else "normal"))
        parts.append(bar(y, left + 32, gain / max(won.values()), gain))
    parts += [text(left, 254, "Attention spent on", "start", "bold")]
    parts += [text(left, 272, "the first token", "start", "bold")]
    for i, (words, share) in enumerate((("none", none.f_attn), ("G1", best.f_attn))):
        y = 288 + 26 * i
        parts += [text(left, y + 14, words, "start"), bar(y, left + 40, share / none.f_attn, share)]
    parts += [text(left, 366, "the paper’s numbers,", "start", size=12)]
    return [*parts, text(left, 382, "15B mixture of experts", "start", size=12)]


def alt() -> str:
    """What the picture says, in words."""
    won = ", ".join(
        f"{p.upper()} {VARIANTS['none'].paper.ppl - VARIANTS[f'{p}_elementwise'].paper.ppl:.3f}" for p in POSITIONS
    )
    share = f"{VARIANTS['none'].paper.f_attn} to {VARIANTS['g1_elementwise'].paper.f_attn}"
    return f"{ALT}Perplexity won in the paper: {won}. A gate at G1 lowers attention on the first token from {share}."


def draw() -> str:
    """The whole drawing as SVG."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{alt()}" '
        f'font-family="system-ui, sans-serif">'
    )
    shapes = "\n".join([*layer(), *numbers()]).replace("<text ", f'<text fill="{INK}" stroke="none" ')
    return f'{head}\n<g fill="none" stroke="{INK}" stroke-width="1.5">\n{shapes}\n</g>\n</svg>\n'


if __name__ == "__main__":
    TARGET.write_text(draw(), encoding="utf-8")
    print(f"wrote {TARGET}")

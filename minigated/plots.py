"""Figures of the book, one function each. Colours and strokes are chosen to be read on white and on dark pages."""

import base64
import html
import io

import matplotlib

matplotlib.use("Agg", force=False)
import matplotlib.pyplot as plt  # noqa: E402

# Mid-tone colours (Okabe and Ito's set, darkened where white would swallow them); a marker and a dash go with each,
# so that no figure needs its colours.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#B8860B", "#CC79A7", "#6A5ACD")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
INK = "#7a7f87"  # readable on both palettes

plt.rcParams.update(
    {
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": INK, "grid.alpha": 0.25,
        "font.size": 11, "legend.frameon": False, "figure.dpi": 100, "savefig.dpi": 140, "figure.figsize": (5.4, 3.2),
    }
)  # fmt: skip


def style(index: int) -> dict:
    """Colour, marker and dash of the index-th curve, as keyword arguments of `Axes.plot`."""
    return {"color": COLORS[index % 6], "marker": MARKERS[index % 6], "linestyle": DASHES[index % 6], "markersize": 5}


def show(figure, alt: str, caption: str) -> None:
    """Displays a figure in a notebook as one HTML <figure> with alternative text and a caption.

    Args:
        figure: a matplotlib figure; it is closed.
        alt: what the picture shows, for those who cannot see it.
        caption: what to look for; plain text.
    """
    from IPython.display import HTML, display

    display(HTML(as_html(figure, alt, caption)))


def as_html(figure, alt: str, caption: str) -> str:
    """What `show` displays."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "minigated"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    picture = f'<img alt="{html.escape(alt, quote=True)}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"

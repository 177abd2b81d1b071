"""A small executed notebook with everything that a chapter uses, for the tests of the site. No kernel is needed."""

import base64
import io

import matplotlib
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

MARKERS = ("marker-text-cell", "marker-stream", "marker-result", "marker-html-table", "marker-caption", "marker-last")
INTRO = r"""# 99. A sample chapter

One paragraph with inline math $\sigma(x) = 1/(1+e^{-x})$, a [link to the notation](../docs/notation.md),
one to [the attention module](../minigated/attention.py), and marker-text-cell. A list without a blank line
before it:
- one item with $a_{ij}$
  - a nested item indented by two
- another

An equation that follows a line of text:
$$
Y' = Y \odot \sigma(X W_\theta) \tag{5}
$$
and text right behind it. <a id="eq-5"></a>"""
TABLE = r"""## A table, notes, and $\sqrt D$

Rows follow the sentence at once:
| position | score $\mid$ shape | parameters |
|---|---|---:|
| G1 | `[B, T, H, D]` | 201 |
| G2 | `[B, T, K, D]` | 25 |

<div class="admonition note">
<p class="admonition-title">Note</p>

This **bold** text stands in a box. See [equation (5)](#eq-5).

</div>

> [!WARNING]
> An alert as other places write it, with `code`.

<details>
<summary>A folded hint</summary>

Hidden *until* opened, with $x^2$.

</details>"""
LONG = (
    "attention = some_function(first_argument, second_argument, third_argument, fourth_argument)  "
    "# a long line that must scroll, not widen the page"
)


def picture(kind: str, paper: str = "none") -> str:
    """A small curve as a data address; whatever style the package's figures have set, this one looks the same."""
    buffer = io.BytesIO()
    with matplotlib.rc_context():
        plt.rcdefaults()
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "sample"})
        figure, axes = plt.subplots(figsize=(6.4, 3.4), facecolor=paper)
        axes.set_facecolor("none")
        axes.plot([0, 1, 2, 3], [0.9, 0.5, 0.35, 0.3], color="#0072B2", marker="o", label="no gate")
        axes.plot([0, 1, 2, 3], [0.8, 0.3, 0.12, 0.05], color="#D55E00", marker="s", linestyle="--", label="G1")
        axes.set(xlabel="layer", ylabel="attention on the first token")
        for item in (axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()):
            item.set_color("#7a7f87")
        axes.spines[:].set_color("#7a7f87")
        axes.legend(labelcolor="#7a7f87", frameon=False)
        dated = {"metadata": {"Date": None}} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, bbox_inches="tight", facecolor=paper, **dated)
        plt.close(figure)
    name = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{name};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def shown(uri: str, caption: str) -> nbformat.NotebookNode:
    """What `minigated.plots.show` leaves in a notebook."""
    page = f'<figure><img alt="Two falling curves" src="{uri}"><figcaption>{caption}</figcaption></figure>'
    return new_output("display_data", data={"text/html": page, "text/plain": "<IPython.core.display.HTML object>"})


def sample(run: bool = True) -> nbformat.NotebookNode:
    """The notebook, with outputs as a kernel would leave them."""
    table = (
        "<table><caption>marker-html-table</caption><thead><tr><th>variant</th><th>loss</th></tr></thead>"
        "<tbody><tr><td>none</td><td>1.234</td></tr></tbody></table>"
    )
    raw = picture("png", paper="white").partition(",")[2]
    cells = [
        new_markdown_cell(INTRO),
        new_code_cell(
            "import torch\nprint('unique_code_word_one')",
            outputs=[
                new_output("stream", name="stdout", text="marker-stream\n"),
                new_output("stream", name="stdout", text="x" * 200 + "\n\n\nafter two blank lines <b>&</b>\n"),
            ],
        ),
        new_markdown_cell(TABLE),
        new_code_cell(
            LONG, outputs=[new_output("execute_result", data={"text/plain": "'marker-result'"}, execution_count=2)]
        ),
        new_code_cell("show(figure)", outputs=[shown(picture("svg"), "Figure 1. A drawing; marker-caption.")]),
        new_code_cell("show(bitmap)", outputs=[shown(picture("png"), "Figure 2. A bitmap on clear paper.")]),
        new_code_cell(
            "plt.show()", outputs=[new_output("display_data", data={"image/png": raw, "text/plain": "<Figure>"})]
        ),
        new_code_cell("table", outputs=[new_output("display_data", data={"text/html": table, "text/plain": "t"})]),
        new_code_cell(
            "Markdown('unique_code_word_two')",
            outputs=[new_output("display_data", data={"text/markdown": "Loss **1.2** $\\pm$ 0.1", "text/plain": "m"})],
        ),
        new_markdown_cell("## The end\n\n```python\n- not a list\n$$\n```\n\nmarker-last"),
    ]
    notebook = new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    if run:
        notebook.metadata["minigated"] = {
            "run": {"origin": "committed", "device": "a GPU", "scale": "gpu", "torch": "2.11.0", "seconds": 200}
        }
    return notebook

"""Pictures in outputs and generated parts: from data in the page to files beside it, for light and for dark pages."""

import base64
import io
import itertools
import re
from urllib.parse import unquote_to_bytes

from bs4 import BeautifulSoup
from PIL import Image

# The colour in which `minigated.plots` draws axes and text; readable on both, stronger on the page it is meant for.
INK, INK_LIGHT, INK_DARK = "#7a7f87", "#30343b", "#d3d8e0"
FIGURE = re.compile(r"<figure>.*?</figure>", re.DOTALL)
SUFFIX = {"image/png": "png", "image/jpeg": "jpg", "image/gif": "gif", "image/svg+xml": "svg"}


def decode(uri: str) -> tuple[str, bytes]:
    """Kind and content of a `data:` address."""
    head, _, body = uri.partition(",")
    kind = head.removeprefix("data:").split(";")[0]
    return kind, base64.b64decode(body) if ";base64" in head else unquote_to_bytes(body)


def size(kind: str, data: bytes) -> tuple[int, int] | None:
    """Width and height in CSS pixels, where the picture says so."""
    if kind != "image/svg+xml":
        picture = Image.open(io.BytesIO(data))
        scale = 96 / picture.info.get("dpi", (96,))[0]  # 96 CSS pixels are an inch
        return tuple(round(side * min(scale, 1)) for side in picture.size)
    head = data[:2000].decode("utf-8", "replace")
    found = [re.search(rf'<svg[^>]*\b{side}="([\d.]+)(pt|px)?"', head) for side in ("width", "height")]
    if not all(found):
        return None
    return tuple(round(float(m[1]) * (4 / 3 if m[2] == "pt" else 1)) for m in found)


def opaque(kind: str, data: bytes) -> bool:
    """Whether the picture brings its own paper: its corner is not transparent."""
    if kind == "image/svg+xml":
        return False
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    return picture.getpixel((0, 0))[3] > 128


def place(soup: BeautifulSoup, stem: str) -> dict[str, bytes]:
    """Replaces pictures held inside the HTML by files.

    Args:
        soup: outputs of one page; changed in place. A drawing that uses the ink colour becomes two pictures, of
            which the theme shows the one that fits the page's colours.
        stem: address of the files without number and suffix, relative to the page.

    Returns:
        content by address.
    """
    files: dict[str, bytes] = {}
    for number, image in enumerate(soup.select("img[src^='data:']"), start=1):
        kind, data = decode(image["src"])
        if kind not in SUFFIX:
            continue
        if extent := size(kind, data):
            image["width"], image["height"] = map(str, extent)
        image["loading"] = "lazy"
        if opaque(kind, data):
            image["class"] = [*image.get("class", []), "nb-opaque"]
        name = f"{stem}-{number:02d}"
        if kind == "image/svg+xml" and INK.encode() in data:
            twin = BeautifulSoup(str(image), "html.parser").img
            for tag, colours, ink in ((image, "light", INK_LIGHT), (twin, "dark", INK_DARK)):
                files[f"{name}-{colours}.svg"] = data.replace(INK.encode(), ink.encode())
                tag["src"] = f"{name}-{colours}.svg#only-{colours}"
            image.insert_after(twin)
        else:
            files[f"{name}.{SUFFIX[kind]}"] = data
            image["src"] = f"{name}.{SUFFIX[kind]}"
    return files


def beside(text: str, stem: str) -> tuple[str, dict[str, bytes]]:
    """A page's Markdown with the pictures of its figures as files, and these by address; `stem` as in `place`."""
    files: dict[str, bytes] = {}
    numbers = itertools.count(1)

    def moved(found: re.Match) -> str:
        soup = BeautifulSoup(found[0], "html.parser")
        files.update(place(soup, f"{stem}-{next(numbers):02d}"))
        return str(soup)

    return FIGURE.sub(moved, text), files

"""The site in a browser: from disk and from a server, in light and dark, on a wide screen and on a phone."""

import contextlib
import functools
import http.server
import io
import json
import os
import shutil
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import site_build
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

CHROME = os.environ.get("CHROME") or shutil.which("chromium")
DRIVER = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (CHROME and DRIVER), reason="no chromium and chromedriver; apt install chromium chromium-driver"
    ),
]
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars"
)
PHONE, DESK = 390, 1280
SAMPLE = "chapters/99_sample.html"
SETTINGS = [("file", "light", DESK), ("file", "dark", PHONE), ("http", "light", PHONE), ("http", "dark", DESK)]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


DRAWN = "return !document.querySelector('article .arithmatex:not([data-rendered])')"  # its script may come late


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    return site_build.build(tmp_path_factory)[0]


@pytest.fixture(scope="module")
def origins(site):
    """Where the site lies, on disk and on a server."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"file": site.as_uri(), "http": f"http://127.0.0.1:{server.server_port}"}
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def chrome(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROME
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def visit(chrome, origins):
    """Opens a page: visit("file", "dark", PHONE, "index.html")."""

    def go(origin: str, colours: str, width: int, page: str):
        chrome.get("about:blank")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
        chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        feature = {"name": "prefers-color-scheme", "value": colours}
        chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        chrome.get_log("browser"), chrome.get_log("performance")  # what came before is of no interest
        chrome.get(f"{origins[origin]}/{page}")
        with contextlib.suppress(TimeoutException):  # then the tests say what is missing
            WebDriverWait(chrome, 10, 0.05).until(lambda driver: driver.execute_script(DRAWN))
        return chrome

    return go


def pages(site: Path) -> list[str]:
    """Every page but the API's, and three of these."""
    found = [p.relative_to(site).as_posix() for p in sorted(site.rglob("*.html"))]
    return [p for p in found if not p.startswith("api/") and p != "404.html"] + [
        "api/index.html",
        "api/attention.html",
        "api/data/text.html",
    ]


def requests(driver) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def luminance(colour: tuple[int, ...]) -> float:
    parts = [c / 255 for c in colour[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def background(driver) -> float:
    rgb = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    return luminance(tuple(int(float(v)) for v in rgb[rgb.index("(") + 1 : -1].split(",")))


@pytest.mark.parametrize(("origin", "colours", "width"), SETTINGS)
def test_every_page_reads_well(site, visit, origin, colours, width):
    allowed = {"file": ("file", "data", "blob"), "http": ("http", "data", "blob")}[origin]
    for page in pages(site) if origin == "file" else ["index.html", SAMPLE]:
        driver = visit(origin, colours, width, page)
        math = driver.execute_script(
            "const all = [...document.querySelectorAll('article .arithmatex')];"
            "return [all.length, all.filter(n => n.querySelector('.katex')).length,"
            " document.querySelectorAll('.katex-error').length]"
        )
        assert math[0] == math[1] and math[2] == 0, f"{page}: mathematics {math}"
        wide = driver.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width, f"{page}: {wide} pixels wide"
        assert (background(driver) < 0.1) == (colours == "dark"), page
        foreign = [
            url
            for url in requests(driver)
            if urlsplit(url).scheme not in allowed or urlsplit(url).hostname not in (None, "", "127.0.0.1")
        ]
        assert not foreign, (page, foreign)
        assert not [e for e in driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")], page


def test_mathematics_in_the_table_of_contents(visit):
    driver = visit("file", "light", DESK, SAMPLE)
    entry = driver.find_element(By.CSS_SELECTOR, ".md-nav--secondary .md-nav__link .katex")
    assert "√" in entry.text or driver.find_elements(By.CSS_SELECTOR, ".md-nav--secondary .sqrt")


@pytest.mark.parametrize(("origin", "width"), [("file", DESK), ("file", PHONE), ("http", DESK)])
def test_search_finds_a_word_of_a_cell(visit, origin, width):
    driver = visit(origin, "light", width, "index.html")
    if width == PHONE:
        driver.find_element(By.CSS_SELECTOR, "label.md-header__button[for='__search']").click()
    field = WebDriverWait(driver, 10).until(lambda d: d.find_element(By.CSS_SELECTOR, "input.md-search__input"))
    WebDriverWait(driver, 10).until(lambda d: field.is_displayed())
    field.send_keys("unique_code_word_one")
    results = WebDriverWait(driver, 20).until(
        lambda d: d.find_elements(By.CSS_SELECTOR, ".md-search-result__item a.md-search-result__link")
    )
    assert "99_sample.html" in results[0].get_attribute("href")


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_figures_are_legible(visit, colours):
    driver = visit("file", colours, DESK, SAMPLE)
    paper = background(driver)
    driver.execute_script("document.querySelectorAll('article img').forEach(i => i.loading = 'eager')")
    images = [i for i in driver.find_elements(By.CSS_SELECTOR, "article img") if i.is_displayed()]
    assert len(images) == 3  # of the drawing's two, the one for these colours
    assert f"-{colours}.svg" in images[0].get_attribute("src")
    WebDriverWait(driver, 10).until(lambda d: all(i.get_property("naturalWidth") for i in images))
    for number, image in enumerate(images):
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", image)
        picture = Image.open(io.BytesIO(image.screenshot_as_png)).convert("RGB")
        corner = luminance(picture.getpixel((2, 2)))
        if number < 2:  # transparent: the page's own colour shows through
            assert contrast(corner, paper) < 1.1
        ground = luminance(picture.getpixel((picture.width // 2, picture.height - 3)))
        best = max(contrast(luminance(c), ground) for _, c in picture.getcolors(1 << 24))
        assert best > (7 if number == 0 else 3.5), f"figure {number} is pale: {best:.1f}"


def test_keyboard_reaches_content_and_what_scrolls(visit):
    driver = visit("file", "light", PHONE, SAMPLE)
    driver.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    skip = driver.switch_to.active_element
    assert "md-skip" in skip.get_attribute("class")
    skip.send_keys(Keys.ENTER)
    assert driver.current_url.endswith("#99-a-sample-chapter")
    closed = driver.execute_script(
        "return [...document.querySelectorAll('.nb-output pre, .nb-table')]"
        ".filter(n => n.scrollWidth > n.clientWidth && n.tabIndex < 0).length"
    )
    assert closed == 0
    wide = [p for p in driver.find_elements(By.CSS_SELECTOR, ".nb-output pre") if p.get_attribute("tabindex") == "0"]
    assert wide, "the sample has a line that is wider than a phone"
    summary = driver.find_element(By.CSS_SELECTOR, "details summary")
    summary.send_keys(Keys.ENTER)
    assert driver.find_element(By.CSS_SELECTOR, "details").get_property("open")


def test_colours_can_be_chosen(visit):
    driver = visit("file", "light", DESK, "index.html")
    toggle = "form[data-md-component=palette] label:not([hidden])"
    seen = set()
    for _ in range(3):
        driver.find_element(By.CSS_SELECTOR, toggle).click()
        seen.add(driver.execute_script("return document.body.getAttribute('data-md-color-scheme')"))
    assert seen == {"default", "slate"}


def test_equation_numbers_do_not_cover_equations(visit):
    driver = visit("file", "light", PHONE, SAMPLE)
    base, tag = (
        driver.find_element(By.CSS_SELECTOR, f".katex-display .katex-html > {part}").rect
        for part in (".katex-base:nth-last-child(2)", ".katex-tag")
    )
    assert base["x"] + base["width"] <= tag["x"] + 1

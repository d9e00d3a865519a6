"""The report in headless Chromium: no error, nothing is fetched, readable in light and dark mode and on a phone.

Run with `make browser`; it needs a Chromium on the PATH.
"""

import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.helpers.reported import make_runs, report

pytestmark = pytest.mark.browser

LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 900}},
    "phone": {
        "color_scheme": "light",
        "viewport": {"width": 390, "height": 844},
        "is_mobile": True,
        "has_touch": True,
    },
}
PER_CLASS = {"train": 40, "test": 20}  # images of CIFAR-10


@pytest.fixture(scope="module")
def digits(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of runs on digits of all kinds, one of them unfinished."""
    folder = tmp_path_factory.mktemp("digits")
    make_runs(tiny, folder)
    report(folder)
    return folder / "report/report.html"


@pytest.fixture(scope="module")
def cifar(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a student of two public teachers, ResNet-56 and ResNet-20, on JPEG images of CIFAR-10."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("cifar")
    with tarfile.open(shared / "data/cifar10-jpeg/cifar10-jpeg.tar.gz") as archive:
        archive.extractall(folder / "all", filter=_select_first)
    data = ("--data", f"folder:{folder / 'all'}")
    caches = []
    for depth, name in ((56, "resnet56-4bfd9763.th"), (20, "resnet20-12fca82f.th")):
        caches += ["--cache", str(folder / f"r{depth}")]
        main(
            [
                "teacher-cache",
                *data,
                "--teacher",
                f"resnet{depth}",
                "--weights",
                str(shared / "weights" / name),
                "--normalize",
                "imagenet",
                "--views",
                "crop-flip",
                "--draws",
                "1",
                "--out",
                caches[-1],
            ]
        )
    run = str(folder / "runs/two-teachers")
    main(
        [
            "student",
            *data,
            *caches,
            "--combine",
            "learned",
            "--arch",
            "resnet8",
            "--epochs",
            "2",
            "--baseline",
            "--batch-size",
            "50",
            "--learning-rate",
            "0.02",
            "--out",
            run,
        ]
    )
    report(folder, run)
    return folder / "report/report.html"


def _select_first(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
    """Extract only the first images of each class."""
    name = Path(member.name)
    if member.isfile() and int(name.stem) >= PER_CLASS[name.parts[0]]:
        return None
    return tarfile.data_filter(member, path)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    executable = shutil.which("chromium")
    assert executable, "these tests need a Chromium on the PATH: apt-get install chromium"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(params=["digits", "cifar"])
def file(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(params=LOOKS)
def page_and_log(request: pytest.FixtureRequest, browser: Browser, file: Path) -> Iterator[tuple[Page, list[str]]]:
    """The loaded page, and a list of its requests, console messages and errors."""
    context = browser.new_context(**LOOKS[request.param])
    page, log = context.new_page(), []
    page.on("console", lambda message: log.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: log.append(f"error: {error}"))
    page.on("request", lambda sent: log.append(sent.url) if not sent.url.startswith("data:image/") else None)
    page.goto(file.as_uri())
    yield page, log
    context.close()


def test_nothing_is_fetched_nothing_fails_and_every_image_is_shown(
    page_and_log: tuple[Page, list[str]], file: Path
) -> None:
    page, log = page_and_log
    page.wait_for_load_state("networkidle")
    sizes = page.evaluate("[...document.images].map(image => image.complete ? image.naturalWidth : 0)")
    assert len(sizes) > 10
    assert min(sizes) > 0
    assert log == [file.as_uri()]
    assert page.evaluate("document.images.length") == page.evaluate("document.querySelectorAll('img[alt]').length")


def test_the_page_is_not_wider_than_its_window(page_and_log: tuple[Page, list[str]]) -> None:
    page, _ = page_and_log
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    cut = page.evaluate(
        """[...document.querySelectorAll("main *")]
        .filter(element => element.clientWidth && element.scrollWidth > element.clientWidth + 1)
        .map(element => element.tagName + "." + element.className + " " + element.textContent.slice(0, 40))"""
    )
    assert not cut, cut  # nothing has to be scrolled sideways


def test_all_text_has_the_contrast_of_wcag_aa(page_and_log: tuple[Page, list[str]]) -> None:
    """4.5 to 1, of large text 3 to 1, against the nearest background; with all sections unfolded."""
    page, _ = page_and_log
    page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
    texts = page.evaluate(CONTRASTS)
    assert len(texts) > 200
    assert [text for text in texts if text["ratio"] < text["least"]] == []


CONTRASTS = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => numbers(colour).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const background = (element) => {
    for (let node = element; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor, parts = numbers(colour);
      if (parts.length < 4 || parts[3] === 1) return colour;
      if (parts[3] > 0) throw new Error("half transparent");
    }
    return matchMedia("(prefers-color-scheme: dark)").matches ? "rgb(0,0,0)" : "rgb(255,255,255)";
  };
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    const style = getComputedStyle(element), size = parseFloat(style.fontSize);
    const [a, b] = [luminance(style.color), luminance(background(element))].sort((x, y) => y - x);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    texts.push({text: text.slice(0, 40), ratio: (a + 0.05) / (b + 0.05), least: large ? 3 : 4.5});
  }
  return texts;
}"""


def read_column(page: Page, column: int) -> list[str]:
    """The cells of a column of the first table, from top to bottom."""
    rows = "[...document.querySelector('table').tBodies[0].rows]"
    cells: list[str] = page.evaluate(f"column => {rows}.map(row => row.cells[column].textContent.trim())", column)
    return cells


def count_unfinished(page: Page) -> int:
    """The number of rows of unfinished runs, after checking that they are the last ones of the first table."""
    rows = "[...document.querySelector('table').tBodies[0].rows]"
    flags: list[bool] = page.evaluate(f"{rows}.map(row => row.classList.contains('unfinished'))")
    assert flags == sorted(flags)
    return sum(flags)


def parse_numbers(cells: list[str]) -> list[float]:
    return [float(cell.split(" ")[0].replace(",", "")) for cell in cells if cell != "–"]


def test_a_click_on_a_title_sorts_and_another_reverses_the_order(page_and_log: tuple[Page, list[str]]) -> None:
    page, log = page_and_log
    titles = page.locator("table").first.locator("thead button")
    names = titles.all_inner_texts()
    finished = len(read_column(page, 0)) - count_unfinished(page)
    for title in ("accuracy, %", "parameters", "NLL"):
        column = next(i for i, name in enumerate(names) if name.startswith(title))
        before = read_column(page, column)[:finished]
        titles.nth(column).click()
        descending = read_column(page, column)[:finished]
        numbers = parse_numbers(descending)
        assert numbers == sorted(parse_numbers(before), reverse=True)
        assert all(cell == "–" for cell in descending[len(numbers) :])  # unknown values come last
        assert page.locator("thead th").nth(column).get_attribute("aria-sort") == "descending"
        titles.nth(column).click()
        assert parse_numbers(read_column(page, column)[:finished]) == sorted(parse_numbers(before))
        assert page.locator("table").first.locator("[aria-sort]").count() == 1
        count_unfinished(page)
    for reverse in (False, True):
        titles.nth(0).click()
        cells = read_column(page, 0)[:finished]
        assert cells == sorted(cells, key=str.lower, reverse=reverse)
    assert len(log) == 1


def test_a_plot_on_a_dark_page_has_light_text(browser: Browser, digits: Path) -> None:
    """Text is almost black on white, and almost white on the dark background."""
    greys = {}
    for look in ("light", "dark"):
        context = browser.new_context(**LOOKS[look])
        page = context.new_page()
        page.goto(digits.as_uri())
        page.evaluate("document.querySelector('details').open = true")
        screenshot = page.locator("details figure img").first.screenshot(type="png")
        greys[look] = _measure_greys(screenshot)
        context.close()
    assert greys["light"][0] < 60
    assert greys["light"][1] > 245
    assert greys["dark"][0] < 40
    assert greys["dark"][1] > 210
    assert greys["light"][2] > 200 > 60 > greys["dark"][2]  # the background


def _measure_greys(screenshot: bytes) -> tuple[float, float, float]:
    """The darkest, lightest and most frequent grey of an image."""
    import io

    import numpy as np
    from PIL import Image

    grey = np.asarray(Image.open(io.BytesIO(screenshot)).convert("L"))
    return float(grey.min()), float(grey.max()), float(np.bincount(grey.ravel()).argmax())


def test_in_print_every_section_is_unfolded_and_the_background_white(browser: Browser, digits: Path) -> None:
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto(digits.as_uri())
    page.evaluate("for (const details of document.querySelectorAll('details')) details.open = false")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.querySelectorAll('details[open]').length") == 0
    context.close()

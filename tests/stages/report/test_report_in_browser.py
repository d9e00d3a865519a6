"""The report as people see it, in headless Chromium: no error, nothing fetched, readable in light, dark, on a phone.

Run with `make browser`; Chromium is the system's own.
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
PER_CLASS = {"train": 40, "test": 20}  # images of CIFAR-10 that the teachers are asked about


@pytest.fixture(scope="module")
def digits(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of digits runs of all kinds, an unfinished one among them."""
    folder = tmp_path_factory.mktemp("digits")
    make_runs(tiny, folder)
    report(folder)
    return folder / "report/report.html"


@pytest.fixture(scope="module")
def cifar(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a student of the public ResNet-56 and ResNet-20, on some JPEG images of CIFAR-10."""
    from softcache.stages.main import main

    folder = tmp_path_factory.mktemp("cifar")
    with tarfile.open(shared / "data/cifar10-jpeg/cifar10-jpeg.tar.gz") as archive:
        archive.extractall(folder / "all", filter=_some)
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


def _some(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
    """The first images of each class alone."""
    place = Path(member.name)
    if member.isfile() and int(place.stem) >= PER_CLASS[place.parts[0]]:
        return None
    return tarfile.data_filter(member, path)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = shutil.which("chromium")
    assert found, "these tests want a Chromium on the PATH: apt-get install chromium"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(params=["digits", "cifar"])
def file(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=LOOKS)
def opened(request: pytest.FixtureRequest, browser: Browser, file: Path) -> Iterator[tuple[Page, list[str]]]:
    """The page, and all that it has asked for or complained about."""
    context = browser.new_context(**LOOKS[request.param])
    page, heard = context.new_page(), []
    page.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: heard.append(f"error: {error}"))
    page.on("request", lambda asked: heard.append(asked.url) if not asked.url.startswith("data:image/") else None)
    page.goto(file.as_uri())
    yield page, heard
    context.close()


def test_nothing_is_fetched_nothing_fails_and_every_picture_is_there(
    opened: tuple[Page, list[str]], file: Path
) -> None:
    page, heard = opened
    page.wait_for_load_state("networkidle")
    sizes = page.evaluate("[...document.images].map(one => one.complete ? one.naturalWidth : 0)")
    assert len(sizes) > 10
    assert min(sizes) > 0
    assert heard == [file.as_uri()]
    assert page.evaluate("document.images.length") == page.evaluate("document.querySelectorAll('img[alt]').length")


def test_the_page_is_as_wide_as_its_window(opened: tuple[Page, list[str]]) -> None:
    page, _ = opened
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_all_text_has_the_contrast_of_wcag_aa(opened: tuple[Page, list[str]]) -> None:
    """4.5 to 1, of large text 3 to 1, against the nearest paper behind it; folded parts unfolded."""
    page, _ = opened
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 200
    assert [one for one in found if one["ratio"] < one["least"]] == []


CONTRASTS = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => numbers(colour).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor, parts = numbers(colour);
      if (parts.length < 4 || parts[3] === 1) return colour;
      if (parts[3] > 0) throw new Error("half transparent");
    }
    return matchMedia("(prefers-color-scheme: dark)").matches ? "rgb(0,0,0)" : "rgb(255,255,255)";
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    const style = getComputedStyle(element), size = parseFloat(style.fontSize);
    const [a, b] = [light(style.color), light(behind(element))].sort((x, y) => y - x);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    found.push({text: text.slice(0, 40), ratio: (a + 0.05) / (b + 0.05), least: large ? 3 : 4.5});
  }
  return found;
}"""


def column(page: Page, place: int) -> list[str]:
    """The cells of a column of the first table, from top to bottom."""
    rows = "[...document.querySelector('table').tBodies[0].rows]"
    cells: list[str] = page.evaluate(f"place => {rows}.map(row => row.cells[place].textContent.trim())", place)
    return cells


def numbers_of(cells: list[str]) -> list[float]:
    return [float(cell.split(" ")[0].replace(",", "")) for cell in cells if cell != "–"]


def test_a_click_on_a_title_sorts_and_another_turns_it_round(opened: tuple[Page, list[str]]) -> None:
    page, heard = opened
    titles = page.locator("table").first.locator("thead button")
    names = titles.all_inner_texts()
    for title in ("accuracy, %", "parameters", "NLL"):
        place = next(i for i, name in enumerate(names) if name.startswith(title))
        before = column(page, place)
        titles.nth(place).click()
        down = column(page, place)
        assert numbers_of(down) == sorted(numbers_of(before), reverse=True)
        assert all(cell == "–" for cell in down[len(numbers_of(down)) :])  # what is not known comes last
        assert page.locator("thead th").nth(place).get_attribute("aria-sort") == "descending"
        titles.nth(place).click()
        assert numbers_of(column(page, place)) == sorted(numbers_of(before))
        assert page.locator("table").first.locator("[aria-sort]").count() == 1
    titles.nth(0).click()
    assert column(page, 0) == sorted(column(page, 0), key=str.lower)
    titles.nth(0).click()
    assert column(page, 0) == sorted(column(page, 0), key=str.lower, reverse=True)
    assert len(heard) == 1


def test_a_picture_of_a_dark_page_has_light_ink(browser: Browser, digits: Path) -> None:
    """The title of the curves: its darkest point on white, its lightest on a dark page."""
    inks = {}
    for look in ("light", "dark"):
        context = browser.new_context(**LOOKS[look])
        page = context.new_page()
        page.goto(digits.as_uri())
        page.evaluate("document.querySelector('details').open = true")
        shot = page.locator("details figure img").first.screenshot(type="png")
        inks[look] = _grey(shot)
        context.close()
    assert inks["light"][0] < 60
    assert inks["light"][1] > 245
    assert inks["dark"][0] < 40
    assert inks["dark"][1] > 210
    assert inks["light"][2] > 200 > 60 > inks["dark"][2]  # the paper


def _grey(shot: bytes) -> tuple[float, float, float]:
    """Darkest, lightest and most frequent grey of a image."""
    import io

    import numpy as np
    from PIL import Image

    grey = np.asarray(Image.open(io.BytesIO(shot)).convert("L"))
    return float(grey.min()), float(grey.max()), float(np.bincount(grey.ravel()).argmax())


def test_printed_every_part_is_unfolded_and_the_paper_white(browser: Browser, digits: Path) -> None:
    context = browser.new_context(color_scheme="dark")
    page = context.new_page()
    page.goto(digits.as_uri())
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = false")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.querySelectorAll('details[open]').length") == 0
    context.close()

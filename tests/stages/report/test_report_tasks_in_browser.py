"""The report of labels, numbers and embeddings in headless Chromium: no error, nothing fetched, nothing cut.

Run with `make browser`; it needs a Chromium on the PATH.
"""

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

from tests.helpers.task_runs import TASKS, call

pytestmark = pytest.mark.browser
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "phone": {"color_scheme": "dark", "viewport": {"width": 390, "height": 844}, "is_mobile": True},
}
MAIN = {"labels": "mAP, %", "numbers": "RMSE", "embedding": "cosine"}
CUT = """[...document.querySelectorAll("main *")]
    .filter(element => element.clientWidth && element.scrollWidth > element.clientWidth + 1)
    .map(element => element.tagName + "." + element.className + " " + element.textContent.slice(0, 40))"""
COLUMN = "(table, column) => [...table.tBodies[0].rows].map(row => row.cells[column].textContent.trim())"


@pytest.fixture(scope="module", params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def file(task_folder: Path, task: str) -> Path:
    with contextlib.redirect_stdout(io.StringIO()):
        call(task_folder, "report", f"runs/{task}-a", f"runs/{task}-b", "--out", f"report-{task}", "--show", 3)
    return task_folder / f"report-{task}/report.html"


@pytest.mark.parametrize("look", LOOKS)
def test_the_page_is_shown_whole_and_its_table_sorted_by_the_main_figure(file: Path, task: str, look: str) -> None:
    executable = shutil.which("chromium")
    assert executable, "this test needs a Chromium on the PATH: apt-get install chromium"
    log: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_context(**LOOKS[look]).new_page()
        page.on("console", lambda message: log.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: log.append(f"error: {error}"))
        page.on("request", lambda sent: log.append(sent.url) if not sent.url.startswith("data:image/") else None)
        page.goto(file.as_uri())
        page.wait_for_load_state("networkidle")
        page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
        sizes = page.evaluate("[...document.images].map(image => image.complete ? image.naturalWidth : 0)")
        assert len(sizes) >= 2 * (2 + 3)  # curves, the plot of the task and three images, of each run
        assert min(sizes) > 0
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.evaluate(CUT) == []
        if look == "light":  # on a phone a table has no titles
            table = page.locator("table").first
            titles = table.locator("thead button").all_inner_texts()
            column = next(i for i, title in enumerate(titles) if title.startswith(MAIN[task]))
            table.locator("thead button").nth(column).click()
            cells = table.evaluate(COLUMN, column)
            values = [float(cell.split(" ")[0]) for cell in cells if cell != "–"]
            assert len(values) >= 2
            assert values == sorted(values, reverse=True)
        assert log == [file.as_uri()]
        browser.close()

"""A Chromium of the system's packages, without a window, and what tests of pages ask it."""

import shutil
from contextlib import contextmanager

import pytest

from cream.reporting import export

WIDTHS = {"desk": (1280, 900), "phone": (390, 844)}
SERIOUS = ("serious", "critical")  # of axe-core's four


def launched():
    """A running Chromium, for a fixture; skipped where there is none."""
    path = next(filter(None, map(shutil.which, export.BROWSERS)), None)
    if path is None:
        pytest.skip("needs Chromium from the system's packages (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield running
        running.close()


@contextmanager
def new_tab(chromium, width: str):
    """A tab. At the end: no error on the console, and nothing was asked of any network."""
    size = dict(zip(("width", "height"), WIDTHS[width], strict=True))
    context = chromium.new_context(viewport=size, color_scheme="light")
    tab, said, asked = context.new_page(), [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    yield tab
    context.close()
    assert said == [] and {url.partition(":")[0] for url in asked} <= {"file", "blob", "data"}


def expect(tab, selector: str, text: str) -> None:
    """Waits until an element has a text."""
    tab.wait_for_function(
        "([selector, text]) => document.querySelector(selector)?.textContent.includes(text)", arg=[selector, text]
    )


def draw_all(tab, figures: str) -> int:
    """Brings all figures of a selector near the window, where each is drawn; returns their number."""
    for figure in tab.locator(figures).all():
        figure.scroll_into_view_if_needed()
    count = tab.locator(figures).count()
    drawn = "([some, count]) => document.querySelectorAll(`${some}:has(svg)`).length === count"
    tab.wait_for_function(drawn, arg=[figures, count])
    return count


def barriers(tab) -> dict[str, list[str]]:
    """What axe-core finds serious or critical: its rule -> elements."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(tab).response["violations"]
    return {each["id"]: [node["html"] for node in each["nodes"]] for each in found if each["impact"] in SERIOUS}

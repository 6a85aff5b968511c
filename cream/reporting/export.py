"""Figures as PNG and SVG files, by the browser that draws them in a page: plotly has no other way to draw."""

import base64
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

import msgspec

from cream.errors import UserError
from cream.files import store
from cream.reporting import page
from cream.reporting.figures import plotly
from cream.reporting.page import Section

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
SIZES = {"svg": (800, 480, 1), "png": (800, 480, 2)}  # width, height, and pixels for each of these
SECONDS = 120
DRAWN = re.compile(r'<img id="([\w-]+)\.(png|svg)" src="data:image/[^,;]*(;base64)?,([^"]*)"')
DRAW = """
(async () => {
  await page.library("plotly");
  for (const [id, { data, layout, title }] of Object.entries(await page.data("figures"))) {
    for (const [format, [width, height, scale]] of Object.entries(await page.data("sizes"))) {
      const image = document.createElement("img");
      const heading = { text: title, y: 0.97, yanchor: "top" };
      const shown = { ...layout, title: heading, paper_bgcolor: "#ffffff", margin: { t: 90, r: 30 } };
      image.id = `${id}.${format}`;
      image.src = await Plotly.toImage({ data, layout: shown }, { format, width, height, scale });
      document.body.append(image);
    }
  }
})();
"""


def find_browser() -> str:
    """The command of a Chromium or Chrome: $BROWSER_PATH, or the first one on the path. Raises UserError without."""
    named = os.environ.get("BROWSER_PATH")
    found = next(filter(None, map(shutil.which, [named] if named else BROWSERS)), None)
    if found is None:
        why = f"BROWSER_PATH={named} is not a program" if named else "there is no Chromium or Chrome on the path"
        raise UserError(
            f"--figures: {why}, which draws the figures. Install one (on Debian or Ubuntu: apt install chromium), or "
            "name it in BROWSER_PATH; --output and --json need none"
        )
    return found


def write_figures(sections: Sequence[Section], folder: Path, browser: str) -> list[Path]:
    """Write FIGURE.svg and FIGURE.png of each figure of the sections. Raises UserError where the browser fails."""
    plots: dict[str, dict] = {}
    for each in sections:
        plots |= msgspec.json.decode(each.data.get(f"{each.id}-figures", b"{}"))
    if not plots:
        return []
    data = {"figures": msgspec.json.encode(plots), "sizes": msgspec.json.encode(SIZES)}
    html = page.build("figures", [Section("draw", "", "", data, DRAW, libraries={"plotly": plotly()})])
    found = [*DRAWN.finditer(_run(browser, html))]
    if len(found) < len(plots) * len(SIZES):
        raise UserError(f"--figures: {browser} drew {len(found)} of {len(plots) * len(SIZES)} pictures")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, form, packed, content in (match.groups() for match in found):
        text = unquote(content.replace("&amp;", "&"))
        paths.append(folder / f"{name}.{form}")
        with store.atomic(paths[-1]) as file:
            file.write(base64.b64decode(text) if packed else text.encode())
    return paths


def _run(browser: str, html: str) -> str:
    """The page as it is after its scripts have run."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "page.html").write_text(html, encoding="utf-8")
        argv = [browser, "--headless", "--disable-gpu", f"--user-data-dir={folder}/profile", "--dump-dom"]
        argv += ["--no-sandbox"] if os.geteuid() == 0 else []  # which refuses to run as root
        argv += [f"--virtual-time-budget={1000 * SECONDS}", f"file://{folder}/page.html"]
        try:
            return subprocess.run(argv, capture_output=True, timeout=SECONDS, check=True).stdout.decode(
                errors="replace"
            )
        except (subprocess.SubprocessError, OSError) as error:
            raise UserError(f"--figures: {browser} failed: {error}") from None

"""The report page's browser of preferences at full size: file, first paint, filters, memory, against the targets.

    python benchmarks/report_page.py
    python benchmarks/report_page.py --prompts 200 --rounds 1

Synthetic rewards of --prompts prompts with --responses responses each, half of whose words are those of the response
before, as of samples of one model: words of this repository's English by frequency. The page is built from files as a
loop leaves them, and opened in the system's Chromium, without a window, from disk. First paint is the browser's own
entry; the latency of a filter is from the event of the input until the list is painted again; memory is the page's heap
after all texts were searched.
"""

import json
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from measure import machine
from options import Options

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cream.consistency import consistency  # noqa: E402
from cream.files import store  # noqa: E402
from cream.records import Message, Pair, Rewards  # noqa: E402
from cream.reporting import browser, page  # noqa: E402

TARGETS = {"file (MB)": 25, "first paint (ms)": 2000, "filter (ms)": 100, "search (ms)": 100}
# Sets a field as a user does, and waits until the list shows the result.
FILTER = """async ([name, value]) => {
  const form = document.querySelector("#preferences form"), start = performance.now();
  const list = document.querySelector("#preferences [role=listbox]");
  form[name].value = value;
  form[name].dispatchEvent(new Event("input", { bubbles: true }));
  while (list.ariaBusy === "true") await new Promise((resolve) => setTimeout(resolve));
  await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
  return performance.now() - start;
}"""


def main() -> None:
    parser = Options(__doc__)
    parser.add("--prompts", 20_000, "prompts")
    parser.add("--responses", 5, "responses to each")
    parser.add("--words", 60, "words of a response, on average; a prompt has half as many")
    parser.add("--rounds", 5, "times that the page is opened")
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        group = make(Path(folder), args)
        start = time.perf_counter()
        made = browser.section([group])
        path.write_text(page.build("Benchmark", [made]), encoding="utf-8")
        seconds, read = time.perf_counter() - start, group.rewards.stat().st_size / 1e6
        print(f"built in {seconds:.1f} s from {read:.0f} MB of rewards by each model")
        shown = json.loads(made.data["preferences-index"])["prompts"]
        print(f"{shown['shown']} of {shown['all']} prompts are in the page")
        found = {"file (MB)": [path.stat().st_size / 1e6], **measure(path, args.rounds)}
    for name, values in found.items():
        middle, target = statistics.median(values), TARGETS.get(name)
        said = "" if target is None else f"   target {target}: {'met' if middle <= target else 'MISSED'}"
        print(f"{name:<28}{middle:>9.1f}   ({min(values):.1f} to {max(values):.1f}){said}")


def make(folder: Path, args) -> browser.Group:
    """Rewards by two models, and the pairs of the best and the worst response."""
    draw = random.Random(0)
    text = "\n".join(
        path.read_text(encoding="utf-8") for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("cream/**/*.py"))
    )
    words = re.findall(r"[\w'.,]+", text)
    current, previous, pairs = [], [], []
    for number in range(args.prompts):
        messages = [Message("user", " ".join(draw.choices(words, k=draw.randint(2, args.words))))]
        said = draw.choices(words, k=draw.randint(2, 2 * args.words))
        conversations = []
        for _ in range(args.responses):
            said = [word if draw.random() < 0.5 else draw.choice(words) for word in said]
            conversations.append([*messages, Message("assistant", " ".join(said))])
        first = [draw.gauss(0, 2) for _ in conversations]
        second = [value + draw.gauss(0, 2) for value in first]
        uuid = f"{('gsm8k', 'arc_easy', 'siqa')[number % 3]}-train-{number:05d}"
        for rewards, records in ((first, current), (second, previous)):
            records.append(Rewards(uuid=uuid, prompt=messages, response=conversations, reward=rewards))
        best, worst = first.index(max(first)), first.index(min(first))
        c, tau = (float(value[0]) for value in consistency([first], [second]))
        facts = {"consistency": c, "tau": tau, "margin": first[best] - first[worst]}
        places = {"selected": conversations[best], "rejected": conversations[worst]}
        pairs.append(Pair(uuid=uuid, prompt=messages, **places, selected_index=best, rejected_index=worst, **facts))
    paths = [folder / f"{name}.jsonl" for name in ("pairs", "current", "previous")]
    for path, records in zip(paths, (pairs, current, previous), strict=True):
        store.write(path, records)
    return browser.Group("round 1", *paths, models=("M1", "M0"))


def measure(path: Path, rounds: int) -> dict[str, list[float]]:
    """name -> values, one a round, of filters several."""
    from playwright.sync_api import sync_playwright

    found: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    with sync_playwright() as playwright:
        for _ in range(rounds):
            browser_ = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--enable-precise-memory-info"]
            )
            tab = browser_.new_page(viewport={"width": 1280, "height": 900})
            tab.goto(path.as_uri())
            tab.wait_for_selector("#preferences [role=option]")
            painted = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
            add("first paint (ms)", painted)
            add("list is there (ms)", tab.evaluate("performance.now()"))
            for name, value in (("c_max", "0.5"), ("task", "siqa"), ("sort", "-margin"), ("c_max", ""), ("task", "")):
                add("filter (ms)", tab.evaluate(FILTER, [name, value]))
            add("first search (ms)", tab.evaluate(FILTER, ["q", "zebra"]))
            for words in ("consistency", "the", "zq", "every response is", "e"):
                add("search (ms)", tab.evaluate(FILTER, ["q", words]))
            tab.evaluate("window.gc && gc()")
            add("heap (MB)", tab.evaluate("performance.memory.usedJSHeapSize") / 1e6)
            browser_.close()
    return found


if __name__ == "__main__":
    main()

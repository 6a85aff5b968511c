"""The report page in Chromium, as wide as on a desk and on a phone; that of a loop is opened in test_iterate.py."""

from pathlib import Path

import pytest
from headless import WIDTHS, barriers, expect, launched, new_tab
from test_browser import HOSTILE

from cream.files import store
from cream.records import Item, Message, Pair, Rewards
from cream.reporting import browser, page

pytestmark = pytest.mark.slow
PROMPTS = 300
COUNT, PAIR, ROW = (f"#preferences {part}" for part in ("[data-part=count]", "[data-part=pair]", "[role=option]"))


chromium = pytest.fixture(scope="module")(launched)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A page with two rounds of preferences, and hostile texts in every place that a user's text can have."""
    folder = tmp_path_factory.mktemp("report")
    (first, labels), second = ordinary(folder), hostile(folder)
    path = folder / "report.html"
    intro = page.Section("intro", "Introduction", "<p>Before the preferences.</p>")
    path.write_text(
        page.build(f"Report {HOSTILE[0]}", [intro, browser.section([first, second], labels)]), encoding="utf-8"
    )
    return path


def record(uuid: str, prompt: str, answers: list[str], reward: list[float], **fields) -> Rewards:
    messages = [Message("user", prompt)]
    responses = [[*messages, Message("assistant", text)] for text in answers]
    return Rewards(uuid=uuid, prompt=messages, response=responses, reward=reward, **fields)


def ordinary(folder: Path) -> tuple[browser.Group, dict[str, Item]]:
    """Pairs of sums, and their labels: those of even numbers have a right chosen response, C rises with the number."""
    current, previous, pairs, labels = [], [], [], {}
    for i in range(PROMPTS):
        task = "add" if i % 3 else "sub"
        uuid, texts = f"{task}-{i}", [f"Answer: {i + n}" for n in range(5)]
        label = i if i % 2 == 0 else i + 4
        labels[uuid] = Item(uuid=uuid, question=f"What is {i} + 0?", label=str(label), task=f"tiny_{task}")
        current.append(record(uuid, f"What is {i} + 0?", texts, [4.0, 3.0, 2.0, 1.0, 0.0]))
        previous.append(record(uuid, f"What is {i} + 0?", texts, [0.0, 3.0, 2.0, 1.0, 4.0]))
        chosen, rejected = current[-1].response[0], current[-1].response[4]
        places = {"selected": chosen, "rejected": rejected, "selected_index": 0, "rejected_index": 4}
        pairs.append(Pair(uuid=uuid, prompt=current[-1].prompt, **places, consistency=i / PROMPTS, margin=4.0 + i))
    return files(folder, "round 1", pairs, current, previous, models=("M1", "M0")), labels


def hostile(folder: Path) -> browser.Group:
    current, pairs = [], []
    for i, text in enumerate(HOSTILE):
        texts = [text, f"{text} again", "a plain response"]
        said = {HOSTILE[0]: [text, None, text], "judge_2": [None, "Score: 2", text]}
        parts = {HOSTILE[1]: [[1.0, None], 2.0, None], "token_log_ratio": [[0.5, -0.25], None, None]}
        made = record(f"h{i} {HOSTILE[0]}", f"{text}?", texts, [3.0, 2.0, 1.0], texts=said, parts=parts)
        made.extra = {"tokens": [["<b>", text[:20]], None, None], "task": HOSTILE[1]}
        places = {"selected": made.response[0], "rejected": made.response[2], "selected_index": 0, "rejected_index": 2}
        pairs.append(Pair(uuid=made.uuid, prompt=made.prompt, **places, consistency=0.25))
        current.append(made)
    return files(folder, f"round 2 {HOSTILE[0]}", pairs, current, models=(HOSTILE[0], HOSTILE[1]))


def files(folder: Path, title: str, pairs, current, previous=None, **fields) -> browser.Group:
    written = {"pairs": pairs, "rewards": current, "previous": previous}
    paths = {name: folder / f"{name}-{title[:7]}.jsonl" for name, records in written.items() if records}
    for name, path in paths.items():
        store.write(path, written[name])
    return browser.Group(title, **paths, **fields)


@pytest.fixture(scope="module", params=WIDTHS)
def tab(request, chromium):
    with new_tab(chromium, request.param) as tab:
        yield tab


@pytest.fixture
def opened(tab, report):
    """Opens the page at an address, anew."""

    def at(address: str = ""):
        tab.goto("about:blank")
        tab.goto(report.as_uri() + address)
        tab.wait_for_selector(ROW)
        return tab

    return at


def choose(tab, **values) -> None:
    for name, value in values.items():
        field = tab.locator(f"#preferences [name={name}]")
        field.select_option(value) if field.evaluate("each => each.tagName") == "SELECT" else field.fill(value)


def filters(tab) -> None:
    """Opens the filters, which are closed on a phone."""
    if not tab.locator("#preferences details").first.get_attribute("open") == "":
        tab.locator("#preferences summary").first.click()


def test_only_the_rows_in_view_are_in_the_document(opened):
    tab = opened()
    expect(tab, COUNT, f"{PROMPTS + len(HOSTILE)} of {PROMPTS + len(HOSTILE)} pairs")
    assert 4 < tab.locator(ROW).count() < 40
    tab.locator("#preferences [role=listbox]").evaluate("each => each.scrollTop = 200 * 60")
    tab.wait_for_selector("[aria-posinset='201']")
    assert tab.locator(ROW).count() < 40
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing is wider than the screen


def test_a_click_shows_a_prompt_with_all_responses_and_both_rankings(opened):
    tab = opened()
    tab.locator(ROW).nth(2).click()
    expect(tab, PAIR, "What is 2 + 0?")
    table = tab.locator(f"{PAIR} tbody tr")
    assert table.first.inner_text().split("\t") == ["A chosen", "4 (1)", "0 (5)", "✓ right"]
    assert table.last.inner_text().split("\t") == ["E rejected", "0 (5)", "4 (1)", "✗ wrong"]
    assert tab.locator(".browser-response").count() == 5
    assert tab.locator(".browser-response.chosen").inner_text().startswith("Response A")
    assert "C is below ½" in tab.locator(PAIR).inner_text()
    assert tab.locator(ROW).nth(2).get_attribute("aria-selected") == "true"


def test_keys_and_buttons_go_to_the_next_and_the_previous_pair(opened):
    tab = opened()
    tab.locator("#preferences [role=listbox]").focus()
    for key, text in [("j", "1 +"), ("ArrowDown", "2 +"), ("k", "1 +"), ("End", HOSTILE[4][-1]), ("Home", "0 +")]:
        tab.keyboard.press(key)
        expect(tab, PAIR, text)
    tab.get_by_role("button", name="next").click()
    expect(tab, PAIR, "What is 1 + 0?")
    tab.keyboard.press("j")  # the button has the focus still
    expect(tab, PAIR, "What is 2 + 0?")
    tab.keyboard.press("/")
    tab.keyboard.type("jk")  # letters in a field are text
    expect(tab, COUNT, "0 of")
    expect(tab, PAIR, "Nothing matches")


def test_filters_search_and_order_narrow_the_list(opened):
    tab = opened()
    filters(tab)
    for fields, count in [
        ({"round": "round 1"}, PROMPTS),
        ({"task": "tiny_sub"}, PROMPTS // 3),
        ({"chosen": "1"}, PROMPTS // 6),
        ({"c_min": "0.5"}, PROMPTS // 12),
        ({"margin_max": str(4 + PROMPTS // 2)}, 1),
    ]:
        choose(tab, **fields)
        expect(tab, COUNT, f"{count} of")
    expect(tab, PAIR, "sub-150")
    tab.get_by_role("button", name="Clear").click()
    expect(tab, COUNT, f"{PROMPTS + len(HOSTILE)} of")
    choose(tab, q="what is 29", sort="-c")
    expect(tab, COUNT, "11 of")  # 29, 290 … 299
    expect(tab, f"{ROW}:first-child", "299 +")
    expect(tab, PAIR, "add-299")
    assert tab.locator(f"{PAIR} mark").first.inner_text() == "What is 29"
    assert tab.locator(COUNT).get_attribute("role") == "status"


def test_an_address_names_a_pair_and_filters(opened):
    tab = opened("#pair=add-250&round=round+1&q=what")
    expect(tab, PAIR, "What is 250 + 0?")
    expect(tab, COUNT, f"{PROMPTS} of")
    assert tab.locator("[aria-selected=true]").inner_text().startswith("What is 250")
    tab.keyboard.press("j")
    expect(tab, PAIR, "What is 251 + 0?")
    link = tab.locator(f"{PAIR} a").get_attribute("href")
    assert tab.evaluate("location.hash") == link == "#pair=add-251&round=round+1&q=what"
    tab.evaluate("location.hash = '#pair=sub-3&chosen=0'")
    expect(tab, PAIR, "What is 3 + 0?")
    tab.evaluate("location.hash = '#pair=nowhere'")
    expect(tab, PAIR, "This page does not have the pair")
    tab.evaluate("location.hash = '#intro'")
    assert tab.locator(PAIR).inner_text().startswith("This page")


def test_hostile_texts_are_shown_as_text(opened):
    tab = opened("#q=again")
    expect(tab, COUNT, f"{len(HOSTILE)} of")
    for i, text in enumerate(HOSTILE):
        expect(tab, f"{PAIR} h3", f"h{i} {HOSTILE[0]}")
        for details in tab.locator(f"{PAIR} details").all():
            details.evaluate("each => each.open = true")
        shown = tab.locator(f"{PAIR} .browser-response .browser-text").first.evaluate("each => each.textContent")
        assert shown == text[:3000]
        pieces = tab.locator(f"{PAIR} .browser-tokens > span").evaluate_all(
            "all => all.map((each) => each.textContent)"
        )
        assert pieces == ["<b>0.5", f"{text[:20]}−0.25"]
        assert tab.locator(f"{PAIR} script, {PAIR} img, {PAIR} b:not(.browser-title b)").count() == 0
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        if len(text) > 3000:
            tab.locator(".browser-response").get_by_role("button", name="show all 10\u202f000 characters").first.click()
            shown = tab.locator(f"{PAIR} .browser-response .browser-text").first.evaluate("each => each.textContent")
            assert shown == text
        tab.locator("#preferences [role=listbox]").focus()
        tab.keyboard.press("j")
    assert "TAKEN" not in tab.title().replace(HOSTILE[0], "")


def test_dark_without_barriers(opened):
    """axe-core finds no serious or critical violation; of light colours, the test of a loop's report says so."""
    tab = opened("#pair=add-4")
    expect(tab, PAIR, "What is 4")
    back = "getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(back)
    tab.locator("#theme").click()
    assert tab.evaluate(back) != light
    assert barriers(tab) == {}
    tab.locator("#theme").click()
    assert tab.evaluate(back) == light

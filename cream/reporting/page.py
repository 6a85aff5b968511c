"""One HTML page without network: sections with a contents list, light and dark, nothing loaded from elsewhere.

The page allows itself only what it holds: its Content-Security-Policy forbids every request, and runs no script but
those that `build` put there, by their hashes. Text of users is escaped by whoever writes a section's `html`.
"""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape, unescape
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

ASSETS = Path(__file__).with_name("assets")
DATA_TYPE = "application/gzip+base64"  # a type that no browser runs
GZIP = b"\x1f\x8b"  # how a gzip file begins, and no JSON
GENERATOR = "report.py html"
# blob: is an image that the page made itself (a figure saved as PNG)
POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {scripts}; connect-src {connect}; "
    "base-uri 'none'; form-action 'none'"
)


class Section(NamedTuple):
    """A part of the page, with a heading of its own and a link in the contents list.

    `id`: its anchor, by which others link to it. `html`: its content, in which all foreign text is escaped already.
    `data`: name -> bytes of JSON, compressed into the page unless they are gzip already; a script gets the value by
    `await page.data(name)`.
    `scripts`, `styles`: JavaScript that runs once the page is parsed, in a function of its own; CSS. Those of several
    sections that are equal are there once. See assets/page.js for what a script may call, and assets/page.css for the
    colours (`var(--text)`, `var(--accent)`, ...). `libraries`: name -> JavaScript, compressed into the page as data
    are, that runs at the first `await page.library(name)`.
    """

    id: str
    title: str
    html: str
    data: Mapping[str, bytes] = MappingProxyType({})
    scripts: str = ""
    styles: str = ""
    libraries: Mapping[str, str] = MappingProxyType({})


def build(title: str, sections: Sequence[Section], *, runs: Sequence[str] = (), version: str | None = None) -> str:
    """The page. `runs`: titles of the runs that it shows, for `runs_in`; `version`: of a page that is served while
    outputs grow, and asks its server whether there is another.

    Raises ValueError where a script or style would end its own element, or two sections share an id.
    """
    libraries = {name: code for section in sections for name, code in section.libraries.items()}
    ids = [*libraries, *(name for section in sections for name in (section.id, *section.data))]
    if len(set(ids)) < len(ids):
        raise ValueError(f"sections, data and libraries share an id: {ids}")
    own = dict.fromkeys(section.scripts for section in sections if section.scripts)
    scripts = [asset("page.js"), *(f"(() => {{\n{script}\n}})();" for script in own)]
    styles = dict.fromkeys([asset("page.css"), *(section.styles for section in sections if section.styles)])
    if wrong := re.search(r"</(script|style)", "".join([*scripts, *styles]), re.IGNORECASE):
        raise ValueError(f"a script or style contains {wrong[0]}, which would end its element")
    policy = POLICY.format(
        scripts=" ".join(map(_hash, [*scripts, *libraries.values()])), connect="'none'" if version is None else "'self'"
    )
    watched = "" if version is None else f' data-watched="{escape(version)}"'
    links = "\n".join(f'<a href="#{escape(each.id)}">{escape(each.title)}</a>' for each in sections)
    parts = [
        f'<!doctype html>\n<html lang="en"{watched}>\n<head>\n<meta charset="utf-8">',
        f'<meta name="generator" content="{GENERATOR}">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">',
        f'<meta name="runs" content="{escape(json.dumps(runs, ensure_ascii=False))}">',
        f"<title>{escape(title)}</title>",
        *(f"<style>\n{style}\n</style>" for style in styles),
        f'</head>\n<body>\n<a class="skip" href="#main">Skip to the content</a>\n<header>\n<h1>{escape(title)}</h1>',
        f'<nav aria-label="Sections">\n{links}\n</nav>',
        '<button id="theme" type="button" hidden>dark</button>\n</header>\n<main id="main" tabindex="-1">',
        *(_body(section) for section in sections),
        "</main>",
        *(_payload(name, value) for section in sections for name, value in section.data.items()),
        *(_payload(name, code.encode()) for name, code in libraries.items()),
        *(f"<script>{script}</script>" for script in scripts),
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


def runs_in(head: str) -> list[str]:
    """The titles of the runs that a page shows, by its head; of an older page none are known."""
    found = re.search(r'<meta name="runs" content="([^"]*)">', head)
    return json.loads(unescape(found[1])) if found else []


def asset(name: str) -> str:
    """The text of a file in assets/."""
    return (ASSETS / name).read_text(encoding="utf-8")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """A data table, its texts escaped; numbers are aligned to the right, None is empty. It scrolls where it is wider
    than the page: columns that matter come first."""
    rows = [tuple(row) for row in rows]
    numeric = [any(_is_number(value) for value in column) for column in zip(*rows, strict=True)] or [False] * len(
        columns
    )
    head = "".join(
        f'<th scope="col"{" class=number" if right else ""}>{escape(column)}</th>'
        for column, right in zip(columns, numeric, strict=True)
    )
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    inside = f"{title}<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody>"
    return scrolling(f"<table>{inside}</table>", caption or f"Table of {', '.join(filter(None, columns[:4]))}")


def table_of_runs(several: bool, columns: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """The same, of which the first column says of which run a row is: it is there where the page has `several`."""
    first = 0 if several else 1
    return table(columns[first:], (row[first:] for row in rows), caption)


def scrolling(html: str, label: str) -> str:
    """What may be wider than the page, in a frame that scrolls by keys too; its edges show where there is more."""
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(label)}">{html}</div>'


def format_number(value: float | int) -> str:
    """Four significant digits; whole numbers, and all above 10 000, are exact to 1."""
    whole = isinstance(value, int) or 9_999.5 <= abs(value) < 1e15
    return f"{value:,.0f}".replace(",", "\u202f") if whole else f"{value:.4g}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: object) -> str:
    if _is_number(value):
        return f'<td class="number">{format_number(value)}</td>'
    return f"<td>{'' if value is None else escape(str(value))}</td>"


def _body(section: Section) -> str:
    name = escape(section.id)
    heading = f'<h2 id="{name}-title">{escape(section.title)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">\n{heading}\n{section.html}\n</section>'


def _payload(name: str, value: bytes) -> str:
    packed = base64.b64encode(value if value[:2] == GZIP else gzip.compress(value, 6, mtime=0)).decode()
    return f'<script type="{DATA_TYPE}" id="{escape(name)}">{packed}</script>'


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"

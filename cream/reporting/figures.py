"""Figures by plotly: their colours, axes and data tables, and the part of a page that shows them.

Lines have symbols and dashes, and bars patterns, so that nothing is told by colour alone. The colours have a contrast
of at least 3 on the page's light and dark grounds, and differ for the common kinds of colour blindness.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from typing import NamedTuple

import msgspec

from cream.reporting.page import Section, asset, table

COLOURS = ("#1a7fbf", "#d55e00", "#0b9a72", "#c46f9f", "#808790", "#a67c00")  # after Okabe & Ito, 2008
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
PATTERNS = ("", "/", ".", "x", "-", "\\")
INK, PALE = "#1b1f24", "#d3d7dd"  # of exported figures; on a page its own
HEIGHT, LINE = 320, 14  # pixels of a figure, and of each name above it
LONG = 40  # characters of a name in a figure
NUMBERS = re.compile(r"(-\d+)+$")  # at the end of an id
POINTS = 200  # of a curve; of a longer one every k-th


class Series(NamedTuple):
    """One line or group of bars: y over x, perhaps with the bounds of an interval; None where there is no value."""

    name: str
    x: Sequence
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


class Figure(NamedTuple):
    """A figure and its numbers: `about` says in a sentence what it shows, `plot` is plotly's figure as JSON values with
    its title, `columns` and `rows` are its data table."""

    id: str
    title: str
    about: str
    plot: dict
    columns: Sequence[str]
    rows: Sequence[Sequence]


def lines(id: str, title: str, about: str, series: Sequence[Series], x: str, y: str, **layout) -> Figure:
    """Lines with points, and bars for their intervals."""
    traces, series = [], [*map(_thinned, series)]
    for number, each in enumerate(series):
        colour, symbol, dash = (of[number % len(of)] for of in (COLOURS, SYMBOLS, DASHES))
        many = len(each.x) > 40
        traces.append(
            {
                "type": "scatter",
                "mode": "lines" if many else "lines+markers",
                "name": label(each.name),
                "x": _labels(each.x),
                "y": [*each.y],
                "line": {"color": colour, "dash": dash, "width": 2},
                "marker": {"color": colour, "symbol": symbol, "size": 9},
            }
        )
        if each.low is not None:
            traces[-1]["error_y"] = _error(each, colour)
    return _figure(id, title, about, traces, x, y, _rows(series, x, y), layout)


def bars(id: str, title: str, about: str, series: Sequence[Series], x: str, y: str, **layout) -> Figure:
    """Groups of bars."""
    traces = []
    for number, each in enumerate(series):
        colour, pattern = (of[number % len(of)] for of in (COLOURS, PATTERNS))
        marker = {"color": colour, "line": {"color": colour, "width": 1}}
        marker["pattern"] = {"shape": pattern, "fillmode": "overlay", "fgcolor": "#ffffff", "fgopacity": 0.8, "size": 6}
        traces.append({"type": "bar", "name": label(each.name), "x": _labels(each.x), "y": [*each.y], "marker": marker})
        if each.low is not None:
            traces[-1]["error_y"] = _error(each, INK)
    return _figure(id, title, about, traces, x, y, _rows(series, x, y), {"barmode": "group", **layout})


def matrix(
    id: str, title: str, about: str, names: Sequence[str], values: Sequence[Sequence[float | None]], unit: str
) -> Figure:
    """A square of numbers between -1 and 1, each written in its field."""
    shown = [label(name) for name in names]
    trace = {
        "type": "heatmap",
        "x": shown,
        "y": shown,
        "z": [[*row] for row in values],
        "zmin": -1,
        "zmax": 1,
        "colorscale": [[0, "#d55e00"], [0.5, "#f2f2f2"], [1, "#1a7fbf"]],
        "colorbar": {"title": {"text": unit}, "thickness": 12},
        "hoverongaps": False,
        "xgap": 2,
        "ygap": 2,
    }
    notes = [
        {"x": shown[j], "y": shown[i], "text": f"{value:.2f}", "showarrow": False, "bgcolor": "#ffffff", "borderpad": 2}
        for i, row in enumerate(values)
        for j, value in enumerate(row)
        if value is not None
    ]
    rows = [(names[i], names[j], value) for i, row in enumerate(values) for j, value in enumerate(row)]
    rows = [row for row in rows if row[2] is not None]
    layout = {"annotations": notes, "yaxis": {"autorange": "reversed"}}
    return _figure(id, title, about, [trace], "", "", (("model", "model", unit), rows), layout)


def section(
    id: str, title: str, intro: str, figures: Sequence[Figure], tables: str = "", folded: Sequence[Figure] = ()
) -> Section:
    """A section with figures between an introduction and tables, both HTML; those that are `folded` are behind a line
    that names them. Figures whose ids differ only in the number at their end, such as one for each run, are side by
    side."""
    if not figures and not folded:
        return Section(id, title, "\n".join([intro, tables]))
    source = f"{id}-figures"
    html = [intro, *_grids(figures, source)]
    if folded:
        names = ", ".join(dict.fromkeys(figure.title.partition(",")[0].lower() for figure in folded))
        line = f"{len(folded)} more figure{'s' * (len(folded) > 1)}: {names}"
        html.append(f"<details><summary>{escape(line)}</summary>{''.join(_grids(folded, source))}</details>")
    html.append(tables)
    plots = msgspec.json.encode({figure.id: figure.plot for figure in (*figures, *folded)})
    scripts, styles = asset("figures.js"), asset("figures.css")
    return Section(id, title, "\n".join(html), {source: plots}, scripts, styles, {"plotly": plotly()})


@cache
def plotly() -> str:
    """The JavaScript of plotly. Raises ImportError without the package."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def label(name: str) -> str:
    """A name as a figure shows it: short, and with nothing that plotly takes for markup."""
    return escape(name if len(name) <= LONG else f"{name[: LONG - 1]}…", quote=False)


def _labels(values: Sequence) -> list:
    """Numbers, or names as labels."""
    return [label(value) if isinstance(value, str) else value for value in values]


def _grids(figures: Sequence[Figure], source: str) -> list[str]:
    """Grids of figures: one for each kind that has several, and for those in between."""
    kinds: dict[str, list[Figure]] = {}
    for figure in figures:
        kinds.setdefault(NUMBERS.sub("", figure.id), []).append(figure)
    grids: list[list[Figure]] = []
    for kind in kinds.values():
        if len(kind) == 1 and grids and len({NUMBERS.sub("", each.id) for each in grids[-1]}) == len(grids[-1]):
            grids[-1] += kind
        else:
            grids.append(kind)
    inside = ("".join(_html(figure, source) for figure in grid) for grid in grids)
    return [f'<div class="figures">{each}</div>' for each in inside]


def _html(figure: Figure, source: str) -> str:
    name, alt = escape(figure.id), escape(f"{figure.title}. {figure.about}")
    return (
        f"<figure><figcaption><h3>{escape(figure.title)}</h3>"
        f"<p>{escape(figure.about)}</p></figcaption>"
        f'<div class="plot" id="{name}" data-from="{source}" role="img" aria-label="{alt}"></div>'
        f"<details><summary>the numbers of this figure</summary>{table(figure.columns, figure.rows)}</details></figure>"
    )


def _figure(id, title, about, traces, x, y, numbers, layout: Mapping) -> Figure:
    """The figure with what all of them have, checked by plotly."""
    import plotly.graph_objects as go

    axis = {"automargin": True, "gridcolor": PALE, "linecolor": PALE, "zerolinecolor": PALE}
    base = {
        "template": None,
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 50, "r": 10, "t": 10, "b": 40},
        "height": HEIGHT + (LINE * len(traces) if len(traces) > 1 else 0),
        "dragmode": False,
        "separators": ".\u202f",
        "hovermode": "closest",
        "showlegend": len(traces) > 1,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": {**axis, "title": {"text": label(x)}, "fixedrange": True},
        "yaxis": {**axis, "title": {"text": label(y)}, "fixedrange": True},
    }
    for key, value in layout.items():
        base[key] = {**base[key], **value} if isinstance(value, Mapping) and key in base else value
    plot = msgspec.json.decode(go.Figure(data=traces, layout=base).to_json(engine="json"))
    return Figure(id, title, about, {**plot, "title": label(title)}, *numbers)


def _rows(series: Sequence[Series], x: str, y: str) -> tuple[Sequence[str], list[tuple]]:
    """The data table of series: its columns and rows."""
    bounded = any(each.low is not None for each in series)
    columns = ("", x, y, *(("from", "to") if bounded else ()))
    rows = []
    for each in series:
        nothing = [None] * len(each.x)
        bounds = (each.low or nothing, each.high or nothing) if bounded else ()
        rows += zip([each.name] * len(each.x), each.x, each.y, *bounds, strict=True)
    return columns, rows


def _error(each: Series, colour: str) -> dict:
    """Bars from low to high."""
    triples = [*zip(each.y, each.low, each.high, strict=True)]
    above = [None if None in triple else triple[2] - triple[0] for triple in triples]
    below = [None if None in triple else triple[0] - triple[1] for triple in triples]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": colour, "thickness": 1.5}


def _thinned(each: Series) -> Series:
    step = -(-len(each.x) // POINTS) or 1
    return Series(each.name, *(None if values is None else [*values[::step]] for values in each[1:]))

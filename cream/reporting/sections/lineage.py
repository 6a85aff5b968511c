"""What was made from what; settings and versions."""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from cream.reporting.outputs import Run
from cream.reporting.page import Section, scrolling, table, table_of_runs

TITLE = "Lineage and settings"
ROW, LANE, LEFT = 26, 22, 14  # pixels of the graph
LANES = {"raw": 0, "samples": 1, "rewards": 2, "pairs": 3, "training": 4, "evaluation": 5, "measured": 5, "other": 1}
WIDE = 40  # characters of a value in a table of settings


def collect(run: Run) -> dict:
    """`nodes`: each output and input, inputs first, with its path, kind, script and hash; `edges`: (from, to) as
    numbers of nodes; `outputs`: settings, versions, git commit and notes of each output."""
    numbers: dict[Path, int] = {}
    nodes, edges = [], []

    def node(path: Path, **about) -> int:
        place = path.resolve()
        if place not in numbers:
            numbers[place] = len(nodes)
            nodes.append({"path": str(path), **about})
        return numbers[place]

    homes = {output.path.resolve(): output for output in run.outputs}
    for output in run.outputs:
        inputs = []
        for name in output.about.get("sources", {}):
            path = output.source(name)
            home = path.resolve().parent if path.resolve().parent in homes else path  # a checkpoint: its run
            known = homes.get(home.resolve())
            about = {"name": known.name, "kind": known.kind} if known else {"name": path.name, "kind": "raw"}
            script = known.script if known else None
            digest = known.about.get("output") if known else output.input(name)
            inputs.append(node(known.path if known else path, **about, script=script, hash=digest))
        about = {"kind": output.kind or "other", "script": output.script, "hash": output.about.get("output")}
        own = node(output.path, name=output.name, **about)
        edges += [[each, own] for each in dict.fromkeys(inputs) if each != own]
    return {"nodes": nodes, "edges": edges, "outputs": [_about(output) for output in run.outputs]}


def _about(output) -> dict:
    about = output.about
    notes = {key: about.get(key, []) for key in ("unverified", "forced")}
    versions = {"python": about.get("python"), **about.get("versions", {}), "commit": about.get("git")}
    return {
        "name": output.name,
        "path": str(output.path),
        "script": output.script,
        "settings": output.settings,
        "versions": {name: version for name, version in versions.items() if version},
        "command": about.get("command"),
        **notes,
    }


# The section ----------------------------------------------------------------------------------------------------------


def show(runs: Sequence[dict]) -> Section | None:
    """The section; None without outputs."""
    own = [(run["title"], run["lineage"]) for run in runs if run["lineage"]["nodes"]]
    if not own:
        return None
    html = ["<p>Each line is a file, below all that it was made from.</p>"]
    for title, found in own:
        html.append(f"<h3>{escape(title)}</h3>{_graph(title, found)}")
    html += _settings(own)
    html += _versions(own)
    return Section("lineage", TITLE, "\n".join(html), styles=STYLES)


STYLES = """
.graph text { fill: var(--text); font: 13px system-ui, sans-serif; }
.graph .soft { fill: var(--soft); }
.graph path { fill: none; stroke: var(--soft); stroke-width: 1.5; opacity: 0.7; }
.graph circle { fill: var(--back); stroke: var(--accent); stroke-width: 2.5; }
.graph circle.raw { stroke: var(--soft); }
.graph circle.training { fill: var(--accent); }
"""


def _graph(title: str, found: dict) -> str:
    """A row for each node with its name, its point in the lane of its kind, and curves from its inputs; and a table."""
    nodes, edges = found["nodes"], found["edges"]
    lanes = [LANES.get(node["kind"], LANES["other"]) for node in nodes]
    place = [(LEFT + LANE * lane, ROW * number + ROW // 2) for number, lane in enumerate(lanes)]
    text = LEFT + LANE * (max(LANES.values()) + 1)
    parts = [_curve(place[a], place[b]) for a, b in edges]
    for (x, y), node in zip(place, nodes, strict=True):
        name = escape(node["name"] if len(node["name"]) <= WIDE else f"{node['name'][: WIDE - 1]}…")
        made = escape(f"{node['script']}, {node['kind']}" if node["script"] else "raw: nothing here made it")
        parts.append(f'<circle class="{escape(node["kind"])}" cx="{x}" cy="{y}" r="6"/>')
        parts.append(f'<text x="{text}" y="{y + 4}">{name} <tspan class="soft">{made}</tspan></text>')
    height, label = ROW * len(nodes), escape(f"Lineage of {title}: {len(nodes)} files; the table below says the same")
    svg = f'<svg class="graph" role="img" aria-label="{label}" width="620" height="{height}">{"".join(parts)}</svg>'
    made_of = {b: [nodes[a]["name"] for a, to in edges if to == b] for b in range(len(nodes))}
    rows = [(n["name"], n["path"], n["script"], ", ".join(made_of[i])) for i, n in enumerate(nodes)]
    numbers = table(("name", "path", "made by", "made from"), rows)
    return (
        f"{scrolling(svg, f'Lineage of {title}')}<details><summary>this graph as a table</summary>{numbers}</details>"
    )


def _curve(a: tuple[int, int], b: tuple[int, int]) -> str:
    (x, y), (to_x, to_y) = a, b
    return f'<path d="M{x},{y} C{x},{y + ROW} {to_x},{to_y - ROW} {to_x},{to_y}"/>'


def _settings(own: Sequence[tuple[str, dict]]) -> Iterator[str]:
    """A table for each script: first the flags in which its outputs differ, the others below."""
    groups: dict[str, list[tuple[str, dict]]] = {}
    for title, found in own:
        for each in found["outputs"]:
            mode = each["settings"].get("mode") or each["settings"].get("train_stage")
            if each["script"]:
                name = " ".join(filter(None, (each["script"], mode if isinstance(mode, str) else None)))
                label = f"{title}: {each['name']}" if len(own) > 1 else each["name"]
                groups.setdefault(name, []).append((label, each["settings"]))
    for name, outputs in groups.items():
        flags = list(dict.fromkeys(flag for _, settings in outputs for flag in settings))
        rows = [(f"--{flag}", *(_value(settings.get(flag)) for _, settings in outputs)) for flag in flags]
        differ = [row for row in rows if len({*row[1:]}) > 1]
        same = [row[:2] for row in rows if len({*row[1:]}) == 1 and row[1] != ""]
        columns = ("flag", *(label for label, _ in outputs))
        parts = table(columns, differ, "settings in which these outputs differ") if differ else ""
        parts += table(("flag", "value"), same, "settings of all of them")
        yield f"<details><summary>settings of {escape(name)}</summary>{parts}</details>"


def _value(value: object) -> str:
    """As on a command line; nothing for null."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _versions(own: Sequence[tuple[str, dict]]) -> Iterator[str]:
    """Which versions made how many outputs; and what was forced, or used unverified."""
    counts: dict[tuple, int] = {}
    for _, found in own:
        for each in found["outputs"]:
            for name, version in each["versions"].items():
                counts[name, version] = counts.get((name, version), 0) + 1
    if counts:
        rows = [(name, version, count) for (name, version), count in counts.items()]
        yield f"<h3>Versions</h3>{table(('what', 'version', 'outputs'), rows)}"
    notes = [
        (title, each["name"], {"unverified": "used unverified", "forced": "--force overrode"}[key], text)
        for title, found in own
        for each in found["outputs"]
        for key in ("unverified", "forced")
        for text in each[key]
    ]
    if notes:
        yield f"<h3>Notes</h3>{table_of_runs(len(own) > 1, ('run', 'output', 'what', 'of'), notes)}"

"""What report.py and iterate.py do with runs: write the page and other forms of its numbers, or serve the page."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cream.cli.screen import say_result
from cream.errors import UserError
from cream.files import store
from cream.files.provenance import ARGS, RUN, meta_path
from cream.reporting import browser, export, markdown, page
from cream.reporting.collect import collect, sections
from cream.reporting.outputs import Run
from cream.reporting.watch import Watched, serve

log = logging.getLogger("cream")
MARKS = {".html": page.GENERATOR, ".md": markdown.MARK, ".json": '"report"'}  # by which an earlier report is known
HEAD = 4096  # bytes that are read at once; the mark is in the first ones


class Files(NamedTuple):
    """The files of a report: the page, a section of a model card, all numbers, a folder of figures."""

    page: str | Path
    markdown: str | None = None
    json: str | None = None
    figures: str | None = None


def write_all(files: Files, runs: Sequence[Run], seed: int = 0) -> None:
    """Write those of the files that have a name, and log each.

    Raises UserError where a file is there that is not an earlier report, an output is damaged, or no browser draws
    figures; ImportError without plotly.
    """
    named = {suffix: Path(path) for path, suffix in zip(files, MARKS, strict=False) if path}
    for suffix, path in named.items():
        _check_free(path, suffix)
    chromium = export.find_browser() if files.figures else None
    numbers = collect(runs, seed)
    shown = sections(numbers, browser.of_runs(runs))
    _write(named[".html"], page.build(_title(runs), shown, runs=[run.title for run in runs]))
    say_result("report: %s", named[".html"])
    if files.markdown:
        _write(named[".md"], markdown.card(numbers))
        say_result("section of a model card: %s", files.markdown)
    if files.json:
        store.update_json(named[".json"], numbers)
        say_result("numbers: %s", files.json)
    if chromium:
        drawn = export.write_figures(shown, Path(files.figures), chromium)
        say_result("figures: %d files in %s", len(drawn), files.figures)


def serve_page(find: Callable[[], Sequence[Run]], seed: int, port: int) -> None:
    """Serve the page of the runs that `find` finds until the process is interrupted. Raises UserError where `find`
    does, or the port is taken."""

    def build(version: str) -> str:
        runs = find()
        return page.build(_title(runs), sections(collect(runs, seed), browser.of_runs(runs)), version=version)

    title = _title(find())
    try:
        server = serve(Watched(build, lambda: watched_files(find())), port)
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror}; 0 takes a free one") from None
    say_result("watching %s; Ctrl-C ends it\n%s", title, server.url)
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()


def beside_larger(path: Path, runs: Sequence[Run], names: Sequence[str]) -> Path:
    """Where the page of these runs goes: to `path`, but where the report there shows some of these beside others, which
    it keeps, to a file beside it, named by `names`."""
    own, held = {run.title for run in runs}, {*(page.runs_in(_head(path)) if path.exists() else [])}
    if own & held and held - own:
        return path.with_name(f"{path.stem}.{'-'.join(names)}{path.suffix}")
    return path


def _title(runs: Sequence[Run]) -> str:
    return ", ".join(run.title for run in runs)


def _check_free(path: Path, suffix: str) -> None:
    """Raises UserError unless there is nothing at a path, or an earlier report."""
    if path.suffix != suffix:
        raise UserError(f"{path}: its name should end in {suffix}")
    if path.exists() and (path.is_dir() or meta_path(path).exists() or MARKS[suffix] not in _head(path)):
        raise UserError(f"{path} exists and is not a report; give another name")


def _head(path: Path) -> str:
    """The beginning of a file; of a page its whole head, which names the runs that it shows."""
    with path.open("rb") as file:
        head = file.read(HEAD)
        while head.startswith(b"<!doctype html>") and b"</head>" not in head and (more := file.read(HEAD)):
            head += more
        return head.decode(errors="replace")


def _write(path: Path, text: str) -> None:
    """Write a file, unless it has this content: a loop that is run again changes nothing."""
    if not path.exists() or path.read_bytes() != text.encode():
        with store.atomic(path) as file:
            file.write(text.encode())


def watched_files(runs: Sequence[Run]) -> Iterator[Path]:
    """The files that say that outputs of runs have changed: sidecars, the logs of training, what loops decided."""
    for run in runs:
        for path in {*(path for _, path in run.planned), *(output.path for output in run.outputs)}:
            yield from (path / name for name in (ARGS, RUN, "log.jsonl")) if path.is_dir() else (meta_path(path),)
        yield from run.decisions

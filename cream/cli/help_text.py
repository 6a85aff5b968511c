"""The text of --help, as wide as the terminal, 120 columns at most."""

import argparse
import dataclasses
import re
import shutil
import textwrap
from collections.abc import Sequence

from cream.cli.flag_fields import Flag, dashed, spell

WIDEST = 120
ROW = re.compile(r" *\S.*? {2,}(?=\S)")  # the first of two columns, and the space after it


def help_text(flags: Sequence[Flag], description: str, *, words: bool) -> str:
    """All but the example. `words`: whether a command and its paths precede the flags."""
    width = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
    parser = argparse.ArgumentParser(
        usage=f"%(prog)s {'COMMAND PATH ... ' * words}[--flag value ...]",
        description=reflow(description, width),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=width),
    )
    groups = {None: parser}
    for each in flags:
        if each.name == "help":  # argparse has its own
            continue
        group = groups.get(each.group) or groups.setdefault(each.group, parser.add_argument_group(each.group))
        metavar = {bool: "yes|no", int: "N", float: "X"}.get(each.kind, "NAME" if each.words else "TEXT")
        values = each.expected if each.words and each.kind is not bool else str(each.range)
        default = "required" if each.default is dataclasses.MISSING else f"default {spell(each.default)}"
        text = f"{each.help} ({'; '.join(filter(None, (values, default)))})".replace("%", "%%")
        group.add_argument(*map(dashed, (each.name, *each.aliases)), metavar=metavar, help=text)
    return parser.format_help()


def reflow(text: str, width: int) -> str:
    """A text of paragraphs and of rows in two columns, with lines of at most this width; a line belongs to the one
    before where it continues its paragraph, or its second column."""
    blocks: list[tuple[str, int, list[str]]] = []  # what a block begins with, its other lines' indent, its texts
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        row = ROW.match(line)
        if row:
            blocks.append((row[0], row.end(), [line[row.end() :]]))
        elif line.strip() and blocks and blocks[-1][2] and blocks[-1][1] == indent:
            blocks[-1][2].append(line.strip())
        else:
            blocks.append((" " * indent, indent, [line.strip()] if line.strip() else []))
    return "\n".join(
        textwrap.fill(" ".join(texts), width, initial_indent=first, subsequent_indent=" " * hang,
                      break_long_words=False, break_on_hyphens=False)
        for first, hang, texts in blocks
    )  # fmt: skip

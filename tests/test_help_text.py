"""--help at any width."""

import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

import iterate
import report
from cream.cli.help_text import reflow

TEXT = """\
A first paragraph of two
lines.

  key          what it is, in a
               second line
  {a: 1, b}    another
Then more.
"""


def test_paragraphs_and_columns_keep_their_shape():
    wide = """\
A first paragraph of two lines.

  key          what it is, in a second line
  {a: 1, b}    another
Then more."""
    assert reflow(TEXT, 100) == wide and reflow(wide, 100) == wide
    assert reflow(TEXT, 30).splitlines() == [
        "A first paragraph of two",
        "lines.",
        "",
        "  key          what it is, in",
        "               a second line",
        "  {a: 1, b}    another",
        "Then more.",
    ]


@given(st.integers(40, 130))
def test_no_word_is_lost_and_no_line_too_long(width):
    for script in (iterate, report):
        text = reflow(script.__doc__, width)
        assert text.split() == script.__doc__.split() and max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_help_is_as_wide_as_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        report.main(["--help"])
    text = capsys.readouterr().out.partition("\nexample:")[0]
    longest = max(map(len, text.splitlines()))
    assert min(int(columns), 120) - 8 < longest <= min(int(columns), 120), textwrap.shorten(text, 200)

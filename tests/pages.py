"""The documentation's pages, and the commands and files in them."""

import re
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
README, FORMATS, CHOICES = ((REPO / name).read_text() for name in ("README.md", "docs/formats.md", "docs/choices.md"))


def commands(text: str) -> list[str]:
    """The command lines of all blocks of shell, with continued lines joined and without comments."""
    blocks = re.findall(r"^```(?:ba)?sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def inline_commands(text: str) -> list[str]:
    """The command lines within sentences and tables: `python SCRIPT …`, and `SCRIPT --flag …` of a script."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`(?:python )?(\w[\w/]*\.py [^`]+)`", prose)
    return [f"python {span}" for span in spans]


def named_blocks() -> dict[str, str]:
    """File name -> text of the blocks of all pages that are files."""
    text = "\n".join(page.read_text() for page in PAGES)
    return dict(re.findall(r"^```\w+ (\S+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def examples() -> dict[str, str]:
    """File name -> text of the JSON blocks of docs/formats.md."""
    return dict(re.findall(r"^```json (\S+)\n(.*?)^```", FORMATS, re.MULTILINE | re.DOTALL))

"""The flags of a benchmark: each with its default in --help."""

import argparse
from collections.abc import Collection


class Options(argparse.ArgumentParser):
    """Flags of the script whose docstring is `doc`."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(self, name: str, default, what: str, **more) -> None:
        """A flag, read as what its default is; `more` goes to add_argument, `type` where there is no default."""
        typed = {} if default is None else {"type": type(default)}
        self.add_argument(name, default=default, help=f"{what} (default: %(default)s)", **(typed | more))

    def add_parts(self, known: Collection[str]) -> None:
        """--parts, read as a list of those that are `known`; by default all."""

        def read(text: str) -> list[str]:
            if unknown := [part for part in text.split(",") if part not in known]:
                raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
            return text.split(",")

        self.add("--parts", ",".join(known), "with commas between", type=read)

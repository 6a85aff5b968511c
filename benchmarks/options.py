"""The flags of a benchmark: each with its default in --help."""

import argparse


class Options(argparse.ArgumentParser):
    """Flags of the script whose docstring is `doc`."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(self, name: str, default, what: str, **more) -> None:
        """A flag, read as what its default is; `more` goes to add_argument, `type` where there is no default."""
        typed = {} if default is None else {"type": type(default)}
        self.add_argument(name, default=default, help=f"{what} (default: %(default)s)", **(typed | more))

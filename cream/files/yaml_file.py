"""YAML files of settings: plain data only."""

from collections import Counter
from pathlib import Path

import yaml

from cream.errors import UserError
from cream.files import store


class _Loader(yaml.SafeLoader):
    """No key twice: YAML would take the last."""

    def construct_mapping(self, node, deep=False):
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in keys.items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> object:
    """What a YAML file holds. Raises UserError naming the file."""
    with store.open_file(path) as file:
        try:
            return yaml.load(file, _Loader)
        except Exception as error:  # it raises what it will: a KeyError on `!!bool x`, an IndexError on `!!int ""`
            raise UserError(f"{path}: not valid YAML: {error or type(error).__name__}") from None

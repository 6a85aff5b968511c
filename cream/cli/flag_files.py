"""Files of flags for --config: one flat map in YAML or JSON, or its entry `flags`, as in a run's args.json."""

import json
from collections.abc import Callable
from pathlib import Path


def read_pairs(path: Path) -> list[tuple[str, object]]:
    """(key, text as written, 'null' for a null) of the map's entries, including repeated keys; a nested value stays a
    list or tuple. Raises ValueError with the problem."""
    readers = {".yaml": _yaml_pairs, ".yml": _yaml_pairs, ".json": _json_pairs}
    read: Callable | None = readers.get(path.suffix.lower())
    if read is None:
        raise ValueError(f"the name must end in {', '.join(readers)}")
    try:
        return read(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ValueError("is nested too deeply; it should be one flat map") from None


def _yaml_pairs(text: str) -> list[tuple[str, object]]:
    """From nodes rather than objects: this shows repeated keys, and a flag's type decides how `1e-6`, a string in YAML
    1.1, or `device: 0` are read."""
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        raise
    except Exception as error:  # of any kind: it raises an OverflowError on "\UFFFFFFFF"
        raise ValueError(f"is not YAML: {error}") from None
    if isinstance(node, yaml.MappingNode):
        inner = (value for key, value in node.value if key.value == "flags" and isinstance(value, yaml.MappingNode))
        node = next(inner, node)
        return [
            (str(key.value), "null" if value.tag == "tag:yaml.org,2002:null" else value.value)
            for key, value in node.value
        ]
    raise ValueError("holds no map of flags, `flag: value` on each line")


def _json_pairs(text: str) -> list[tuple[str, object]]:
    try:
        pairs = json.loads(text, object_pairs_hook=tuple, parse_int=str, parse_float=str, parse_constant=str)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if isinstance(pairs, tuple):  # an object; a list stays one
        pairs = next((value for key, value in pairs if key == "flags" and isinstance(value, tuple)), pairs)
        return [(key, json.dumps(value) if value in (None, True, False) else value) for key, value in pairs]
    raise ValueError('holds no map of flags, {"flag": value, ...}')

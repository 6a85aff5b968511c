"""All that is wrong with the plain data of a file that a person wrote; msgspec names the first mistake only."""

from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgspec

from cream.errors import nearest


def find_mistakes(value: object, kind: Any, place: str = "$") -> list[str]:
    """In what a value is not of `kind`, a type that msgspec converts to: unknown keys, with known ones that look alike;
    missing ones; values of another type. `place`: where the value is, $ for the whole."""
    whole, kind, found = kind, _chosen(value, kind), []
    at = "" if place == "$" else f" - at `{place}`"
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(value, dict):
        hints, fields = get_type_hints(kind, include_extras=True), msgspec.structs.fields(kind)
        for key in (str(key) for key in value if key not in hints):
            known = nearest(key, hints) or f"; known keys: {', '.join(kind.__struct_fields__)}"
            found.append(f"unknown key `{key}`{at}{known}")
        missing = (field.name for field in fields if field.required and field.name not in value)
        found += [f"missing required key `{name}`{at}" for name in missing]
        parts = [(f"{place}.{name}", value[name], hints[name]) for name in kind.__struct_fields__ if name in value]
    elif get_origin(kind) is list and isinstance(value, list):
        parts = [(f"{place}[{i}]", each, get_args(kind)[0]) for i, each in enumerate(value)]
    elif get_origin(kind) is dict and isinstance(value, dict):
        parts = [(f"{place}.{key}", each, get_args(kind)[1]) for key, each in value.items()]
    else:
        parts = []
    for part in parts:
        found += find_mistakes(part[1], part[2], part[0])
    return found or _first_mistake(value, whole, place)


def _chosen(value: object, kind: Any) -> Any:
    """Of a union the one member for objects, or for lists, where the value is such; without a constraint around it."""
    if get_origin(kind) is Annotated:
        return _chosen(value, get_args(kind)[0])
    if get_origin(kind) in (None, list, dict) or not isinstance(value, dict | list):
        return kind
    wanted = (msgspec.Struct, dict) if isinstance(value, dict) else (list,)
    members = [(each, get_origin(each) or each) for each in get_args(kind)]
    fitting = [each for each, bare in members if isinstance(bare, type) and issubclass(bare, wanted)]
    return fitting[0] if len(fitting) == 1 else kind


def _first_mistake(value: object, kind: Any, place: str) -> list[str]:
    try:
        msgspec.convert(value, kind)
        return []
    except msgspec.ValidationError as error:
        text = str(error)
        if "`$" in text:
            return [text.replace("`$", f"`{place}", 1)]
        return [text if place == "$" else f"{text} - at `{place}`"]

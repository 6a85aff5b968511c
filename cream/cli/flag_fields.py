"""Flags as fields of dataclasses: their definition, their values, and which of them decide an output."""

import dataclasses
import enum
import math
import types
import typing
from collections.abc import Iterable, Iterator, Sequence

from cream.errors import UserError, nearest

INF = math.inf
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "yes or no"}
BOOLEANS = {"yes": True, "true": True, "1": True, "on": True, "no": False, "false": False, "0": False, "off": False}
NULLS = ("none", "null")
IF_GIVEN = "if given"


def is_plain(text: str) -> bool:
    """Whether a text can be part of a path and of a JSON file: it is not empty, and has no NUL and no lone surrogate
    (by which Python represents bytes that are not UTF-8)."""
    return text.encode(errors="ignore").decode() == text != "" and "\0" not in text


@dataclasses.dataclass(frozen=True)
class Range:
    """The allowed numbers: `low` and `high` included, `above` and `below` excluded; never inf or nan."""

    low: float = -INF
    high: float = INF
    above: float = -INF
    below: float = INF

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and self.above < value < self.below

    def __str__(self) -> str:
        """As in --help and in error messages; empty if any number is allowed."""
        bottom, top = max(self.low, self.above), min(self.high, self.below)
        if bottom > -INF and top < INF:
            return f"in {'[' if bottom == self.low else '('}{bottom}, {top}{']' if top == self.high else ')'}"
        if bottom > -INF:
            return f"{'at least' if bottom == self.low else 'above'} {bottom}"
        return f"{'at most' if top == self.high else 'below'} {top}" if top < INF else ""


def flag(
    default,
    help: str,
    *,
    aliases: Iterable[str] = (),
    choices: Iterable | None = None,
    decides: bool | str = True,
    **limits: float,
):
    """A dataclass field with its help text; `dataclasses.MISSING` as default makes the flag required.

    aliases: further spellings, without dashes; one letter is a short flag ("r" is -r).
    choices: the allowed values of a str, int or float, matched in any case, returned as spelled here.
    decides: whether the value affects the content of the output, so that another value makes another output
        (`deciding`). False if it only says where or how the work is done, or names an input whose hash is recorded.
        IF_GIVEN: any value but the default does, so that outputs from before there was the flag are up to date.
    limits: the range of an int or float: low and high (included), above and below (excluded).
    """
    metadata = {
        "help": help,
        "aliases": tuple(aliases),
        "choices": tuple(choices or ()),
        "range": Range(**limits),
        "decides": decides,
    }
    return dataclasses.field(default=default, metadata=metadata)


def one_of(options: dict[str, type]) -> type:
    """The flags of a choice by name: a dataclass with one group for each of `options` (name -> flags).

    A flag that several groups define alike is one flag on the command line. `chosen` gives the group that was chosen.
    """
    fields = [(name, cls, dataclasses.field(default_factory=cls)) for name, cls in options.items()]
    return dataclasses.make_dataclass("Options", fields)


def chosen(options, name: str, flag_name: str, *shared):
    """The flags of the choice `name`, from an instance of `one_of`. Raises UserError if a flag of another choice was
    given, which would have no effect; `flag_name` is the choosing flag, such as "--reward", and `shared` are groups
    whose flags apply to all choices."""
    own = getattr(options, name)
    known = {field.name for group in (own, *shared) for field in fields_of(group)}
    owners: dict[str, list[str]] = {}
    for other in fields_of(options):
        for field in fields_of(group := getattr(options, other.name)):
            if field.name not in known and getattr(group, field.name) != field.default:
                owners.setdefault(field.name, []).append(other.name)
    if owners:
        others = "; ".join(f"--{each} belongs to {flag_name} {one_among(names)}" for each, names in owners.items())
        raise UserError(f"{flag_name} {name}: {others}")
    return own


def one_among(names: Sequence[str]) -> str:
    """ "a, b or c"."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def deciding(config) -> dict:
    """{flag name: value} of the flags that affect the output, by `decides`, as in `as_dict`."""
    flat = as_dict(config)
    return {name: flat[name] for name in _deciding(config)}


def _deciding(config) -> Iterator[str]:
    for field in fields_of(config):
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            yield from _deciding(value)
        elif (decides := field.metadata.get("decides", True)) and (decides != IF_GIVEN or value != field.default):
            yield field.name


def as_dict(config) -> dict:
    """{flag name: str | int | float | bool | None}, flat, an enum as its member's name, as in a --config file."""
    flat = {}
    for field in fields_of(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= as_dict(value)
        else:
            flat[field.name] = value.name if isinstance(value, enum.Enum) else value
    return flat


def spell(value) -> str:
    """A flag's value as one types it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return value.name if isinstance(value, enum.Enum) else str(value)


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag. `words` maps spellings to values if there is a closed set of them."""

    name: str
    aliases: tuple[str, ...]
    group: str | None
    help: str
    kind: type
    optional: bool
    default: object
    words: dict[str, object]
    range: Range

    @property
    def expected(self) -> str:
        if self.words and self.kind is not bool:
            return f"one of {', '.join(self.words)}"
        return f"{KINDS[self.kind]} {self.range}".rstrip()

    def read(self, text) -> object:
        """The value of `text`, None for a flag without a value. The message of a ValueError says what was expected."""
        if text is None and self.kind is bool:
            return True
        if text is None or not isinstance(text, str):
            raise ValueError(f"needs {'a' if text is None else 'a single'} value: {self.expected}")
        words = {word.lower(): value for word, value in self.words.items()}
        if text.lower() in words:  # before the nulls: 'none' may be a member's name
            return words[text.lower()]
        if text.lower() in NULLS:
            if self.optional:
                return None
            raise ValueError(f"cannot be {text}, it needs {self.expected}")
        if self.kind is str and not self.words and not is_plain(text):
            raise ValueError(f"{text!r} is not text: it is empty, or has a NUL or bytes that are not UTF-8")
        if not self.words:
            try:
                value = self.kind(text)
                if self.kind is str or value in self.range:
                    return value
            except ValueError:
                pass
        raise ValueError(f"{text!r} is not {self.expected}{nearest(text, self.words)}")


def fields_of(cls) -> Iterator[dataclasses.Field]:
    return (field for field in dataclasses.fields(cls) if field.init)


def flags_of(cls, group: str | None = None, defaults=None) -> Iterator[Flag]:
    """The flags of a dataclass and its groups; `defaults`, an instance, replaces the fields' defaults."""
    hints = typing.get_type_hints(cls)
    for field in fields_of(cls):
        hint, default = hints[field.name], getattr(defaults, field.name, field.default)
        if default is dataclasses.MISSING and field.default_factory not in (dataclasses.MISSING, hint):
            default = field.default_factory()  # for a group: an instance with defaults of its own
        if dataclasses.is_dataclass(hint):
            yield from flags_of(hint, hint.__doc__.strip().splitlines()[0], default)
            continue
        union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        kinds = typing.get_args(hint) if union else (hint,)
        kind, *others = (each for each in kinds if each is not type(None))
        if others:
            raise TypeError(f"{cls.__name__}.{field.name}: a flag cannot be {hint}")
        if isinstance(kind, enum.EnumType):
            words = dict(kind.__members__)
        elif kind in KINDS:
            words = BOOLEANS if kind is bool else {str(choice): choice for choice in field.metadata.get("choices", ())}
        else:
            raise TypeError(f"{cls.__name__}.{field.name}: a flag cannot be {hint}")
        aliases, text = field.metadata.get("aliases", ()), field.metadata.get("help", "")
        limits = field.metadata.get("range", Range())
        fits = kind in (int, float) and (not isinstance(default, int | float) or default in limits)
        if limits != Range() and not fits:
            raise TypeError(f"{cls.__name__}.{field.name}: {default!r} is not a number {limits}")
        yield Flag(field.name, aliases, group, text, kind, type(None) in kinds, default, words, limits)


def dashed(name: str) -> str:
    return f"-{name}" if len(name) == 1 else f"--{name}"

"""Command-line flags from dataclasses: one flat flag per field, one group per nested dataclass.

The words of the command line and of a --config file take the same way: spelling -> flag -> value, and every problem
is collected before the script exits with 2. argparse only lays out --help: it stops at the first problem, lets a
repeated flag win silently, takes `-1e-5` for a flag and knows no config file. simple_parsing inherits all of that,
reads enums by exact case, and costs 0.14 s of the 0.5 s that --help may take.
"""

import argparse
import dataclasses
import enum
import math
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path

from cream.cli.flag_files import read_pairs
from cream.errors import UserError, nearest

INF = math.inf
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "yes or no"}
BOOLEANS = {"yes": True, "true": True, "1": True, "on": True, "no": False, "false": False, "0": False, "off": False}
NULLS = ("none", "null")
OWN = "Configuration"  # the group of the parser's own flags


def is_plain(text: str) -> bool:
    """Whether a text can be part of a path and of a JSON file: it is not empty, has no NUL and no lone surrogate (which
    stand for bytes of a command line that are not UTF-8)."""
    return text.encode(errors="ignore").decode() == text != "" and "\0" not in text


@dataclasses.dataclass(frozen=True)
class _Range:
    """The numbers that a flag may be: `low` and `high` belong to them, `above` and `below` do not; never inf or nan."""

    low: float = -INF
    high: float = INF
    above: float = -INF
    below: float = INF

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and self.above < value < self.below

    def __str__(self) -> str:
        """As --help and refusals have it; nothing where any number will do."""
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
    decides: bool = True,
    **limits: float,
):
    """A dataclass field with its help text; `dataclasses.MISSING` as default makes the flag required.

    aliases: further spellings, without dashes; one letter is a short flag ("r" is -r).
    choices: the allowed values of a str, int or float, matched whatever the case, returned as spelled here.
    decides: whether the value decides what the output holds, so that another value makes another output (`deciding`).
        False where it says only where or how the work is done, or names an input whose hash stands for it.
    limits: the range of an int or float: low and high, which belong to it, above and below, which do not.
    """
    metadata = {
        "help": help,
        "aliases": tuple(aliases),
        "choices": tuple(choices or ()),
        "range": _Range(**limits),
        "decides": decides,
    }
    return dataclasses.field(default=default, metadata=metadata)


def one_of(options: dict[str, type]) -> type:
    """A group of flags for a choice by name: a dataclass with one group for each of `options`, name -> its flags.

    Several of them may have the same flag, defined alike: it is one on the command line, and each of them gets its
    value. `chosen` gives the flags of the one that was chosen.
    """
    fields = [(name, cls, dataclasses.field(default_factory=cls)) for name, cls in options.items()]
    return dataclasses.make_dataclass("Options", fields)


def chosen(options, name: str, flag_name: str):
    """The flags of the choice `name`, of an instance of `one_of`. Raises UserError where a flag of another choice was
    given, which would decide nothing; `flag_name` is the flag that chooses, as "--reward"."""
    own = getattr(options, name)
    known = {field.name for field in _fields(own)}
    owners: dict[str, list[str]] = {}
    for other in _fields(options):
        for field in _fields(group := getattr(options, other.name)):
            if field.name not in known and getattr(group, field.name) != field.default:
                owners.setdefault(field.name, []).append(other.name)
    if owners:
        told = "; ".join(f"--{each} belongs to {flag_name} {' or '.join(of)}" for each, of in owners.items())
        raise UserError(f"{flag_name} {name}: {told}")
    return own


def parse(
    cls,
    argv: list[str] | None = None,
    *,
    description: str,
    example: str,
    files: bool = True,
    words: list[str] | None = None,
):
    """An instance of the dataclass `cls`, from its defaults, the --config file and `argv` (default: sys.argv[1:]).

    Without `files` there is no --config and no --print_config, and `cls` may have flags of these names. `words` takes
    the words that belong to no flag; without it they are problems.
    A later source wins over an earlier one. Fields are str, int, float, bool, an Enum (given by member name), `| None`
    of these, or a dataclass: a group, titled in --help by the first line of its docstring.
    Raises SystemExit: 0 after --help and --print_config, 2 after printing every problem of the user's on stderr, a
    UserError from `__post_init__` included. Raises TypeError when `cls` itself is wrong (a flag defined twice, say).
    """
    flags, problems = _all_flags(cls, files), []
    given = _given(flags, sys.argv[1:] if argv is None else argv, problems, words)
    if given.get("help"):
        print(_help(flags, description, words is not None) + f"\nexample:\n{example}")
        sys.exit(0)
    path = given.get("config") if files else None
    from_file = _from_file(cls, path, problems)
    values = {f.name: f.default for f in flags} | from_file | given
    config = _build(cls, flags, values, problems)
    if problems:
        prog = Path(sys.argv[0]).name
        lines = [f"{prog}: {problem}" for problem in problems]
        print(*lines, f"{prog} --help lists every flag", sep="\n", file=sys.stderr)
        sys.exit(2)
    if path is not None:
        inherited = (f"{name}={spelled(value)}" for name, value in from_file.items() if name not in given)
        print(f"from {path}: {', '.join(inherited) or 'nothing'}", file=sys.stderr)
    if files and values["print_config"]:
        import yaml

        print(yaml.safe_dump(as_dict(config), sort_keys=False), end="")
        sys.exit(0)
    return config


def problems_of(cls, argv: list[str]) -> list[str]:
    """What `parse` would refuse a command line for, one message each, [] when nothing; prints nothing, never exits."""
    flags, problems = _all_flags(cls, files=True), []
    given = _given(flags, argv, problems)
    from_file = _from_file(cls, given.get("config"), problems)
    _build(cls, flags, {f.name: f.default for f in flags} | from_file | given, problems)
    return problems


def deciding(config) -> dict:
    """What of a config decides its output: {flag name: value} of the flags that do (`flag`'s `decides`), as `as_dict`
    has them."""
    flat = as_dict(config)
    return {name: flat[name] for name in _deciding(config)}


def _deciding(config) -> Iterator[str]:
    for field in _fields(config):
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            yield from _deciding(value)
        elif field.metadata.get("decides", True):
            yield field.name


def as_dict(config) -> dict:
    """{flag name: str | int | float | bool | None}, flat, an enum as its member's name: what a --config file holds."""
    flat = {}
    for field in _fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= as_dict(value)
        else:
            flat[field.name] = value.name if isinstance(value, enum.Enum) else value
    return flat


@dataclasses.dataclass
class _Help:
    """The flag that every script has."""

    help: bool = flag(False, "show this help message and exit", aliases=("h",))


@dataclasses.dataclass
class _Source(_Help):
    """Those of a script whose flags may stand in a file."""

    config: str | None = flag(
        None,
        "file of flags, .yaml, .yml or .json: one flat map, or a run's args.json; the command line wins over it",
        aliases=("load_args_path",),
    )
    print_config: bool = flag(False, "print every value as YAML, in the form that --config reads, and exit")


@dataclasses.dataclass(frozen=True)
class _Flag:
    """One flag. `words` maps the spellings of a closed set of values to the values; text and numbers have none."""

    name: str
    aliases: tuple[str, ...]
    group: str | None
    help: str
    kind: type
    optional: bool
    default: object
    words: dict[str, object]
    range: _Range

    @property
    def expected(self) -> str:
        if self.words and self.kind is not bool:
            return f"one of {', '.join(self.words)}"
        return f"{KINDS[self.kind]} {self.range}".rstrip()

    def read(self, text) -> object:
        """The value that `text` stands for, None being a flag without a value; ValueError says what was expected."""
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
            raise ValueError(f"{text!r} is no text: it is empty, or has a NUL or bytes that are not UTF-8")
        if not self.words:
            try:
                value = self.kind(text)
                if self.kind is str or value in self.range:
                    return value
            except ValueError:
                pass
        raise ValueError(f"{text!r} is not {self.expected}{nearest(text, self.words)}")


def _fields(cls) -> Iterator[dataclasses.Field]:
    return (field for field in dataclasses.fields(cls) if field.init)


def _flags(cls, group: str | None = None, defaults=None) -> Iterator[_Flag]:
    """The flags of a dataclass and its groups; `defaults` is an instance whose values replace the fields' defaults."""
    hints = typing.get_type_hints(cls)
    for field in _fields(cls):
        hint, default = hints[field.name], getattr(defaults, field.name, field.default)
        if default is dataclasses.MISSING and field.default_factory not in (dataclasses.MISSING, hint):
            default = field.default_factory()  # for a group: an instance with defaults of its own
        if dataclasses.is_dataclass(hint):
            yield from _flags(hint, hint.__doc__.strip().splitlines()[0], default)
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
        limits = field.metadata.get("range", _Range())
        fits = kind in (int, float) and (not isinstance(default, int | float) or default in limits)
        if limits != _Range() and not fits:
            raise TypeError(f"{cls.__name__}.{field.name}: {default!r} is no number {limits}")
        yield _Flag(field.name, aliases, group, text, kind, type(None) in kinds, default, words, limits)


def _all_flags(cls, files: bool) -> list[_Flag]:
    """The flags of a script: those of `cls`, and the parser's own. One that several groups define alike stands once."""
    found: dict[str, _Flag] = {}
    for each in [*_flags(cls), *_flags(_Source if files else _Help, OWN)]:
        first = found.setdefault(each.name, each)
        if dataclasses.replace(first, group=each.group) != each:
            raise TypeError(f"the flag {_dashed(each.name)} is defined twice, in {first.group} and in {each.group}")
    return list(found.values())


def _dashed(name: str) -> str:
    return f"-{name}" if len(name) == 1 else f"--{name}"


def _by_spelling(flags: Iterable[_Flag], dashes: bool = True) -> dict[str, _Flag]:
    """{spelling: flag}, aliases included."""
    known: dict[str, _Flag] = {}
    for each in flags:
        for name in (each.name, *each.aliases):
            spelling = _dashed(name) if dashes else name
            if spelling in known:
                raise TypeError(f"the flag {spelling} is defined twice, by {known[spelling].name} and {each.name}")
            known[spelling] = each
    return known


def _given(flags: list[_Flag], argv: Iterable[str], problems: list[str], words: list[str] | None = None) -> dict:
    """{flag name: value} of a command line; what is wrong with it is added to `problems`."""
    return _assign(_words(argv, problems, words), _by_spelling(flags), "", problems)


def _words(argv: Iterable[str], problems: list[str], words: list[str] | None) -> Iterator[tuple[str, str | None]]:
    """(flag as spelled, its text or None) for each flag; a word that belongs to no flag is added to `words`, or else to
    `problems`."""
    rest = list(argv)[::-1]
    while rest:
        word = rest.pop()
        if not _is_flag(word) and words is not None:
            words.append(word)
            if not is_plain(word):
                problems.append(f"{word!r} is empty, or has bytes that are not UTF-8")
            continue
        if not _is_flag(word):
            problems.append(f"{word}: stray word; a value stands right after its flag, one word for each flag")
            continue
        spelling, equals, text = word.partition("=")
        if not equals and rest and not _is_flag(rest[-1]):
            yield spelling, rest.pop()
        else:
            yield spelling, text if equals else None


def _is_flag(word: str) -> bool:
    """Whether a word starts a flag rather than being a value; -1e-5 is a value, and so is a lone dash."""
    try:
        float(word)
    except ValueError:
        return word.startswith("-") and word != "-"
    return False


def _assign(pairs: Iterable[tuple[str, object]], known: dict[str, _Flag], where: str, problems: list[str]) -> dict:
    """{flag name: value} of (spelling, text) pairs; what is wrong with a pair is added to `problems`."""
    values, spelled = {}, {}
    for spelling, text in pairs:
        try:
            each = _look_up(spelling, known)
            first = spelled.setdefault(each.name, spelling)
            if each.name in values:
                raise ValueError("given twice" if first == spelling else f"given twice, first as {first}")
            values[each.name] = None  # given, even where its text cannot be read
            values[each.name] = each.read(text)
        except ValueError as problem:
            problems.append(f"{where}{spelling}: {problem}")
    return values


def _look_up(spelling: str, known: dict[str, _Flag]) -> _Flag:
    if spelling in known:
        return known[spelling]
    if longer := [name for name in known if spelling.strip("-") and name.startswith(spelling)]:
        raise ValueError(f"unknown flag; flags are not abbreviated, write {' or '.join(longer)}")
    raise ValueError(f"unknown flag{nearest(spelling, known)}")


def _from_file(cls, path: str | None, problems: list[str]) -> dict:
    """{flag name: value} of a --config file, {} without one; what is wrong with it is added to `problems`."""
    if path is None:
        return {}
    try:
        pairs = read_pairs(Path(path))
    except ValueError as error:
        problems.append(f"--config {path}: {error}")
        return {}
    known = _by_spelling((f for f in _all_flags(cls, files=True) if f.group != OWN), dashes=False)
    return _assign(pairs, known, f"{path}: ", problems)


def _build(cls, flags: list[_Flag], values: dict, problems: list[str]):
    """The instance of `cls` from the values of all its flags; None where there are problems, new ones being added."""
    problems += [f"{_dashed(f.name)} is required: {f.help}" for f in flags if values[f.name] is dataclasses.MISSING]
    return None if problems else _instance(cls, values, problems)


def _instance(cls, values: dict, problems: list[str]):
    """The instance of `cls`, groups first; a UserError of any `__post_init__` is added to `problems`."""
    hints, before, arguments = typing.get_type_hints(cls), len(problems), {}
    for field in _fields(cls):
        group = dataclasses.is_dataclass(hints[field.name])
        arguments[field.name] = _instance(hints[field.name], values, problems) if group else values[field.name]
    try:
        return cls(**arguments) if len(problems) == before else None
    except UserError as error:
        problems.append(str(error))


def spelled(value) -> str:
    """A flag's value as one would type it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return value.name if isinstance(value, enum.Enum) else str(value)


def _help(flags: list[_Flag], description: str, words: bool) -> str:
    """The text of --help, without the example."""
    parser = argparse.ArgumentParser(
        usage=f"%(prog)s {'COMMAND PATH ... ' * words}[--flag value ...]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups = {None: parser}
    for each in flags:
        if each.name == "help":  # argparse has its own
            continue
        group = groups.get(each.group) or groups.setdefault(each.group, parser.add_argument_group(each.group))
        metavar = {bool: "yes|no", int: "N", float: "X"}.get(each.kind, "NAME" if each.words else "TEXT")
        values = each.expected if each.words and each.kind is not bool else str(each.range)
        default = "required" if each.default is dataclasses.MISSING else f"default {spelled(each.default)}"
        text = f"{each.help} ({'; '.join(filter(None, (values, default)))})".replace("%", "%%")
        group.add_argument(*map(_dashed, (each.name, *each.aliases)), metavar=metavar, help=text)
    return parser.format_help()

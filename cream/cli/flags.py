"""Command-line flags from dataclasses: one flat flag per field, one group per nested dataclass.

The command line and a --config file are read in the same way: spelling -> flag -> value, and all problems are reported
together. argparse only formats --help: it stops at the first problem, lets a repeated flag win silently, takes `-1e-5`
for a flag and has no config file; simple_parsing inherits all of that and slows down --help.
"""

import dataclasses
import os
import sys
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path

from cream.cli import screen
from cream.cli.flag_fields import (
    Flag,
    as_dict,
    chosen,
    dashed,
    deciding,
    fields_of,
    flag,
    flags_of,
    is_plain,
    one_of,
    spell,
)
from cream.cli.flag_files import read_pairs
from cream.cli.help_text import help_text
from cream.errors import UserError, alike

__all__ = ["as_dict", "chosen", "deciding", "flag", "is_plain", "one_of", "spell"]  # re-exported

OWN = "Configuration"  # the group of the parser's own flags
KNOWN_AS = {  # what other libraries call a flag -> its names here, of which a script has at most one
    "learning_rate": ("lr",),
    "epochs": ("epoch",),
    "num_train_epochs": ("epoch",),
    "num_epochs": ("epoch",),
    "batch_size": ("train_bsz", "max_tokens_per_batch"),
    "per_device_train_batch_size": ("train_bsz",),
    "gradient_checkpointing": ("grad_checkpointing",),
    "warmup_ratio": ("warmup_step_ratio",),
    "use_lora": ("lora",),
    "model_name_or_path": ("model",),
    "model_path": ("model",),
    "base_model": ("model",),
    "model_ckpt": ("checkpoint",),
    "ref_model": ("ref_model_ckpt",),
    "dataset": ("name", "input_file"),
    "dataset_name": ("name", "input_file"),
    "data": ("name", "input_file"),
    "input": ("input_file",),
    "output_file": ("output", "output_dir"),
    "num_return_sequences": ("gen_n",),
    "n": ("gen_n",),
    "temperature": ("gen_temperature",),
    "max_new_tokens": ("gen_max_tokens",),
    "max_tokens": ("gen_max_tokens",),
    "stop_strings": ("stop",),
    "limit": ("limit_size",),
    "center_rewards_coefficient": ("center_rewards",),
    "eval_dataset": ("eval_name",),
    "eval_steps": ("eval_every",),
    "gpus": ("device",),
    "tp": ("tensor_parallel_size",),
}
OWNERS = {  # flags that belong to some stages, and are looked for in others
    **dict.fromkeys(("lr", "epoch", "train_bsz", "grad_accum", "lora", "deepspeed", "loss"), "train.py"),
    **dict.fromkeys(("gen_n", "gen_temperature", "gen_max_tokens"), "train.py and infer.py"),
    **dict.fromkeys(("top_p", "mode"), "infer.py"),
    **dict.fromkeys(("top_k", "min_p", "repetition_penalty", "stop"), "infer.py"),
    **dict.fromkeys(
        ("reward", "ref_model_ckpt", "normalize", "judge_model", "judge_prompt", "reward_model"),
        "train.py and rewarding.py",
    ),
    **dict.fromkeys(("file1", "file2", "shuffle_consistency"), "cal_consistency.py"),
    "engine": "infer.py and rewarding.py",
    "rank": "cal_consistency.py and make_pairs.py",
    "beta": "train.py, cal_consistency.py and make_pairs.py",
    "method": "train.py, cal_consistency.py and make_pairs.py",
    "checkpoint": "train.py, infer.py and rewarding.py",
    "overwrite": "the stages; a loop whose settings changed gets another output_dir",
}


def parse(
    cls,
    argv: list[str] | None = None,
    *,
    description: str,
    example: str,
    words: list[str] | None = None,
):
    """An instance of the dataclass `cls`, from its defaults, the --config file and `argv` (default: sys.argv[1:]).

    Later sources override earlier ones. Where `cls.READS_FILES` is False, there is no --config of flags and no
    --print_config. Words that belong to no flag are added to `words`; without it they are problems. Fields
    are str, int, float, bool, an Enum (given by member name), `| None` of these, or a dataclass: a group, titled in
    --help by the first line of its docstring.
    Raises SystemExit: 0 after --help and --print_config, 2 after printing all problems on stderr, including a UserError
    from `__post_init__`. Raises TypeError if `cls` itself is wrong (a flag defined twice, say).
    """
    files = _reads_files(cls)
    flags, problems = _all_flags(cls, files), []
    given = _given(flags, sys.argv[1:] if argv is None else argv, problems, words)
    if given.get("help"):
        _print(help_text(flags, description, words=words is not None) + f"\nexample:\n{example}")
        sys.exit(0)
    path = given.get("config") if files else None
    from_file = _from_file(cls, path, problems)
    values = {f.name: f.default for f in flags} | from_file | given
    config = _build(cls, flags, values, problems)
    if values["quiet"] and values["verbose"]:
        problems.append("--quiet and --verbose contradict each other: give one of them")
    if problems:
        prog = Path(sys.argv[0]).name
        lines = [f"{prog}: {problem}" for problem in problems]
        screen.show_error("\n".join([*lines, f"{prog} --help lists every flag"]))
        sys.exit(2)
    screen.choose(values["quiet"], values["verbose"])
    if path is not None:
        inherited = (f"{name}={spell(value)}" for name, value in from_file.items() if name not in given)
        print(f"from {path}: {', '.join(inherited) or 'nothing'}", file=sys.stderr)
    if files and values["print_config"]:
        import yaml

        _print(yaml.safe_dump(as_dict(config), sort_keys=False).rstrip())
        sys.exit(0)
    return config


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has ended; without this, flushing at exit would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def try_parse(cls, argv: list[str], words: list[str] | None = None) -> tuple[object | None, list[str]]:
    """What `parse` returns for a command line, or None and the problems for which it would refuse it."""
    files = _reads_files(cls)
    flags, problems = _all_flags(cls, files), []
    given = _given(flags, argv, problems, words)
    from_file = _from_file(cls, given.get("config") if files else None, problems)
    return _build(cls, flags, {f.name: f.default for f in flags} | from_file | given, problems), problems


@dataclasses.dataclass
class _Help:
    """The flags of every script."""

    help: bool = flag(False, "show this help message and exit", aliases=("h",))
    quiet: bool = flag(False, "print only results, alarms and errors", decides=False)
    verbose: bool = flag(
        False,
        "print what libraries say as well; of a loop's stages all that otherwise only their log files have",
        decides=False,
    )


@dataclasses.dataclass
class _Source(_Help):
    """The flags of a script that reads flags from a file."""

    config: str | None = flag(
        None,
        "read flags from a .yaml, .yml or .json file: one flat map, or a run's args.json; the command line "
        "overrides it",
        aliases=("load_args_path",),
    )
    print_config: bool = flag(False, "print the value of every flag as YAML, in the form that --config reads, and exit")


def _reads_files(cls) -> bool:
    """Whether a script's --config names a file of flags; its class may say READS_FILES = False, and have its own."""
    return getattr(cls, "READS_FILES", True)


def _all_flags(cls, files: bool) -> list[Flag]:
    """The flags of `cls`, and the parser's own. A flag that several groups define alike is one flag."""
    by_name: dict[str, Flag] = {}
    for each in [*flags_of(cls), *flags_of(_Source if files else _Help, OWN)]:
        first = by_name.setdefault(each.name, each)
        if dataclasses.replace(first, group=each.group) != each:
            raise TypeError(f"the flag {dashed(each.name)} is defined twice, in {first.group} and in {each.group}")
    return list(by_name.values())


def _by_spelling(flags: Iterable[Flag], dashes: bool = True) -> dict[str, Flag]:
    """{spelling: flag}, aliases included."""
    spellings: dict[str, Flag] = {}
    for each in flags:
        for name in (each.name, *each.aliases):
            spelling = dashed(name) if dashes else name
            if spelling in spellings:
                raise TypeError(f"the flag {spelling} is defined twice, by {spellings[spelling].name} and {each.name}")
            spellings[spelling] = each
    return spellings


def _given(flags: list[Flag], argv: Iterable[str], problems: list[str], words: list[str] | None = None) -> dict:
    """{flag name: value} of a command line; adds to `problems`."""
    return _assign(_words(argv, problems, words), _by_spelling(flags), "", problems)


def _words(argv: Iterable[str], problems: list[str], words: list[str] | None) -> Iterator[tuple[str, str | None]]:
    """(flag as spelled, its text or None) for each flag; a word that belongs to no flag is added to `words`, or without
    these to `problems`."""
    rest = list(argv)[::-1]
    while rest:
        word = rest.pop()
        if not _is_flag(word) and words is not None:
            words.append(word)
            if not is_plain(word):
                problems.append(f"{word!r} is empty, or has bytes that are not UTF-8")
            continue
        if not _is_flag(word):
            problems.append(f"{word}: belongs to no flag; a value follows its flag, one word for each flag")
            continue
        spelling, equals, text = word.partition("=")
        if not equals and rest and not _is_flag(rest[-1]):
            yield spelling, rest.pop()
        else:
            yield spelling, text if equals else None


def _is_flag(word: str) -> bool:
    """Whether a word is a flag rather than a value such as -1e-5 or a lone dash."""
    try:
        float(word)
    except ValueError:
        return word.startswith("-") and word != "-"
    return False


def as_words(name: str, value) -> list[str]:
    """A flag and its value as words of a command line, one word where the value looks like a flag."""
    text = spell(value)
    return [f"{dashed(name)}={text}"] if _is_flag(text) else [dashed(name), text]


def _assign(pairs: Iterable[tuple[str, object]], spellings: dict[str, Flag], where: str, problems: list[str]) -> dict:
    """{flag name: value} of (spelling, text) pairs; adds to `problems`."""
    values, spelled = {}, {}
    for spelling, text in pairs:
        try:
            each = _look_up(spelling, spellings)
            first = spelled.setdefault(each.name, spelling)
            if each.name in values:
                raise ValueError("given twice" if first == spelling else f"given twice, first as {first}")
            values[each.name] = None  # given, even where its text cannot be read
            values[each.name] = each.read(text)
        except ValueError as problem:
            problems.append(f"{where}{spelling}: {problem}")
    return values


def _look_up(spelling: str, spellings: dict[str, Flag]) -> Flag:
    if spelling in spellings:
        return spellings[spelling]
    if longer := [name for name in spellings if spelling.strip("-") and name.startswith(spelling)]:
        raise ValueError(f"unknown flag; flags are not abbreviated, write {' or '.join(longer)}")
    raise ValueError(f"unknown flag{_hint(spelling, spellings)}")


def _hint(spelling: str, spellings: dict[str, Flag]) -> str:
    """What may have been meant: a flag by its name elsewhere, a flag of another script, or flags that look alike."""
    word, bare = spelling.lstrip("-").replace("-", "_"), {name.lstrip("-"): name for name in spellings}
    names = KNOWN_AS.get(word, (word,))
    meant = [bare[name] for name in names if name in bare][:1]
    owned = next((f"--{name} belongs to {OWNERS[name]}" for name in names if name in OWNERS), None)
    if owned and not meant:
        return f"; {owned}"
    close = meant or [bare[name] for name in alike(word, bare)]
    return f"; did you mean {', '.join(close)}?" if close else ""


def _from_file(cls, path: str | None, problems: list[str]) -> dict:
    """{flag name: value} of a --config file, {} without one; adds to `problems`."""
    if path is None:
        return {}
    try:
        pairs = read_pairs(Path(path))
    except ValueError as error:
        problems.append(f"--config {path}: {error}")
        return {}
    spellings = _by_spelling((f for f in _all_flags(cls, files=True) if f.group != OWN), dashes=False)
    return _assign(pairs, spellings, f"{path}: ", problems)


def _build(cls, flags: list[Flag], values: dict, problems: list[str]):
    """The instance of `cls` from the values of all its flags; None if there are problems, which it may add to."""
    problems += [f"{dashed(f.name)} is required: {f.help}" for f in flags if values[f.name] is dataclasses.MISSING]
    return None if problems else _instance(cls, values, problems)


def _instance(cls, values: dict, problems: list[str]):
    """The instance of `cls`, groups first; adds the UserErrors of `__post_init__` to `problems`."""
    hints, before, arguments = typing.get_type_hints(cls), len(problems), {}
    for field in fields_of(cls):
        group = dataclasses.is_dataclass(hints[field.name])
        arguments[field.name] = _instance(hints[field.name], values, problems) if group else values[field.name]
    try:
        return cls(**arguments) if len(problems) == before else None
    except UserError as error:
        problems.append(str(error))

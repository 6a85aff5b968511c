"""LLM-as-a-judge: a model reads each response and says how good it is (Self-Rewarding Language Models, 2401.10020).

The judge is the policy itself (--checkpoint), or any other model (--judge_model). It is asked by a rubric, and its
verdict is either sampled, k texts of which the valid scores are averaged, or expected: the mean of the admissible
scores by their probabilities where the judge would write the score, without a text. A pairwise judge compares each two
responses in both orders; a response's reward is its mean probability to be the better one.

Departures from the released codes: a text without a valid score has none, never -1 or a default, and a response without
any has no reward; the last score in a text counts; limits are on new tokens; responses belong to their prompt by uuid.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path

from cream.cli.flags import flag
from cream.engines import ENGINES, GREEDY, Sampling, temperature_flag
from cream.errors import UserError
from cream.files.fingerprints import fingerprint_text
from cream.records import Prompt, Samples
from cream.rewards.base import GroupReward
from cream.scoring import logprobs
from cream.scoring.completions import Texts
from cream.scoring.driver import Pass
from cream.scoring.logprobs import Group, Scored
from cream.text.judge_prompts import JUDGE_PROMPTS
from cream.text.judging import NO_SCORE, Form, Verdict, parse_file, read_form
from cream.text.thoughts import ThoughtFlags, split_thought

FIRST = 64  # requests after which a judge without any score ends the stage
SHOWN = 300  # characters of a judge's text in a message
SAMPLED = ("judge_samples", "judge_temperature", "judge_top_p", "judge_max_tokens")  # flags of --judge_mode sampled
UNFINISHED = "the response ends within its thought: there is nothing to judge"
TOO_LONG = "the request to the judge does not fit"
ALONE = "no other response to compare with"
UNDECIDED = "no comparison with a choice in both orders"
EQUAL = 1e-3  # nats by which rounding may put a longer text's log-probability above that of its beginning


@dataclass
class Options(ThoughtFlags, logprobs.Options):
    """Rewards by a judge (judge)"""

    judge_model: str | None = flag(
        None,
        "the judge: a name in configs/checkpoint.json, a folder, a base model's name or a Hugging Face id; none: the "
        "policy itself, --checkpoint",
        decides=False,
    )
    judge_prompt: str = flag(
        "additive",
        f"what the judge is asked: {', '.join(JUDGE_PROMPTS)}, or a Jinja file with {{{{ prompt }}}} and "
        "{{ response }}, or with {{ response_a }} and {{ response_b }} to compare two",
    )
    judge_parse: str | None = flag(
        None,
        "where the judge's text has the score, the last one counts: a text such as 'Score: {{ reward }}', a regular "
        "expression with one group, or path.py:function (text -> number or None; this RUNS that file); of a pairwise "
        "judge A or B; none: as the named --judge_prompt says",
    )
    judge_mode: str = flag(
        "sampled",
        "sampled: the mean of the valid scores in --judge_samples texts; expected: nothing is generated, the mean of "
        "the admissible scores by their probabilities",
        choices=("sampled", "expected"),
    )
    judge_samples: int = flag(3, "sampled judgements of a response (pairwise: of two responses in one order)", low=1)
    judge_temperature: float = temperature_flag(0.7, "sampling temperature of judgements")
    judge_top_p: float = flag(0.9, "nucleus sampling of judgements, as --top_p of infer.py", above=0, high=1)
    judge_max_tokens: int = flag(256, "limit on new tokens per judgement", low=1)
    valid_reward: str | None = flag(
        None,
        "valid scores: a range such as 0:5, or comparisons such as 'reward >= 1 and reward != 3'; others are no "
        "scores; none: as the named --judge_prompt says",
    )
    on_unparsed: str = flag(
        "stop",
        f"where none of the first {FIRST} judged requests has a score: stop ends the stage with what the judge said, "
        "continue goes through all",
        choices=("stop", "continue"),
        decides=False,
    )
    seed: int = flag(0, "seed of these texts", low=0, high=2**32 - 1)
    engine: str = flag("auto", "engine that generates these texts, as in infer.py", choices=("auto", *ENGINES))
    form: Form | None = field(init=False, default=None)  # read by `prepare`

    def __post_init__(self):
        super().__post_init__()
        given = [name for name in SAMPLED if getattr(self, name) != getattr(type(self), name)]
        if self.expected and given:
            raise UserError(f"--judge_mode expected generates no text: --{', --'.join(given)} does not apply")
        if self.judge_temperature < GREEDY and self.judge_samples > 1:
            raise UserError(
                f"--judge_temperature {self.judge_temperature:g} is greedy: {self.judge_samples} judgements would be "
                "equal; give --judge_samples 1"
            )

    @property
    def expected(self) -> bool:
        """Whether no text is generated."""
        return self.judge_mode == "expected"

    def sampling(self) -> Sampling:
        """How judgements are sampled."""
        how = {"temperature": self.judge_temperature, "top_p": self.judge_top_p, "max_tokens": self.judge_max_tokens}
        return Sampling(self.judge_samples, **how, seed=self.seed, logprobs=False, keep_special=False)


def passes(options: Options) -> list[Pass]:
    model = "judge_model" if options.judge_model else "checkpoint"
    worker = "logprobs" if options.expected else "completions"
    return [Pass("judge", model, worker=worker, external=bool(options.judge_model), quotes=True)]


def files(options: Options) -> dict[str, tuple[Path, None]]:
    """The judge prompt and the function, where they are files."""
    prompt = None if options.judge_prompt in JUDGE_PROMPTS else Path(options.judge_prompt)
    paths = {"judge_prompt": prompt, "judge_parse": parse_file(options.judge_parse)}
    return {name: (path, None) for name, path in paths.items() if path is not None}


def contents(options: Options) -> dict[str, str]:
    """A named judge prompt, whose words may be others in another version."""
    named = JUDGE_PROMPTS.get(options.judge_prompt)
    return {} if named is None else {"judge_prompt": "\n".join(filter(None, named))}


def prepare(options: Options, samples: Callable[[], Iterable[Samples]], skip: bool) -> None:
    """Raises UserError where the judge prompt, its parsing or the valid scores cannot be used."""
    options.form = read_form(options.judge_prompt, options.judge_parse, options.valid_reward)
    if options.expected:
        _ = options.form.continuations


def describe_form(form: Form) -> dict[str, str | None]:
    """What a checkpoint that is trained as a judge records of the form."""
    return {
        "judge_prompt": form.name,
        "template": fingerprint_text(form.template),
        "judge_parse": form.parse,
        "valid_reward": form.valid,
    }


def objection(options: Options, folder: Path, about: dict) -> str | None:
    """Why the model in a folder, whose sidecar is `about`, should not judge by this form: it was trained on another."""
    trained, own = about.get("judge"), describe_form(options.form)
    if not trained or trained["template"] == own["template"]:
        return None
    was, now = trained["judge_prompt"], own["judge_prompt"]
    return (
        f"{folder} was trained as a judge with --judge_prompt {was}, and here it is "
        f"{now if now != was else 'one of the same name with other words'}; give it what it was trained with"
    )


def requests(role: str, sample: Samples, options: Options) -> list[Prompt] | list[Group]:
    """One for each text to judge, or for each two in either order; equal texts are judged once."""
    form = options.form
    asked = [form.ask(sample.prompt, *texts) for texts in _judged(final_texts(sample, options), form)]
    if not options.expected:
        return [Prompt(messages=messages) for messages in asked]
    verdicts = form.continuations
    return [Group("", messages, verdicts, [False] * len(verdicts)) for messages in asked]


def combine(sample: Samples, results: dict[str, list], options: Options) -> GroupReward:
    """The reward of each response; see docs/formats.md for `parts`, `texts` and `preferences`."""
    texts, form = final_texts(sample, options), options.form
    found = dict(zip(_judged(texts, form), results["judge"], strict=True))
    judge = _compare if form.pairwise else _rate
    return judge(texts, found, options)


# Which texts are judged -----------------------------------------------------------------------------------------------


def final_texts(sample: Samples, options: Options) -> list[str | None]:
    """Each response without its thought; None where it ends within it."""
    texts: list[str | None] = []
    for response in sample.responses:
        split = split_thought(response, options.tags, sample.thought_opened)
        final = response if split.thought is None else split.final.lstrip("\n")
        texts.append(final if split.closed else None)
    return texts


def _judged(texts: Sequence[str | None], form: Form) -> list[tuple[str, ...]]:
    """What the judge is asked about: each different text, or each two of them in either order."""
    different = dict.fromkeys(text for text in texts if text is not None)
    return list(permutations(different, 2)) if form.pairwise else [(text,) for text in different]


# What a judge's verdicts make of them ---------------------------------------------------------------------------------


def read_texts(texts: Texts, options: Options) -> list[Verdict]:
    """The verdict in each of a judge's texts, without its thought."""
    verdicts = []
    for text, finish in zip(texts.text, texts.finish_reason, strict=True):
        split = split_thought(text, options.tags, texts.opened)
        verdicts.append(options.form.read(split.final, finish == "length") if split.closed else Verdict(None, NO_SCORE))
    return verdicts


def distribution(logprob: Sequence[float], num_tokens: Sequence[int], verdicts: Sequence[str]) -> list[float]:
    """The probability of each admissible verdict, given that it is one of them: the softmax of their log-probabilities.

    A verdict whose tokens begin another one ("1" and "10", digit by digit) stands for itself alone: without the
    probability that the judge continues to the longer one.
    """
    logs = []
    for i, text in enumerate(verdicts):
        longer = [
            logprob[j]
            for j, other in enumerate(verdicts)
            if other != text and other.startswith(text) and num_tokens[j] > num_tokens[i]
        ]
        rest = 1 - sum(math.exp(min(0.0, value - logprob[i])) for value in longer if value <= logprob[i] + EQUAL)
        logs.append(logprob[i] + math.log(rest) if rest > 0 else -math.inf)
    top = max(logs)
    shares = [math.exp(value - top) for value in logs]
    return [share / sum(shares) for share in shares]


def _reason(found: Texts | Scored, verdicts: Sequence[Verdict]) -> str:
    """Why no verdict has a value: one that was found and is not valid says more than none at all."""
    if isinstance(found, Scored):
        return next(filter(None, found.reason))
    reasons = [verdict.reason for verdict in verdicts]
    return next((reason for reason in reasons if reason != NO_SCORE), NO_SCORE) if reasons else TOO_LONG


def _distribution(found: Scored, form: Form) -> list[float] | None:
    """`distribution` of a request's result; None where an admissible verdict has no log-probability."""
    if any(value is None for value in found.logprob):
        return None
    return distribution(found.logprob, found.num_tokens, form.continuations)


def _rate(texts: Sequence[str | None], found: dict[tuple, Texts | Scored], options: Options) -> GroupReward:
    """Rewards by scores: the mean of the valid ones, or the expected score."""
    rated = {None: (None, UNFINISHED, None)}  # text -> reward, reason, part
    for (text,), result in found.items():
        if options.expected:
            part = _distribution(result, options.form)
            reward = part and sum(p * score for p, score in zip(part, options.form.scores, strict=True))
            rated[text] = reward, None if part else _reason(result, ()), part
        else:
            verdicts = read_texts(result, options)
            part = [verdict.value for verdict in verdicts]
            valid = [value for value in part if value is not None]
            reward = sum(valid) / len(valid) if valid else None
            rated[text] = reward, None if valid else _reason(result, verdicts), part or None
    rewards, reasons, parts = map(list, zip(*(rated[text] for text in texts), strict=True)) if texts else ([], [], [])
    name = "distribution" if options.expected else "scores"
    words = {} if options.expected else {text: result.text for (text,), result in found.items()}
    said = {
        f"judge_{k + 1}": [words[text][k] if words.get(text) else None for text in texts]
        for k in range(options.judge_samples)
        if words
    }
    return GroupReward(rewards, reasons, parts={name: parts}, texts=said)


def _compare(texts: Sequence[str | None], found: dict[tuple, Texts | Scored], options: Options) -> GroupReward:
    """Rewards by comparisons: the mean probability to be better than the other texts. That of two texts is the mean
    over both orders, so that a judge that always chooses the first finds all equal; without a choice in one of the
    orders it is unknown."""
    first = {pair: _choice(result, options) for pair, result in found.items()}
    different = [text for text in dict.fromkeys(texts) if text is not None]
    better = {
        (a, b): (first[a, b] + 1 - first[b, a]) / 2
        for a, b in found
        if first[a, b] is not None and first[b, a] is not None
    }
    rewards, reasons = [], []
    for text in texts:
        known = [better[text, other] for other in different if (text, other) in better]
        rewards.append(sum(known) / len(known) if known else None)
        missing = UNFINISHED if text is None else ALONE if len(different) == 1 else _undecided(text, found, options)
        reasons.append(None if known else missing)
    n = range(len(texts))
    chosen, preferences = ([[of.get((texts[i], texts[j])) for j in n] for i in n] for of in (first, better))
    said = {
        f"judge_{k + 1}_b{j}": [_word(found.get((texts[i], texts[j])), k) for i in n]
        for j in n
        for k in range(options.judge_samples)
        if not options.expected
    }
    return GroupReward(rewards, reasons, parts={"chosen_first": chosen}, texts=said, preferences=preferences)


def _choice(result: Texts | Scored, options: Options) -> float | None:
    """The share of choices for the response that comes first, or its probability."""
    if options.expected:
        found = _distribution(result, options.form)
        return found and found[0]
    valid = [verdict.value for verdict in read_texts(result, options) if verdict.value is not None]
    return sum(valid) / len(valid) if valid else None


def _undecided(text: str, found: dict[tuple, Texts | Scored], options: Options) -> str:
    """Why a text has no comparison: the reason of a request, where they all failed alike."""
    reasons = set()
    for pair, result in found.items():
        if text in pair and _choice(result, options) is None:
            reasons.add(_reason(result, () if options.expected else read_texts(result, options)))
    return reasons.pop() if len(reasons) == 1 else UNDECIDED


def _word(found: Texts | None, k: int) -> str | None:
    return found.text[k] if found is not None and found.text else None


# A judge that says nothing of use -------------------------------------------------------------------------------------


def watch(role: str, options: Options) -> "Watch | None":
    return None if options.expected or options.on_unparsed == "continue" else Watch(options)


class Watch:
    """Ends the stage where no text of the first requests has a valid score."""

    def __init__(self, options: Options):
        self.options, self.seen, self.truncated, self.said, self.found = options, 0, 0, None, False

    def see(self, texts: Texts) -> bool:
        """Looks at a request's texts; returns whether others are of interest."""
        if self.found or not texts.text:
            return not self.found
        self.found = any(verdict.value is not None for verdict in read_texts(texts, self.options))
        self.seen += 1
        self.truncated += texts.finish_reason.count("length")
        self.said = self.said or texts.text[0]
        if self.seen == FIRST:
            self.end()
        return not self.found

    def end(self) -> None:
        """Raises UserError where nothing was found so far."""
        if self.found or not self.seen:
            return
        form, count = self.options.form, self.seen * self.options.judge_samples
        said = self.said if len(self.said) <= SHOWN else f"{self.said[:SHOWN]}…"
        raise UserError(
            f"--reward judge: none of the first {count} judgements (of {self.seen} requests) has a valid score: "
            f"--judge_parse {form.parse!r}, --valid_reward {form.valid or 'none'}; {self.truncated} of them are "
            f"truncated (--judge_max_tokens). The first one says: {said!r}. Give another --judge_prompt or "
            "--judge_parse, or --on_unparsed continue to judge all the same; finished work is kept"
        )

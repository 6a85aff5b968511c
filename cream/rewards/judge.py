"""LLM-as-a-judge: a model reads each response and says how good it is (Self-Rewarding Language Models, 2401.10020).

The judge is the policy itself (--checkpoint), or any other model (--judge_model). It is asked by a rubric, and its
verdict is either sampled, k texts of which the valid scores are averaged, or expected: the mean of the admissible
scores by their probabilities where the judge would write the score, without a text. A pairwise judge compares each two
responses in both orders; how that ranks them is the same for all sources that compare (cream/preferences.py).

Departures from the released codes: a text without a valid score has none, never -1 or a default, and a response without
any has no reward; the last score in a text counts; limits are on new tokens; responses belong to their prompt by uuid.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

from cream.cli.flags import flag
from cream.engines import ENGINES, GREEDY, Sampling
from cream.engines.options import temperature_flag
from cream.errors import UserError
from cream.files.fingerprints import fingerprint_text
from cream.records import Prompt, Samples
from cream.rewards.base import UNFINISHED, GroupReward, PreferenceOptions, reward_by_comparisons
from cream.scoring import logprobs
from cream.scoring.completions import Texts
from cream.scoring.driver import Pass
from cream.scoring.logprobs import Group, Scored
from cream.text.judge_prompts import JUDGE_PROMPTS
from cream.text.judging import HOLE, NO_SCORE, Form, Verdict, parse_file, read_form
from cream.text.thoughts import ThoughtFlags, final_text

FIRST = 64  # requests after which a judge without any score ends the stage
SHOWN = 300  # characters of a judge's text in a message
SAMPLED = ("judge_samples", "judge_temperature", "judge_top_p", "judge_max_tokens", "on_unparsed", "seed", "engine")
TOO_LONG = "the request to the judge does not fit"
EQUAL = 1e-3  # nats by which rounding may put a longer text's log-probability above that of its beginning


@dataclass
class Options(ThoughtFlags, PreferenceOptions, logprobs.Options):
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
        decides=False,  # its words do
    )
    judge_parse: str | None = flag(
        None,
        "where the judge's text has the score, the last one counts: a text such as 'Score: {{ reward }}', a regular "
        "expression with one group, or path.py:function (text -> number or None; this RUNS that file); of a pairwise "
        "judge A or B; none: as the named --judge_prompt says, your own needs one",
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
        "scores; none: as the named --judge_prompt says, with your own any number",
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

    def __post_init__(self):
        super().__post_init__()
        given = [name for name in SAMPLED if getattr(self, name) != getattr(type(self), name)]  # of that mode alone
        if self.expected and given:
            raise UserError(f"--judge_mode expected generates no text: --{', --'.join(given)} would have no effect")
        if self.judge_temperature < GREEDY and self.judge_samples > 1:
            raise UserError(
                f"--judge_temperature {self.judge_temperature:g} is greedy: {self.judge_samples} judgements would be "
                "equal; give --judge_samples 1"
            )

    @property
    def expected(self) -> bool:
        """Whether no text is generated."""
        return self.judge_mode == "expected"

    @cached_property
    def form(self) -> Form:
        """What the judge is asked, and how its verdict is read. Raises UserError where that cannot be used."""
        return read_form(self.judge_prompt, self.judge_parse, self.valid_reward)

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


def check(options: Options) -> None:
    """Raises UserError where the judge prompt, its parsing or the valid scores cannot be used."""
    if options.expected:
        _ = options.form.continuations
    if not options.form.pairwise and options.preference_score != type(options).preference_score:
        raise UserError("--preference_score is for judges that compare two responses, such as --judge_prompt pairwise")


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
    return (_compare if form.pairwise else _rate)(texts, found, options)


# Which texts are judged -----------------------------------------------------------------------------------------------


def final_texts(sample: Samples, options: Options) -> list[str | None]:
    """Each response without its thought; None where it ends within it."""
    return [final_text(response, options.tags, sample.thought_opened) for response in sample.responses]


def _judged(texts: Sequence[str | None], form: Form) -> list[tuple[str, ...]]:
    """What the judge is asked about: each different text, or each two of them in either order."""
    different = dict.fromkeys(text for text in texts if text is not None)
    return list(permutations(different, 2)) if form.pairwise else [(text,) for text in different]


# What a judge's verdicts make of them ---------------------------------------------------------------------------------


class Judgement(NamedTuple):
    """What a judge says to one request: its verdicts, and its words if it wrote any (sampled), or the probabilities of
    the admissible verdicts (expected); `reason`: why there is none that is valid."""

    verdicts: list[float | None] | None = None
    words: list[str] | None = None
    distribution: list[float] | None = None
    reason: str | None = None


def read_judgement(result: Texts | Scored, options: Options) -> Judgement:
    """What the worker's result to a request says."""
    if options.expected:
        if any(value is None for value in result.logprob):
            return Judgement(reason=next(filter(None, result.reason)))
        return Judgement(distribution=distribution(result.logprob, result.num_tokens, options.form.continuations))
    if not result.text:
        return Judgement(reason=result.reason or TOO_LONG)
    verdicts = read_texts(result, options)
    values, reasons = zip(*verdicts, strict=True)
    reason = None
    if not any(value is not None for value in values):  # one that is not valid says more than none at all
        reason = next((each for each in reasons if each != NO_SCORE), NO_SCORE)
    return Judgement(list(values), result.text, None, reason)


def read_texts(texts: Texts, options: Options) -> list[Verdict]:
    """The verdict in each of a judge's texts, without its thought."""
    verdicts = []
    for text, finish in zip(texts.text, texts.finish_reason, strict=True):
        final = final_text(text, options.tags, texts.opened)
        verdicts.append(Verdict(None, NO_SCORE) if final is None else options.form.read(final, finish == "length"))
    return verdicts


def distribution(logprob: Sequence[float], num_tokens: Sequence[int], verdicts: Sequence[str]) -> list[float]:
    """The probability of each admissible verdict, given that it is one of them: the softmax of their log-probabilities.

    A verdict whose tokens begin others ("1", "10" and "100", digit by digit) stands for itself alone: without the
    probability that the judge continues to one of these.
    """
    logs = [-math.inf] * len(verdicts)
    for i in sorted(range(len(verdicts)), key=lambda i: -num_tokens[i]):  # the longer ones are without theirs by then
        text = verdicts[i]
        longer = [j for j, other in enumerate(verdicts) if other.startswith(text) and num_tokens[j] > num_tokens[i]]
        longer = [j for j in longer if logprob[j] <= logprob[i] + EQUAL]
        rest = 1 - sum(math.exp(min(0.0, logs[j] - logprob[i])) for j in longer)
        logs[i] = logprob[i] + math.log(rest) if rest > 0 else -math.inf
    top = max(logs)
    shares = [math.exp(value - top) for value in logs]
    return [share / sum(shares) for share in shares]


def _mean(judgement: Judgement, values: Sequence[float]) -> float | None:
    """The mean of the valid verdicts, or of the admissible ones, `values`, by their probabilities."""
    if judgement.reason:
        return None
    if judgement.distribution:
        return sum(p * value for p, value in zip(judgement.distribution, values, strict=True))
    valid = [value for value in judgement.verdicts if value is not None]
    return sum(valid) / len(valid)


def _rate(texts: Sequence[str | None], found: dict[tuple, Texts | Scored], options: Options) -> GroupReward:
    """Rewards by scores: the mean of the valid ones, or the expected score."""
    of = {text: read_judgement(result, options) for (text,), result in found.items()}
    judged = [of.get(text, Judgement(reason=UNFINISHED)) for text in texts]
    scores = options.form.scores if options.expected else ()
    reward = [_mean(judgement, scores) for judgement in judged]
    if options.expected:
        parts = {"distribution": [judgement.distribution for judgement in judged]}
    else:
        parts = {"scores": [judgement.verdicts for judgement in judged]}
    reason = [judgement.reason for judgement in judged]
    return GroupReward(reward, reason, parts=parts, texts=_words(judged, options))


def _compare(texts: Sequence[str | None], found: dict[tuple, Texts | Scored], options: Options) -> GroupReward:
    """Rewards by comparisons."""
    judged = {pair: read_judgement(result, options) for pair, result in found.items()}
    first = {pair: _mean(judgement, (1, 0)) for pair, judgement in judged.items()}  # of A and B: the share of A
    why = {pair: judgement.reason for pair, judgement in judged.items()}
    rewards = reward_by_comparisons(texts, first, why, options.preference_score)
    for j, b in enumerate(texts):
        rewards.texts |= _words([judged.get((a, b), Judgement()) for a in texts], options, f"_b{j}")
    return rewards


def _words(judged: Sequence[Judgement], options: Options, end: str = "") -> dict[str, list[str | None]]:
    """The judge's K-th text on each response, by name."""
    numbers = range(0 if options.expected else options.judge_samples)
    return {f"judge_{k + 1}{end}": [judgement.words and judgement.words[k] for judgement in judged] for k in numbers}


# A judge that says nothing of use -------------------------------------------------------------------------------------


def watch(role: str, options: Options) -> "Watch | None":
    return None if options.expected or options.on_unparsed == "continue" else Watch(options)


class Watch:
    """Ends the stage where no text of the first requests has a valid score."""

    def __init__(self, options: Options):
        self.options, self.seen, self.truncated, self.said, self.found = options, 0, 0, None, False
        self.reasons: Counter[str] = Counter()  # of requests

    def see(self, texts: Texts) -> bool:
        """Looks at a request's texts; returns whether others are of interest."""
        if self.found or not texts.text:
            return not self.found
        reason = read_judgement(texts, self.options).reason
        self.found = reason is None
        self.reasons[reason] += 1
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
        valid = "A or B" if form.pairwise else f"--valid_reward {form.valid or 'none: any number'}"
        advice = "Give another --judge_prompt or --judge_parse"
        if 2 * self.truncated > count:
            advice = "Give a larger --judge_max_tokens, or another --judge_prompt"
        if HOLE.search(form.parse):
            advice += ", or --judge_mode expected, which needs no text that the judge wrote"
        raise UserError(
            f"--reward judge: none of the first {count} judgements (of {self.seen} requests) has a valid score: "
            f"{self.reasons.most_common(1)[0][0]} (--judge_parse {form.parse!r}, {valid}); {self.truncated} of them "
            f"are truncated (--judge_max_tokens). The first one says: {said!r}. {advice}, or --on_unparsed continue "
            "to judge all the same; finished work is kept"
        )

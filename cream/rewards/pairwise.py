"""A pairwise preference model (RLHFlow's pair-pm, 2405.07863): of two responses it says by one token which is better.

P(A better than B) is the share of "A" in the probabilities of the labels, "A" and "B"; with a third, "Same" (RRM,
2409.13156), that of "A" and half that of "Same". Each two responses are compared in both orders, of which the mean
counts. How comparisons rank is the same for all sources that compare (cream/preferences.py).

Departures from the released code: shares are computed in log space, where the released one exponentiates logits; a
label's place is the one that it has in training, by the same template; more than two responses are compared in a full
round-robin, or in a knockout.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, permutations
from pathlib import Path

from cream.cli.flags import flag
from cream.errors import UserError
from cream.records import Message, Samples
from cream.rewards.base import (
    GroupReward,
    PreferenceOptions,
    RewardModelOptions,
    check_reward_model,
    reward_by_comparisons,
)
from cream.scoring.driver import Pass
from cream.scoring.logprobs import Group, Scored
from cream.scoring.rounds import Rounds
from cream.text import pairwise
from cream.text.chat import Chat
from cream.text.rendering import PROBE
from cream.text.thoughts import ThoughtFlags, final_text

ROLE = "rm"
LEAST = 0.01  # of the probability that the labels have together, by a model that was trained to compare
NO_LABEL = "the labels have less than 1 % of the model's probability: it does not compare in this form"
Pair = tuple[str, str]


@dataclass
class Options(ThoughtFlags, PreferenceOptions, RewardModelOptions):
    """Rewards by a pairwise preference model (pairwise)"""

    tournament: str = flag(
        "round_robin",
        "which responses are compared: round_robin, each two; knockout, winners with winners until one is left, N - 1 "
        "comparisons of N responses (with --preference_score bradley_terry)",
        choices=("round_robin", "knockout"),
    )
    with_same: bool = flag(
        False, "the model has a third label, Same, as prepare_data.py pairwise --with_same yes teaches it"
    )

    @property
    def labels(self) -> list[str]:
        """What the model may answer."""
        return pairwise.labels(self.with_same)


def passes(options: Options) -> list[Pass]:
    worker = "rounds" if options.tournament == "knockout" else "logprobs"
    return [Pass(ROLE, "reward_model", worker=worker, external=True, quotes=True)]


def check(options: Options) -> None:
    """Raises UserError without a model, and for a knockout that is rewarded by wins: the winner of a hard bracket may
    win less clearly than the loser of an easy one."""
    check_reward_model(options, "pairwise")
    if options.tournament == "knockout" and options.preference_score != "bradley_terry":
        raise UserError(
            "--tournament knockout compares each response with few others, so that shares of wins do not rank them; "
            "give --preference_score bradley_terry"
        )


def objection(options: Options, folder: Path, about: dict) -> str | None:
    """Why the model in a folder, whose sidecar is `about`, should not compare by this form. Of a model from elsewhere
    nothing says what it was trained on."""
    trained = about.get("pairwise")
    if not about or trained == pairwise.describe_form(options.with_same):
        return None
    if not trained:
        return f"{folder} was not trained to compare two responses: its data were not made by prepare_data.py pairwise"
    if trained["labels"] != options.labels:
        wanted = "yes" if pairwise.SAME in trained["labels"] else "no"
        return f"{folder} was trained on the labels {', '.join(trained['labels'])}: give --with_same {wanted}"
    return f"{folder} was trained on other words of the pairwise form"


def flags_for(about: dict) -> dict | None:
    form = about.get("pairwise")
    return form and ({"with_same": True} if pairwise.SAME in form["labels"] else {})


def check_chat(role: str, chat: Chat, options: Options) -> None:
    """Raises UserError where a label is not one token of the model's."""
    check_labels(chat, options.labels, f"--reward_model {options.reward_model}")


def check_labels(chat: Chat, labels: Sequence[str], model: str) -> None:
    """Raises UserError where a label is not one token of the model's, which is called `model`."""
    request = pairwise.ask(PROBE[:1], "5", "6")
    rows = chat.encode_responses(request, labels, [False] * len(labels), sampled=False)
    for label, row in zip(labels, rows, strict=True):
        count = row if isinstance(row, str) else row.num_response_tokens
        if count != 1:
            found = count if isinstance(count, str) else f"{count} tokens"
            raise UserError(
                f"{model}: the label {label!r} is not one token of its tokenizer "
                f"({found}), so that it cannot answer by one"
            )


def requests(role: str, sample: Samples, options: Options) -> list[Group] | list[Rounds]:
    """Round-robin: a group for each two different texts in either order, those with the same one first together, whose
    beginning is computed once. Knockout: all rounds as one request."""
    if pairwise.refusal(sample.prompt):
        return []
    players, ask = _players(sample, options), partial(_group, sample.prompt, options.labels)
    if options.tournament == "knockout":
        return [Rounds("", partial(_following, ask, players))]
    return [ask(pair) for pair in permutations(players, 2)]


def combine(sample: Samples, results: dict[str, list], options: Options) -> GroupReward:
    """The rewards, with `preferences`: [i][j] is the share of i where it is presented first."""
    if why := pairwise.refusal(sample.prompt):
        return GroupReward([None] * len(sample.responses), [why] * len(sample.responses))
    players = _players(sample, options)
    if options.tournament == "knockout":
        rounds = results[ROLE][0].rounds
        pairs = [pair for number in range(len(rounds)) for pair in both_orders(players, rounds[:number])]
        found = dict(zip(pairs, chain.from_iterable(rounds), strict=True))
    else:
        found = dict(zip(permutations(players, 2), results[ROLE], strict=True))
    first = {pair: share(scored.logprob) if means_labels(scored.logprob) else None for pair, scored in found.items()}
    why = {
        pair: next(filter(None, scored.reason), None if means_labels(scored.logprob) else NO_LABEL)
        for pair, scored in found.items()
    }
    return reward_by_comparisons(_texts(sample, options), first, why, options.preference_score)


def _texts(sample: Samples, options: Options) -> list[str | None]:
    """Each response without its thought; None where it ends within it."""
    return [final_text(response, options.tags, sample.thought_opened) for response in sample.responses]


def _players(sample: Samples, options: Options) -> list[str]:
    """The different texts that are compared."""
    return [*dict.fromkeys(text for text in _texts(sample, options) if text is not None)]


def _group(prompt: Sequence[Message], labels: list[str], pair: Pair) -> Group:
    return Group("", pairwise.ask(prompt, *pair), labels, [False] * len(labels))


# Probabilities --------------------------------------------------------------------------------------------------------


def log_share(logprob: Sequence[float]) -> float:
    """log of (P(A) + P(Same) / 2) / (P(A) + P(B) + P(Same)), of the log-probabilities of A, B and, if any, Same."""
    first, _, *same = logprob
    better = _logsumexp([first, *(value - math.log(2) for value in same)])
    return min(0.0, better - _logsumexp(logprob))


def share(logprob: Sequence[float | None]) -> float | None:
    """The probability that the response presented first is better, by the labels' log-probabilities; None where one of
    them has none."""
    return None if None in logprob else math.exp(log_share(logprob))


def means_labels(logprob: Sequence[float | None]) -> bool:
    """Whether the model may write one of the labels: their share is that of nothing that it means otherwise."""
    return None in logprob or _logsumexp(logprob) >= math.log(LEAST)


def mean_share(logprob: Sequence[float | None], other: Sequence[float | None]) -> float | None:
    """The probability that a is better than b, the mean over both orders in log space: `logprob` of the request that
    had a first, `other` of that with b first. None where it is unknown in one of them."""
    if None in (*logprob, *other):
        return None
    b, a, *same = other
    return math.exp(_logsumexp([log_share(logprob), log_share([a, b, *same])]) - math.log(2))


def _logsumexp(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


# Knockout -------------------------------------------------------------------------------------------------------------


def matches(players: Sequence[str], results: Sequence[Sequence[float | None]]) -> list[Pair]:
    """The matches of the next round, by the results of the rounds before: per match the probability that the first
    player is better, who also wins where it is ½ or unknown. None where one player is left. Of an odd number the
    last one has no match, and is the first in the next round."""
    left = list(players)
    for shares in results:
        pairs = _neighbours(left)
        winners = [b if p is not None and p < 0.5 else a for (a, b), p in zip(pairs, shares, strict=True)]
        left = left[2 * len(pairs) :] + winners
    return _neighbours(left)


def both_orders(players: Sequence[str], rounds: Sequence[Sequence[Scored]]) -> list[Pair]:
    """The matches of the round after these, each in both orders."""
    results = [
        [mean_share(a.logprob, b.logprob) for a, b in zip(scored[::2], scored[1::2], strict=True)] for scored in rounds
    ]
    return [pair for a, b in matches(players, results) for pair in ((a, b), (b, a))]


def _neighbours(players: Sequence[str]) -> list[Pair]:
    return [*zip(players[::2], players[1::2], strict=False)]


def _following(ask: Callable[[Pair], Group], players: list[str], rounds: list[list[Scored]]) -> list[Group]:
    return [ask(pair) for pair in both_orders(players, rounds)]

"""Which of a judge's judgements agree with people, how many of each score are kept, and the training data made of them.
Pure functions.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from math import floor

from cream.data.build import shuffled
from cream.records import Conversation, Message, Rewards, Samples
from cream.rewards import judge
from cream.text.overlap import whole
from cream.text.thoughts import split_thought

Number = float | None

UNRANKED = "fewer than two responses to its prompt are ranked"
NO_SCORE = "a response to its prompt has no valid score"
OTHERWISE = "the judge ranks the responses to its prompt otherwise than people do"
ELSEWHERE = "the judge ranks it at another position than people do"


def agreeing(rewards: Sequence[Number], gold: Sequence[Number], by: str) -> tuple[list[int], Counter[str]]:
    """(the responses to one prompt on which the judge agrees with people, reasons of the others); both by the higher
    the better. `by`: `ranking`, all of them or none; `position`, each that has the same place (ties: their mean) in
    both orders."""
    from cream.evaluation.judges import same_order

    ranked = [i for i, value in enumerate(gold) if value is not None]
    known = [i for i in ranked if rewards[i] is not None]
    if len(ranked) < 2:
        return [], +Counter({UNRANKED: len(gold)})
    unranked = Counter({UNRANKED: len(gold) - len(ranked)})
    if by == "position":
        mine, theirs = (_places([values[i] for i in known]) for values in (rewards, gold))
        kept = [i for i, a, b in zip(known, mine, theirs, strict=True) if a == b]
        lost = {NO_SCORE: len(ranked) - len(known), ELSEWHERE: len(known) - len(kept)}
        return kept, +(unranked + Counter(lost))
    if len(known) < len(ranked):
        return [], +(unranked + Counter({NO_SCORE: len(ranked)}))
    if not same_order([rewards[i] for i in ranked], [gold[i] for i in ranked]):
        return [], +(unranked + Counter({OTHERWISE: len(ranked)}))
    return ranked, +unranked


def _places(values: Sequence[float]) -> list[float]:
    """Each value's place from 0, the highest first; equal ones share the mean of theirs."""
    return [sum(b > a for b in values) + (sum(b == a for b in values) - 1) / 2 for a in values]


def most_of_each(counts: Collection[int], total: int | None) -> int:
    """How many records of each score are kept at most, of these `counts`: as many as together are at most `total`, to
    which rare scores leave their share; without a total as many as the second most frequent score has."""
    ordered = sorted(counts)
    if total is None:
        return ordered[-2] if len(ordered) > 1 else max(ordered, default=0)
    for i, count in enumerate(ordered):
        share = total // (len(ordered) - i)
        if count > share:
            return share
        total -= count
    return max(ordered, default=0)


def balanced(kept: Sequence[Conversation], total: int | None, seed: int) -> list[Conversation]:
    """The records without those by which a score is too frequent, which are drawn by the seed; in their order."""
    by_score: dict[int, list[str]] = {}
    for each in kept:
        by_score.setdefault(floor(each.extra["score"]), []).append(each.uuid)
    most = most_of_each([len(uuids) for uuids in by_score.values()], total)
    chosen = {uuid for uuids in by_score.values() for uuid in shuffled(uuids, seed)[:most]}
    return [each for each in kept if each.uuid in chosen]


def prompts_of(conversations: Iterable[Conversation]) -> set[int]:
    """Hashes of the words of all user turns before each response of these conversations."""
    found = set()
    for conversation in conversations:
        users: list[str] = []
        for message in conversation.messages:
            if message.role == "user":
                users.append(message.content)
                found.add(whole("\n".join(users)))
    return found


def targets(record: Rewards, kept: Iterable[int], options: judge.Options) -> list[Conversation]:
    """The request on each of the responses `kept` as the judge saw it, and its judgement without a thought: of the k
    texts the first whose score is the nearest to the reward, their mean, up to the end of the line with the score."""
    asked_on = judge.final_texts(Samples(prompt=record.prompt, responses=record.responses()), options)
    found = []
    for i in kept:
        scores = record.parts["scores"][i]
        k = min(
            (k for k, score in enumerate(scores) if score is not None), key=lambda k: abs(scores[k] - record.reward[i])
        )
        said = split_thought(record.texts[f"judge_{k + 1}"][i], options.tags).final.strip()
        request = options.form.ask(record.prompt, asked_on[i])
        found.append(
            Conversation(
                uuid=f"{record.uuid}#{i}",
                messages=[*request, Message("assistant", options.form.cut(said, scores[k]))],
                only_last=len(request) > 1,  # the response itself is a turn then, good or bad
                extra={"score": scores[k]},
            )
        )
    return found

"""RLCD: samples of a prompt that asks for good responses against samples of one that asks for bad ones, unscored
(reinforcement learning from contrastive distillation, arXiv 2307.12950).

The two are usually the same prompt with two system prompts (`infer.py --sysprompt FILE`). The pair has the prompt
without them, so that the model learns to respond as if it had been asked for good responses. Departure from the paper:
the pairs train the policy itself (DPO), not a preference model for PPO.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat

from cream.cli.flags import flag
from cream.errors import UserError
from cream.pairs.candidates import Candidate, Candidates, Response, samples_of
from cream.pairs.inputs import Input
from cream.pairs.match import Lookup
from cream.records import Message, Prompt, Record, Samples

INPUTS = {
    "positive": Input(Samples, "samples of the prompts that ask for good responses", made_by="infer.py"),
    "negative": Input(Samples, "samples of the prompts that ask for bad responses", made_by="infer.py"),
    "prompts": Input(
        Prompt,
        "prompts that the pairs have, matched by uuid; none: those of the samples, without --sysprompt",
        needed=False,
    ),
}
NO_NEGATIVE, NO_POSITIVE, NO_PROMPT = (f"not in --{role}" for role in ("negative", "positive", "prompts"))
GAP = "lengths differ by more than --max_length_gap"


@dataclass
class Options:
    """--strategy contrast"""

    max_length_gap: int | None = flag(
        None, "skip pairs whose responses differ in length by more than this many sampled tokens; none: any", low=0
    )


def candidates(files: Mapping[str, Iterable[Record]], options: Options) -> Iterator[Candidates | str]:
    """The first positive response against the first negative one, the second against the second, and so on."""
    negatives = Lookup(files["negative"], Samples)
    prompts = Lookup(files["prompts"], Prompt) if "prompts" in files else None
    for positive in files["positive"]:
        negative = negatives.take(positive.uuid)
        own = prompts.take(positive.uuid) if prompts else None
        if negative is None:
            yield NO_NEGATIVE
        elif prompts and own is None:
            yield NO_PROMPT
        else:
            yield _against(positive, negative, own and own.messages, options.max_length_gap)
    yield from repeat(NO_POSITIVE, negatives.rest())
    if prompts:
        prompts.rest()


def _against(positive: Samples, negative: Samples, prompt: list[Message] | None, gap: int | None) -> Candidates:
    both = (positive, negative)
    if positive.prompt == negative.prompt:
        raise UserError(
            f"record {positive.uuid!r}: --positive and --negative were sampled from the same prompt, so that there is "
            "no contrast; sample them with two different texts, infer.py --sysprompt FILE"
        )
    sources = [sample.source_prompt or sample.prompt for sample in both]
    if prompt is None and sources[0] != sources[1]:
        raise UserError(
            f"record {positive.uuid!r}: --positive and --negative have different prompts, even without --sysprompt; "
            "--prompts FILE says which prompt the pairs should have"
        )
    counts = [len(sample.responses) for sample in both]
    if counts[0] != counts[1]:
        raise UserError(
            f"record {positive.uuid!r}: {counts[0]} responses in --positive, {counts[1]} in --negative; sample both "
            "with the same --gen_n"
        )
    pairs = zip(*map(samples_of, both), strict=True)
    found = [Candidate(*pair, GAP if _apart(positive.uuid, *pair, gap) else None) for pair in pairs]
    return Candidates(positive.uuid, prompt or sources[0], found, None, positive.extra)


def _apart(uuid: str, chosen: Response, rejected: Response, gap: int | None) -> bool:
    if gap is None:
        return False
    if chosen.tokens is None or rejected.tokens is None:
        raise UserError(f"record {uuid!r} has no `num_tokens`, which --max_length_gap compares")
    return abs(chosen.tokens - rejected.tokens) > gap

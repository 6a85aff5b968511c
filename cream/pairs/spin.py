"""SPIN: the response of the SFT data against the model's own sample (self-play fine-tuning, arXiv 2401.01335).

The model that sampled is the opponent, frozen while the next one is trained, and that training's reference; the paper's
lambda is DPO's beta. As in the paper, the samples of earlier rounds stay in use, by default of one (configs/loops).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat

from cream.errors import UserError
from cream.pairs.candidates import Candidate, Candidates, Response, samples_of
from cream.pairs.inputs import Input
from cream.pairs.match import Lookup
from cream.records import Conversation, Message, Record, Samples

INPUTS = {
    "samples": Input(
        Samples,
        "responses of the model that is to be trained to the prompts of --conversations, the output of infer.py; with "
        "those of earlier rounds: OLDEST,…,NEWEST",
        made_by="infer.py",
        several=True,
    ),
    "conversations": Input(Conversation, "SFT data, whose responses are the chosen ones"),
}
NOT_SAMPLED = "no sample of the conversation"
UNKNOWN = "a sample whose conversation is not there"


@dataclass
class Options:
    """--strategy spin"""


def candidates(files: Mapping[str, Iterable[Record]], options: Options) -> Iterator[Candidates | str]:
    """The conversation's response against every sample of its prompt, those of the newest round first."""
    rounds = [Lookup(files[role], Samples) for role in files if role != "conversations"]
    for conversation in files["conversations"]:
        found = [sample for one in rounds if (sample := one.take(conversation.uuid)) is not None]
        yield _against(conversation, found) if found else NOT_SAMPLED
    yield from repeat(UNKNOWN, sum(one.rest() for one in rounds))


def _against(conversation: Conversation, rounds: list[Samples]) -> Candidates:
    first = rounds[0]
    if any(sample.prompt != first.prompt for sample in rounds):
        raise UserError(f"record {first.uuid!r}: --samples has different prompts in different rounds; sample all alike")
    chosen = Response(_response(conversation.messages, first.source_prompt or first.prompt, first.uuid))
    pairs = [Candidate(chosen, rejected) for sample in rounds for rejected in samples_of(sample)]
    return Candidates(first.uuid, first.prompt, pairs, first.source_prompt, first.extra)


def _response(conversation: list[Message], prompt: list[Message], uuid: str) -> str:
    """The turn of a conversation that follows a prompt, which may be all turns before the last or fewer."""
    if conversation[: len(prompt)] != prompt or len(conversation) == len(prompt):
        raise UserError(f"record {uuid!r}: --samples responds to another prompt than the one in --conversations")
    return conversation[len(prompt)].content

"""The form of a pairwise preference model: which of two responses is better, as RLHFlow asks it (2405.07863).

The model is trained by SFT to answer with one token, A or B, or Same where neither is better (RRM, 2409.13156). The
text is byte for byte that of RLHFlow, so that its models and data serve here, and ours there: the conversation is
written out plainly, whatever the model's own chat template, which then writes this text as a user's turn. Response A
stands before response B, so that all requests that put the same response first begin alike.
"""

from collections.abc import Sequence

from cream.files.fingerprints import fingerprint_text
from cream.records import Message

FORM = "[CONTEXT] {context} [RESPONSE A] {a} [RESPONSE B] {b} \n"
TURNS = ("\n<turn> user\n ", "\n<turn> assistant\n ")
A, B, SAME = "A", "B", "Same"
NO_SYSTEM = "the pairwise form has no place for a system message"


def labels(with_same: bool) -> list[str]:
    """What the model may answer."""
    return [A, B, SAME] if with_same else [A, B]


def refusal(prompt: Sequence[Message]) -> str | None:
    """Why the form cannot hold a prompt; None if it can."""
    return NO_SYSTEM if prompt[0].role == "system" else None


def ask(prompt: Sequence[Message], a: str, b: str) -> list[Message]:
    """The request: a prompt without a system message, and two responses to it in this order."""
    context = "".join(TURNS[i % 2] + message.content for i, message in enumerate(prompt))
    return [Message("user", FORM.format(context=f"\n{context}\n", a=a, b=b))]


def describe_form(with_same: bool) -> dict[str, object]:
    """What a checkpoint that is trained on the form records of it."""
    return {"labels": labels(with_same), "template": fingerprint_text("".join((FORM, *TURNS)))}

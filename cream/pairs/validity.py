"""Which preference pairs can be trained on: RLHFlow's filter, with a reason for each pair that it drops.

The released code (RLHFlow/RLHF-Reward-Modeling, pair-pm/process_pair_data.py) drops them silently.
"""

from collections.abc import Sequence

from cream.records import Pair

LENGTHS = "chosen and rejected have different numbers of turns"
ROLES = "the turns are not the user's and the assistant's in turn, up to a response"
EMPTY = "a turn is empty"
PROMPTS = "chosen and rejected follow different prompts"
SYSTEM = "it has a system turn"

Turn = tuple[str, str]  # role, text


def why_invalid(chosen: Sequence[Turn], rejected: Sequence[Turn], system: bool = True) -> str | None:
    """Why two whole conversations are not a preference pair; None where they are.

    `system`: a system turn may come first; formats that decide the role of a turn by its place have none.
    """
    both = []
    for turns in (chosen, rejected):
        has_system = bool(turns) and turns[0][0] == "system"
        if has_system and not system:
            return SYSTEM
        both.append(turns[has_system:])
    if len(chosen) != len(rejected):
        return LENGTHS
    for turns in both:
        expected = ("user", "assistant") * (len(turns) // 2)
        if not turns or tuple(role for role, _ in turns) != expected:
            return ROLES
    if any(not text.strip() for _, text in (*chosen, *rejected)):
        return EMPTY
    return PROMPTS if chosen[:-1] != rejected[:-1] else None


def why_invalid_pair(pair: Pair, system: bool = True) -> str | None:
    """`why_invalid` of a record; what its layout rules out cannot occur."""
    turns = ([(turn.role, turn.content) for turn in conversation] for conversation in (pair.selected, pair.rejected))
    return why_invalid(*turns, system)

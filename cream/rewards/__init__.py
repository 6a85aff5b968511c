"""Reward sources. One file each, listed here.

A source gets groups (a prompt with its answers) and gives every answer a reward, named parts, and a reason where it has
none. It works in passes, each of which holds one model: `PASSES` names them, `combine` makes the rewards from what the
passes found. Passes over log-likelihoods share likelihood.py's scorer.
"""

from dataclasses import dataclass, field

REWARDS = {"likelihood": "cream.rewards.likelihood", "dpo": "cream.rewards.dpo"}


@dataclass(slots=True)
class GroupReward:
    """Per answer: its reward or None, named parts (numbers or lists), why it has none, texts (a judge's words);
    optionally an N x N matrix of preferences."""

    reward: list[float | None]
    parts: dict[str, list] = field(default_factory=dict)
    reason: list[str | None] = field(default_factory=list)
    texts: dict[str, list[str | None]] = field(default_factory=dict)
    preferences: list[list[float | None]] | None = None

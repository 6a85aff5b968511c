"""How far rewards order the responses to a prompt: what is without a reward, and what shares one."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from cream.alarms import share


@dataclass
class Ties:
    """Counts over prompts; equal responses count once."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, rewards: Sequence[float | None], texts: Sequence[str]) -> None:
        """Count a prompt's responses."""
        by_text = {text: reward for text, reward in zip(texts, rewards, strict=True) if reward is not None}
        several, values = len(by_text) > 1, Counter(by_text.values())
        self.counts["responses"] += len(rewards)
        self.counts["none"] += sum(reward is None for reward in rewards)
        self.counts["distinct"] += len(by_text)
        self.counts["tied"] += sum(count for count in values.values() if count > 1)
        self.counts["prompts"] += several
        self.counts["flat"] += several and len(values) == 1

    def facts(self, ranked: bool) -> dict[str, float | None]:
        """For alarms; gold labels, which are 0 and 1, do not rank (`ranked`)."""
        c = self.counts
        facts = {"no_reward": share(c["none"], c["responses"])}
        if ranked:
            facts |= {"flat_rewards": share(c["flat"], c["prompts"]), "tied_rewards": share(c["tied"], c["distinct"])}
        return facts

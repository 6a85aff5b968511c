"""How far rewards order the responses to a prompt: what is without a reward, and what shares one."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from cream.alarms import share


@dataclass
class Ties:
    """Counts over prompts, in which equal responses count once, and the sum of all rewards."""

    counts: Counter[str] = field(default_factory=Counter)
    total: float = 0.0

    def add(self, rewards: Sequence[float | None], texts: Sequence[str]) -> None:
        """Count a prompt's responses."""
        by_text = {text: reward for text, reward in zip(texts, rewards, strict=True) if reward is not None}
        several, values = len(by_text) > 1, Counter(by_text.values())
        self.counts["responses"] += len(rewards)
        self.counts["none"] += sum(reward is None for reward in rewards)
        self.total += sum(reward for reward in rewards if reward is not None)
        self.counts["distinct"] += len(by_text)
        self.counts["tied"] += sum(count for count in values.values() if count > 1)
        self.counts["prompts"] += several
        self.counts["flat"] += several and len(values) == 1

    def summary(self) -> dict[str, float | None]:
        """For the sidecar: numbers of responses and of those with a reward, the mean of these rewards, and the share of
        distinct responses with the reward of another one."""
        c, known = self.counts, self.counts["responses"] - self.counts["none"]
        found = {"responses": c["responses"], "rewarded": known, "mean": share(self.total, known)}
        return found | {"tied": share(c["tied"], c["distinct"])}

    def facts(self, ranked: bool) -> dict[str, float | None]:
        """For alarms; gold labels, which are 0 and 1, do not rank (`ranked`)."""
        c = self.counts
        facts = {"no_reward": share(c["none"], c["responses"])}
        if ranked:
            facts |= {"flat_rewards": share(c["flat"], c["prompts"]), "tied_rewards": share(c["tied"], c["distinct"])}
        return facts

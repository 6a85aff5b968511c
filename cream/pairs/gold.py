"""Gold values of responses, which no strategy reads: they say afterwards how often the chosen response is the better
one."""

from dataclasses import dataclass

from cream.records import Rewards


@dataclass
class Gold:
    """Pairs of which `gold`, a number for each response in a record's extra keys, has one response above the other; in
    how many of them the chosen one is."""

    pairs: int = 0
    right: int = 0

    def add(self, record: Rewards, chosen: int, rejected: int) -> None:
        """Count a pair, as indices of the record's responses; one whose better response is not known, is not."""
        gold = record.extra.get("gold")
        if not isinstance(gold, list) or len(gold) != len(record.response):
            return
        better, worse = gold[chosen], gold[rejected]
        if isinstance(better, int | float) and isinstance(worse, int | float) and better != worse:
            self.pairs += 1
            self.right += better > worse

    @property
    def accuracy(self) -> float | None:
        """The share that is right; None where nothing is known."""
        return self.right / self.pairs if self.pairs else None

"""How good a reward is: measures over the rewards of responses and their gold values, by any source of rewards.

rows.py has what is measured, measure.py the summary; the other modules are pure functions: the two RewardBenches, the
probabilities of pairs, length, best-of-N. Formulas and their sources are in docs/evaluation.md.
"""

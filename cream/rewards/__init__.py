"""Reward sources: one module each, and a line here.

A source gives each response of a prompt a reward, or the reason why it has none. Its module has

    Options                             dataclass of its own flags, composed into rewarding.py --help; it extends the
                                        Options of its passes' worker (scoring.logprobs, heads, completions)
    passes(options)                     the models that look at the samples (scoring.driver.Pass), [] for none
    combine(sample, results, options)   GroupReward; results: role -> one result for each request, in their order

and where it needs them

    requests(role, sample, options)     what a model is given: groups of responses (logprobs, heads) or prompts
                                        (completions); without it, one group of the sample's responses
    files(options)                      {flag: (path, kind of record)} of the files it reads beside the samples
    prepare(options, samples, skip)     reads these, and refuses what can be refused before anything is computed
    DEFAULTS                            flags of its Options that are none by default -> their value for this source
"""

from cream.rewards import dpo, labels, likelihood

REWARDS = {"likelihood": likelihood, "dpo": dpo, "labels": labels}

"""Reward sources: one module each, and a line in REWARDS. `rewarding.py --reward NAME` runs it.

A source gives each response of a prompt a reward, or the reason why it has none. Its module has

    Options                             dataclass of its own flags, composed into rewarding.py --help; it extends the
                                        Options of its passes' worker
    passes(options) -> list[Pass]       Pass(role, model, kind, worker) for each model that looks at the samples
    combine(sample, results, options) -> GroupReward
                                        results: role -> the result of each request, in their order

and where it needs them

    requests(role, sample, options)     what a model is given; without it, one group of the sample's responses
    files(options)                      {flag: (path, kind of record)} of the files it reads beside the samples; the
                                        kind is None for a file without records
    contents(options) -> {name: text}   texts that decide the rewards, and are neither flags nor in these files
    check(options)                      refuses what is wrong by its flags alone, before a loop or the stage begins
    prepare(options, samples, skip)     reads its files, and refuses what can be refused before anything is computed
    objection(options, folder, about)   why a pass's model, whose sidecar is `about`, should not be used; None
    flags_for(about)                    the flags of rewarding.py, beside --reward and --reward_model, for a model with
                                        this sidecar that was trained for this reward; None for another model
    check_chat(role, chat, options)     refuses a tokenizer that does not suit, before anything is computed: a label of
                                        several tokens, say, that is to be one
    watch(role, options)                for completions: None, or an object that is given each result as it is
                                        finished, see(result), until that is false, and is told of the end of the pass,
                                        end(). A UserError ends the stage; what is finished stays in its journal
    DEFAULTS                            flags of its Options that are none by default -> their value for this source

A pass's worker, a module of cream.scoring, says what is computed of a request:

    logprobs      Group(uuid, prompt, responses, complete) -> Scored(logprob, num_tokens, reason), a value per response
    heads         the same -> Outputs(outputs, reason): a reward model's, per response a list
    signs         StepGroup(uuid, prompt, steps) -> Signed(log_odds, reason): per response a number for each step
    rounds        Rounds(uuid, following) -> Played(rounds), the Scored of each round's groups, where what is asked next
                  depends on the results so far: a knockout
    armo          Group -> Outputs, per response an ArmoRM's score, attributes and coefficients
    completions   Prompt(messages=…) -> Texts(text, finish_reason, opened), without any where the prompt does not fit

dpo.py is the example; of a reward model bradley_terry.py is, whose flag, pass and checks are in base.py. What a source
writes is in base.GroupReward; a request's uuid is set by the caller.
"""

from cream.rewards import armo, bradley_terry, dpo, judge, labels, likelihood, odin, orm, pairwise, prm

REWARDS = {
    "likelihood": likelihood,
    "dpo": dpo,
    "labels": labels,
    "judge": judge,
    "bradley_terry": bradley_terry,
    "odin": odin,
    "pairwise": pairwise,
    "prm": prm,
    "orm": orm,
    "armo": armo,
}

"""How any model looks at many records: passes, workers, the pool of devices, the score cache.

A worker is a module (logprobs, rounds, heads, signs, armo, completions) with what a pass computes of each request, a
Group, some Rounds or a Prompt:

    Options                            its flags, which the Options of a reward source extend
    CACHED                             what the score cache calls its code, cache.Source.scorer; None: its results do
                                       not enter it
    chunk_of(pool, count)              requests that are computed together, and skipped together by a resumed run
    setup(model, options, chunk, done) -> make(device), picklable; what it makes maps requests to (uuid, result)
    show_first(model, requests, options)  print the first one as the model sees it
    as_row(result, chat)               the result as the journal has it; chat: of the model that gave it
    from_row(row, request)             and back, without what only the cache needs; None where it is of other responses
"""

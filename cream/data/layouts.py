"""Public data sets of preferences by their columns, with the flags that import their pairs; and what a table holds."""

from collections.abc import Iterable, Mapping

RATED = "--columns responses=response1+response2,best=overall_preference --best 0=0,1=2,2=2,3=2,-1=1,-2=1,-3=1"
LAYOUTS = {  # data set -> columns by which it is recognised, flags of import
    "SHP": (
        ("history", "human_ref_A", "human_ref_B", "labels"),
        "--columns prompt=history,responses=human_ref_A+human_ref_B,best=labels --best 1=1,0=2",
    ),
    "PKU-SafeRLHF": (
        ("prompt", "response_0", "response_1", "better_response_id"),
        "--columns responses=response_0+response_1,best=better_response_id --best 0=1,1=2",
    ),
    "HelpSteer3": (
        ("context", "response1", "response2", "overall_preference"),
        RATED.replace("responses=", "messages=context,responses="),
    ),
    "HelpSteer, HelpSteer2": (("prompt", "response", "helpfulness"), "--columns score=helpfulness"),
    "Nectar": (("prompt", "answers"), "--columns responses=answers.answer,rank=answers.rank"),
    "UltraFeedback": (
        ("instruction", "completions"),
        "--columns prompt=instruction,responses=completions.response,score=completions.overall_score",
    ),
    "Chatbot Arena": (
        ("conversation_a", "conversation_b", "winner"),
        "--columns responses=conversation_a+conversation_b,best=winner "
        "--best 'model_a=1,model_b=2,tie=0,tie (bothbad)=0'",
    ),
    "PandaLM": (
        ("prompt", "response1", "response2", "annotators"),
        "--columns responses=response1+response2,best=annotators.0 --best 1=1,2=2,0=0",
    ),
    "trl's unpaired preferences": (("prompt", "completion", "label"), "--columns score=label"),
}
SHOWN = 20  # columns


def flags_for(present: Iterable[str]) -> tuple[str, str] | None:
    """(data set, flags of import) of the first data set of LAYOUTS whose columns are all there."""
    columns = {*present}
    return next(((name, flags) for name, (own, flags) in LAYOUTS.items() if columns.issuperset(own)), None)


def advice(present: Iterable[str]) -> str:
    """A sentence on what to do with a table, or ''."""
    columns = [*present]
    if known := flags_for(columns):
        return f". These are columns of {known[0]}: {known[1]}"
    if len(columns) == 1 and (sign := next((sign for sign in ";\t|" if sign in columns[0]), None)):
        return f". If {sign!r} separates its cells: --sep {'tab' if sign == chr(9) else repr(sign)}"
    if isinstance(present, Mapping) and all(isinstance(each, dict | list) and each for each in present.values()):
        return ". If these are records by uuid, it is a file of this project already; validate says what it holds"
    return ""


def describe(present: Iterable[str]) -> str:
    """The first columns of a table, with their values if `present` is its first row."""
    names = sorted(present)
    shown = [f"{name} ({_shape(present[name])})" if isinstance(present, Mapping) else name for name in names[:SHOWN]]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _shape(value: object) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= SHOWN else value[:SHOWN] + "…")
    if isinstance(value, Mapping):
        return f"{{{', '.join(value)}}}"[:60]
    if isinstance(value, list):
        return f"list of {len(value)}" + (f": {_shape(value[0])}" if value else "")
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))

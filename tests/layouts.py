"""A few valid records of every layout, as plain JSON values, and the stage commands that read them."""

import json
from itertools import islice
from pathlib import Path

from cream.files import store
from cream.records import Answer, Conversation, Item, Pair, Prompt, Rewards, Samples

COUNT = 6
ON = "--device cpu --model tiny"
GOOD = "localdata/good.jsonl"  # rewards, where a stage takes two files
STAGES = {  # stage -> the layout it reads, its command
    "sampling": (Prompt, f"infer.py {ON} --gen_n 2 --gen_max_tokens 8 --output_dir outputs/x.json --name {{file}}"),
    "evaluation": (
        Item,
        f"infer.py {ON} --mode evaluation --gen_max_tokens 8 --output_dir outputs/x.json --name {{file}}",
    ),
    "rescore": (Answer, "infer.py --mode rescore --output_dir outputs/x.json --input_file {file}"),
    "rewarding": (
        Samples,
        f"rewarding.py {ON} --reward likelihood --checkpoint none --output outputs/x.json --input_file {{file}}",
    ),
    "file1": (Rewards, "cal_consistency.py --output outputs/x.json --file1 {file}"),
    "file2": (Rewards, f"cal_consistency.py --output outputs/x.json --file1 {GOOD} --file2 {{file}}"),
    "labels": (Item, f"cal_consistency.py --output outputs/x.json --file1 {GOOD} --labels {{file}}"),
    "sft": (Conversation, f"train.py {ON} --output_dir outputs/x --train_stage sft --name {{file}}"),
    "dpo": (Pair, f"train.py {ON} --output_dir outputs/x --train_stage dpo --name {{file}}"),
}


def records(kind: type) -> list[dict]:
    """COUNT valid records of a layout, uuids q0, q1 …"""
    return [{"uuid": f"q{i}", **_record(kind, i)} for i in range(COUNT)]


def _record(kind: type, i: int) -> dict:
    prompt = [{"role": "user", "content": f"What is {i} + 2?"}]
    answers = [f"{i} + 2 = {i + n}. Answer: {i + n}" for n in (2, 3, 4)]
    told = [[*prompt, {"role": "assistant", "content": answer}] for answer in answers]
    stopped = {"finish_reason": ["stop"] * 3, "num_tokens": [9, 9, 9]}
    item = {"question": prompt[0]["content"], "label": i + 2}
    return {
        Prompt: {"messages": prompt},
        Conversation: {"messages": told[0]},
        Samples: {"prompt": prompt, "responses": answers, "logprob": [-3.5, -4.5, None], **stopped},
        Rewards: {
            "prompt": prompt,
            "response": told,
            "score": [-3.5, -4.5, -6.5],
            "ref_score": [None] * 3,
            "reward": [-0.5, -1.5, -2.5],
            "reason": [None] * 3,
            **stopped,
        },
        Pair: {"prompt": prompt, "selected": told[0], "rejected": told[1], "consistency": 0.75, "tau": 0.5},
        Item: item,
        Answer: {**item, "responses": answers[0], "final_prediction": str(i + 2), "correct": True},
    }[kind]


def lines(rows: list) -> bytes:
    """The text of a .jsonl file."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def whole(kind: type, rows: list[dict]) -> bytes:
    """The text of a .json file: an object keyed by uuid, of evaluation data a list. A doubled uuid is there twice."""
    if kind is Item:
        return b"[" + b",\n".join(json.dumps(row).encode() for row in rows) + b"]"
    parts = []
    for row in rows:
        value = {key: v for key, v in row.items() if key != "uuid"}
        value = value["messages"] if kind in (Prompt, Conversation) else value
        parts.append(f"{json.dumps(row['uuid'])}: {json.dumps(value)}")
    return "{{{}}}".format(",\n".join(parts)).encode()


def put(path: Path, kind: type) -> Path:
    """A valid file, in the form that its suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    store.write_rows(path, records(kind))
    return path


def slices(shared: Path, folder: Path, train: int, test: int) -> Path:
    """The first rows of every shared split that prepare_data.py reads, under their own names, in a folder."""
    data = shared / "data"
    conversations = data / "sft/oasst_en100_messages.jsonl"
    found = {
        conversations: None,
        **dict.fromkeys(data.glob("train/*"), train),
        **dict.fromkeys(data.glob("eval/*"), test),
    }
    for path, count in found.items():
        with open(path, "rb") as file:
            (folder / path.name).write_bytes(b"".join(islice(file, count)))
    return folder

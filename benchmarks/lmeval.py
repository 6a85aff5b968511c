"""The peer in evaluation, lm-evaluation-harness: its own task definitions, on rows of ../shared/data/eval."""

import contextlib
import io
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workload import SHARED

from cream.errors import UserError

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported

# a task's name here -> the file that defines it there
TASKS = {
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "siqa": "siqa/siqa.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}
CHOICE = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]


@dataclass(frozen=True)
class Question:
    """An item as the peer asks it: the context of its continuations (of one empty one if it generates)."""

    uuid: str
    context: str
    continuations: list[str]


def task(name: str, cache: Path, shots: int = 0, max_gen_toks: int = 256):
    """The peer's task, its definition unchanged but for where the rows are, how many are shown solved before (from
    the training set), and acc_norm where it has acc alone. Raises UserError without the rows."""
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    files = {"test": SHARED / f"eval/{name}_test.jsonl"}
    if shots:
        files["train"] = SHARED / f"train/{name}_train.jsonl"
    if missing := [str(path) for path in files.values() if not path.exists()]:
        raise UserError(f"the rows of {name} are not there: {', '.join(missing)}")
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / TASKS[name])
    config |= {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}, "cache_dir": str(cache)},
        "training_split": "train" if shots else None,
        "fewshot_split": "train" if shots else None,
        "validation_split": None,
        "test_split": "test",
        "num_fewshot": shots,
    }
    if config["output_type"] == "multiple_choice":
        config["metric_list"] = CHOICE
    else:
        config["generation_kwargs"] |= {"max_gen_toks": max_gen_toks}
    return ConfigurableTask(config=config)


def model(folder: Path, batch_size: int | str, device: str, dtype: str = "float32"):
    """The peer's own transformers model."""
    from lm_eval.models.huggingface import HFLM

    with contextlib.redirect_stdout(io.StringIO()):
        return HFLM(pretrained=str(folder), batch_size=batch_size, device=device, dtype=dtype)


def requests(made, limit: int | None) -> list:
    """What a task asks the model: an Instance for each option, or for each item to be answered."""
    made.set_fewshot_seed(1234)  # as the peer's command line does; the same examples whenever it is asked
    made.build_all_requests(limit=limit)
    return made.instances


def questions(made, limit: int | None) -> list[Question]:
    """The same, by item."""
    found: dict[int, Question] = {}
    for instance in requests(made, limit):
        context, more = instance.args
        question = found.setdefault(instance.doc_id, Question(instance.doc["id"], context, []))
        question.continuations.append(more if isinstance(more, str) else "")
    return list(found.values())


def evaluate(lm, made, limit: int | None) -> list[dict]:
    """Each item's sample as the peer logs it: `doc`, `resps`, `filtered_resps`, and its metrics."""
    from lm_eval.evaluator import evaluate as run

    tasks = {"tasks": {made.task_name: made}, "groups": {}, "group_map": {}}
    return run(lm, tasks, limit=limit, bootstrap_iters=0, log_samples=True)["samples"][made.task_name]


def logprobs(samples: Sequence[dict]) -> dict[str, list[float]]:
    """An item's id -> log π of its options."""
    return {sample["doc"]["id"]: [float(value[0]) for value in sample["filtered_resps"]] for sample in samples}


def regraded(made, texts: dict[str, tuple[dict, str]]) -> dict[str, tuple[str, bool]]:
    """id -> what the peer's flexible-extract reads out of a text, and whether that is right, from (row, text)."""
    (extract,) = (each for each in made._filters if each.name == "flexible-extract")
    found = {}
    for uuid, (doc, text) in texts.items():
        instance = made.construct_requests(doc=doc, ctx="", metadata=(made.task_name, 0, 1))
        instance.resps.append(text)
        extract.apply([instance])
        read = instance.filtered_resps["flexible-extract"]
        found[uuid] = read, bool(made.process_results(doc, [read])["exact_match"])
    return found

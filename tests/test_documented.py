"""Every command of the documentation runs on the tiny model: the README's in sequence, then each page's after those of
the pages that it needs; those of iterate.py with --dry_run only. A command that cannot run here is listed, with the
reason and what tests it instead."""

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import PAGES, README, REPO, commands, examples, named_blocks

from cream.files import store

NOT_RUN = {  # commands that nothing here runs -> why, and what tests them
    r"make \w+": "sets up and downloads: test_docs.py looks its target up",
    r"source \.venv/bin/activate": "the shell's own",
    r"python (benchmarks|scripts)/.*": "minutes to hours: test_docs.py has each read these flags",
    r"python prepare_data\.py build .*": "the hub or copies of it: test_prepare_data.py builds from such folders",
    r"python prepare_data\.py eft .*|python train\.py .*/eft\.sft\.json .*": "a judge that can reason: test_eft.py",
    r"python report\.py watch .*": "serves until Ctrl-C: test_report.py",
    r"python infer\.py --ray_address .*": "a cluster: test_cluster.py",
    r"(torchrun|srun) .*": "several nodes: test_parallel.py, test_hosts.py",
}
STAND_INS = [  # what is not here -> what takes its place
    (r"--device [\d,]+", "--device cpu"),
    (r" --(deepspeed|tensor_parallel_size|online_engine|chat_template_kwargs) \S+", ""),
    (r"(model) (Qwen|meta-llama)/\S+", r"\1 tiny"),
    (r" --figures \S+", ""),  # they need a browser: test_report.py
    (r"allenai/reward-bench-2", "reward-bench-2.jsonl"),
    (r"(python iterate\.py .*?)( --dry_run)?$", r"\1 --dry_run"),  # test_iterate.py runs loops
    (r"^(?!.*(tiny_judge|expected))(.* --reward judge.*)", r"\2 --judge_max_tokens 8 --on_unparsed continue"),
]
FEWER = [  # of what takes long; README's commands for the tiny model run as they are
    (r"--epoch [56]\b", "--epoch 1"),
    (r"(train\.py .*--epoch (12|8)\b.*)", r"\1 --save_eval_step_ratio 1"),
    (r"(train\.py .*--train_stage orm .*)", r"\1 --limit_size 64"),
    (r"--gen_max_tokens (?!48|64)\d+", "--gen_max_tokens 24"),
    (r"(infer\.py (?!.*(--gen_max_tokens|rescore)).*)", r"\1 --gen_max_tokens 48"),
    (r"(--train_stage prm .*--lr) 1e-3", r"\1 4e-3"),  # of fewer steps, so that it has learned to sign
    (r"--num_prompts \d+", "--num_prompts 4"),
    (r"--held_out \d{3}", "--held_out 8"),
    (r"(train\.py .*online_rloo.*)", r"\1 --limit_size 16"),
    (r"(train_armo\.py .*)", r"\1 --gate_steps 20"),
]
LLAMA3, REAL = "meta-llama/Meta-Llama-3-8B-Instruct", ("assets/llama3", "assets/smollm2")  # copies of the tiny one
SHORT = {"prompt.1": 45, "prompt.2": 45, "test": 60, "pairs": 80, "judge": 160}  # records of localdata/tiny
NEEDS = dict.fromkeys(("data.md", "evaluation.md", "online.md"), ["reward_models.md"])  # pages whose outputs it reads


# Commands -------------------------------------------------------------------------------------------------------------


def is_run(command: str) -> bool:
    return not any(re.fullmatch(pattern, command) for pattern in NOT_RUN)


def here(command: str, changes: list[tuple[str, str]]) -> str:
    """A command as it can run here."""
    for pattern, other in changes:
        command = re.sub(pattern, other, command)
    return command


def test_what_is_not_run_is_documented_and_its_tests_exist():
    documented = [command for page in PAGES for command in commands(page.read_text())]
    for pattern, why in NOT_RUN.items():
        assert any(re.fullmatch(pattern, command) for command in documented), pattern
        assert all((REPO / "tests" / name).exists() for name in re.findall(r"test_\w+\.py", why))


@pytest.fixture(scope="module")
def run_page(workspace, readme_run) -> Callable[[str], None]:
    """Run the commands of a page, after those of the pages that it needs, once."""
    ran = {"README.md"}

    def run(name: str) -> None:
        for needed in NEEDS.get(name, []):
            run(needed)
        if name not in ran:
            ran.add(name)
            for command in filter(is_run, commands((REPO / "docs" / name).read_text())):
                workspace.run(here(command, STAND_INS + FEWER))

    return run


# What they read -------------------------------------------------------------------------------------------------------


def _says(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def write_stand_ins(folder: Path) -> None:
    """The files that documented commands read and none of them writes, with a few records each."""
    sums = [(f"n{i}", f"Tom has {i} eggs and gets {i} more. How many now?", f"{2 * i}", f"{i}") for i in range(11, 31)]
    question, answer = (lambda text: _says("user", text)), (lambda text: _says("assistant", text))
    pairs = [{"uuid": u, "prompt": question(q), "chosen": answer(a), "rejected": answer(b)} for u, q, a, b in sums]
    kept = [
        {"uuid": u, "prompt": question(q), "selected": question(q) + answer(a), "rejected": question(q) + answer(b)}
        for u, q, a, b in sums
    ]
    rated = [
        {
            "uuid": f"{u}-{r}",
            "messages": question(q) + answer(r),
            "ratings": {"right": float(r == a), "helpsteer-verbosity": i},
        }
        for i, (u, q, a, b) in enumerate(sums)
        for r in (a, b)
    ]
    letters = [{"uuid": u, "question": f"{q}\nA. {a}\nB. {b}", "label": "A", "task": "arc_easy"} for u, q, a, b in sums]
    solved = [{"uuid": u, "question": q, "label": a, "task": "gsm8k", "solution": f"It is {a}."} for u, q, a, _ in sums]
    prompts = (folder / "localdata/tiny/prompt.1.json").read_text()
    conversations = list(store.read_rows(folder / "localdata/tiny/sft.json"))[:16]
    files = {
        "hh_rlhf.jsonl": [
            {key: f"\n\nHuman: {q} Well?\n\nAssistant: {r}" for key, r in (("chosen", a), ("rejected", b))}
            for _, q, a, b in sums
        ],
        "ultrafeedback_binarized.jsonl": pairs,
        "pairs.jsonl": pairs,
        "rewardbench.jsonl": [
            {"id": u, "prompt": q, "chosen": a, "rejected": b, "subset": "hep-python"} for u, q, a, b in sums
        ],
        "reward-bench-2.jsonl": [
            {"id": u, "prompt": q, "chosen": [a], "rejected": [b, "0", "1"], "num_correct": 1, "subset": "Math"}
            for u, q, a, b in sums[:4]
        ],
        "ratings.json": rated,
        "S.json": [{"uuid": u, "prompt": question(q), "responses": [a, b]} for u, q, a, b in sums[:4]],
        "human.jsonl": [{"uuid": uuid, "ranks": [*range(6)]} for uuid in json.loads(prompts)],
        "ext.jsonl": [
            {"uuid": u, "prompt": question(q), "response": [question(q) + answer(r) for r in (a, b)], "reward": [2, 1]}
            for u, q, a, b in sums
        ],
        "ext.ranks.jsonl": [{"uuid": u, "ranks": [0, 1]} for u, *_ in sums],
        "own.prompt.json": [{"uuid": u, "messages": question(q)} for u, q, *_ in sums],
        "own.test.json": solved[:4],
        "localdata/oasst1.ranked.json": [
            {"uuid": u, "prompt": question(q), "responses": [a, b], "ranks": [0, 1]} for u, q, a, b in sums[:4]
        ],
        "localdata/gsm8k/train.json": solved[4:],
        "localdata/gsm8k/test.json": solved[:4],
    }
    for place in ("localdata", "localdata/small"):
        files[f"{place}/all_test.json"] = letters
        files[f"{place}/oasst1.sft.json"] = conversations
        files |= {f"{place}/prompt.{t}.json": files["own.prompt.json"][10 * (t - 1) : 10 * t] for t in (1, 2)}
    files |= {f"localdata/{name}.dpo.json": kept for name in ("a", "b", "shp", "helpsteer", "ultrafeedback")}
    for name, rows in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        store.write_rows(folder / name, rows)
    for model in REAL:
        shutil.copytree(folder / "assets/tiny_m0", folder / model)
    config = (folder / "config.py").read_text()
    assert LLAMA3 in config
    (folder / "config.py").write_text(config.replace(LLAMA3, REAL[0]))
    for name in ("mix.yaml", "own.j2", "verdict.py", "preferences.jsonl", "quiz.jsonl"):
        text = named_blocks()[name].replace("held_out: 500", "held_out: 4").replace("count: 100000", "count: 5")
        (folder / name).write_text(text)


# Running what the README says -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def readme_run(workspace) -> str:
    """The workspace after the README's commands, on fewer prompts and questions; what they printed."""
    for name, count in SHORT.items():
        workspace.shorten(f"localdata/tiny/{name}.json", count)
    write_stand_ins(workspace.folder)
    out = "".join(_run(workspace, here(c, STAND_INS + FEWER)) for c in filter(is_run, commands(README)))
    for loop in ("srlm", "cream"):  # as much as docs/reports.md needs of the recipes' outputs
        (workspace.folder / "outputs/tiny" / loop).mkdir(parents=True)
        for end in ("", ".meta.json"):
            made = workspace.folder / f"outputs/round1/pairs.json{end}"
            shutil.copy2(made, workspace.folder / f"outputs/tiny/{loop}/round1.pairs.json{end}")
    registered = workspace.read("configs/checkpoint.json")
    others = {"llama3_sft": registered["llama3_m1"], "llama3_armo": "outputs/armo"}  # of docs/judges.md, docs/online.md
    workspace.write("configs/checkpoint.json", registered | others)
    return out


PYTHON = r"""python() {  # has the test run it (BASH_ENV, which each bash reads first)
    printf '%q ' "$@" >&"$TEST"
    echo >&"$TEST"
    read -r <&"$TEST"
}
"""


def _run(workspace, command: str) -> str:
    if command.startswith("python "):
        return workspace.run(command).out
    (workspace.folder / "python.sh").write_text(PYTHON)
    ours, theirs = socket.socketpair()
    env = os.environ | {"BASH_ENV": "python.sh", "TEST": str(theirs.fileno())}
    bash = ["bash", "-euc", command]
    with (
        subprocess.Popen(bash, cwd=workspace.folder, env=env, pass_fds=[theirs.fileno()]) as script,
        ours,
        ours.makefile("rw") as asked,
    ):
        theirs.close()
        out = ""
        for line in asked:
            out += workspace.run(line).out
            print(file=asked, flush=True)
    assert script.returncode == 0, f"{command}\nended with {script.returncode} after\n{out}"
    return out


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_sequence(workspace, readme_run):
    assert {"tiny_m1", "tiny_m2", "tiny_m3", "llama3_m1", "llama3_m2"} <= set(workspace.read("configs/checkpoint.json"))
    assert {"tiny_dpo_1", "llama3_dpo_1"} <= set(workspace.read("configs/dataset.json"))
    assert re.search(r"^macro +60 ", readme_run, re.MULTILINE)  # the accuracy of M2
    assert "outputs/tiny/cream" in readme_run  # the recipe's dry run


@pytest.mark.slow
def test_the_script_of_one_iteration_ranks_by_the_previous_checkpoint_and_says_what_stands(workspace, readme_run):
    out = workspace.folder / "outputs/tiny_m3"
    by_current, by_previous = (
        workspace.read(f"outputs/tiny_m3/rewards.{n}.json.meta.json") for n in ("current", "previous")
    )
    assert by_current["settings"] == by_previous["settings"] and by_current["settings"]["reward"] == "dpo"
    assert by_current["inputs"]["reference"] == by_previous["inputs"]["reference"]  # M0
    assert by_current["inputs"]["policy"] != by_previous["inputs"]["policy"]
    assert workspace.read("outputs/tiny_m3/train/checkpoint-last/cream.json")["started_from"].endswith(
        workspace.read("configs/checkpoint.json")["tiny_m2"]
    )
    before = workspace.state()
    (again,) = [c for c in commands(README) if "cream_iteration.sh" in c]
    assert len(re.findall("is up to date", _run(workspace, again))) == 5
    changed = {path for path, when in workspace.state().items() if before.get(path) != when}
    assert not {path for path in changed if path.startswith(str(out))}


def test_the_script_explains_itself(repo):
    done = subprocess.run(["./cream_iteration.sh", "tiny"], cwd=repo / "scripts", capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert "MODEL CURRENT PREVIOUS PROMPTS NEXT" in done.stderr and "set -" not in done.stderr
    asked = subprocess.run(["./cream_iteration.sh", "--help"], cwd=repo / "scripts", capture_output=True, text=True)
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, done.stderr, "")


@pytest.mark.slow
def test_what_stages_write_is_what_the_formats_page_shows(workspace, readme_run):
    (run,) = (workspace.folder / "outputs/dpo").glob("tiny_dpo_1-*")
    (last,) = {path.resolve() for path in run.glob("checkpoint-*")}
    evaluation = workspace.folder / "outputs/evaluation/tiny_m2-tiny_test"
    written = {
        "pairs.json.meta.json": workspace.folder / "outputs/round1/pairs.json.meta.json",
        "scores.jsonl": workspace.folder / "outputs/round1/samples.scores.jsonl",
        "summary.json": evaluation / "summary.json",
        "run/args.json": run / "args.json",
        "run/log.jsonl": run / "log.jsonl",
        "run/meta.json": run / "meta.json",
        "run/checkpoint-9/cream.json": last / "cream.json",
    }
    for name, path in written.items():
        shown, found = (json.loads(text) for text in (examples()[name], _first_line(path)))
        assert shown.keys() == found.keys(), name
        for part in ("settings", "inputs", "flags", "counts", "last"):  # excerpts
            assert shown.get(part, {}).keys() <= found.get(part, {}).keys(), (name, part)
    for name in ("samples.json", "current.json", "pairs.json"):
        assert _keys(store.read_rows(workspace.folder / "outputs/round1" / name)) <= _keys(_rows(name)), name
    assert _keys(store.read_rows(evaluation / "results.json")) == _keys(_rows("results.json"))


def _first_line(path: Path) -> str:
    text = path.read_text()
    return text.splitlines()[0].partition("\t")[0] if path.suffix == ".jsonl" else text


def _rows(name: str) -> list[dict]:
    return [{"uuid": uuid, **value} for uuid, value in json.loads(examples()[name]).items()]


def _keys(rows) -> set[str]:
    return set().union(*rows)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p.name for p in PAGES[1:] if any(map(is_run, commands(p.read_text())))])
def test_the_commands_of_a_page_run_after_those_of_the_readme(workspace, run_page, page):
    run_page(page)
    for name, text in named_blocks().items() if page == "data.md" else ():
        if name in ("localdata/own.dpo.json", "localdata/quiz.test.json", "own.jsonl"):
            texts = text, (workspace.folder / name).read_text()
            shown, made = (list(map(json.loads, t.splitlines() if name.endswith("l") else [t])) for t in texts)
            assert made == shown, name

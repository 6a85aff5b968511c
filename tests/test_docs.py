"""The documentation holds: its commands parse and run, its examples decode, its links and its tree lead somewhere."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

import iterate
from cream.cli.flags import as_dict, parse, try_parse
from cream.evaluation.choices import accuracies, choose_option
from cream.evaluation.generation import regrade
from cream.evaluation.grade import DEFAULT
from cream.evaluation.statistics import table_rows
from cream.evaluation.tasks import grade
from cream.files import store
from cream.pairs.build import build
from cream.records import Answer, Conversation, Item, Pair, Prompt, Ratings, Rewards, Samples, Steps, encode

REPO = Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text()
FORMATS = (REPO / "docs/formats.md").read_text()
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
SCRIPTS = {
    script: iterate.config_of(script)
    for script in (
        *iterate.STAGES,
        *("iterate.py", "train_armo.py", "evaluate_reward.py", "prepare_data.py", "report.py"),
    )
}
WITH_FILES = [*iterate.STAGES, "train_armo.py", "evaluate_reward.py"]  # whose flags may stand in a file
WITH_WORDS = ("prepare_data.py", "report.py")  # that take commands and paths
VOTES = ("results.votes.json", "summary.votes.json")
LAYOUTS = {
    "sft": Conversation,
    "prompts": Prompt,
    "samples": Samples,
    "current": Rewards,
    "previous": Rewards,
    "pairs": Pair,
    "ratings": Ratings,
    "steps": Steps,
    "test": Item,
    "results": Answer,
}


# Commands -------------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """The command lines of all bash blocks, with continued lines joined and without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def marked_commands(text: str, mark: str) -> list[str]:
    """The command lines of those blocks of a page that stand behind a mark."""
    return commands("".join(block.partition("\n```\n")[0] + "\n```\n" for block in text.split(mark)[1:]))


def readme_commands() -> list[str]:
    """The command lines of those README blocks that are marked as tested."""
    return marked_commands(README, "<!-- tested: these blocks run in this order -->\n")


AFTER = "<!-- tested: after the README's commands -->\n"  # in pages, on the tiny model


DOCUMENTED = {c for page in PAGES for c in commands(page.read_text()) if c.startswith("python ")}
STAGE_COMMANDS = sorted(c for c in DOCUMENTED if "/" not in c.split()[1])
TOOLS = sorted({t for page in PAGES for t in re.findall(r"python ((?:benchmarks|scripts)/\S+\.py)", page.read_text())})


@pytest.mark.parametrize("command", STAGE_COMMANDS)
def test_every_documented_command_parses(command):
    _, script, *words = shlex.split(command)
    taken = [] if script in WITH_WORDS else None
    parse(
        SCRIPTS[script], words, description="", example="", files=script in WITH_FILES, words=taken
    )  # or exits with 2


def test_every_benchmark_is_documented():
    """The others are what the benchmarks import."""
    imported = {"measure", "options", "workload", "peers", "lmeval"}
    assert {f"benchmarks/{p.name}" for p in REPO.glob("benchmarks/*.py") if p.stem not in imported} <= {*TOOLS}


CHOICES = (REPO / "docs/choices.md").read_text()


def papers_settings() -> list[tuple[list[str], bool]]:
    """Of each row of the table of the paper's settings: the commands of its last column, and whether its flags have
    these values by default, which an asterisk says."""
    table = CHOICES.partition("## The paper's settings")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[-1] for line in table.splitlines() if line.startswith("| ")][1:]
    return [(re.findall(r"`(\w+\.py [^`]*)`", row), "*" in re.sub(r"`[^`]*`", "", row)) for row in rows]


def test_the_papers_settings_are_flags_defaults_and_those_of_the_recipe():
    recipe = yaml.safe_load((REPO / "configs/recipes/llama3_cream.yaml").read_text())
    parts = {"infer.py": "sampling", "cal_consistency.py": "consistency", "train.py": "dpo"}
    found = 0
    for texts, is_default in papers_settings():
        for script, *words in map(shlex.split, texts):
            config, problems = try_parse(SCRIPTS[script], words, [] if script in WITH_WORDS else None)
            assert not problems, (script, words, problems)
            given = {word[2:] for word in words if word.startswith("--")}
            values, default = as_dict(config), as_dict(try_parse(SCRIPTS[script], [], None)[0])
            own = recipe.get("sft" if "sft" in words else parts.get(script), {})
            for name in given & own.keys():
                assert values[name] == own[name], (script, name)
                found += 1
            if is_default:
                assert all(values[name] == default[name] for name in given if default[name] is not None), words
    assert found >= 8


LAUNCHERS = {"--head", "--address", "--ray", "--generate"}  # of ray, torchrun and Slurm, as docs/scaling.md has them
OTHERS = {"--advantage_estimator", "--init_kl_coef", "--use_kl_loss", "--max_epochs", "--train_batch_size"}
OTHERS |= {"--policy_loss_type", "--eps_clip_low_high"}  # OpenRLHF's, beside ours in docs/policy_gradients.md
LAUNCHERS |= {"--weight", "--logprobs"}  # of `vllm serve`: --weight-transfer-config, --logprobs-mode
LAUNCHERS |= {"--node", "--nnodes", "--nproc_per_node", "--node_rank", "--master_addr", "--nodes", "--ntasks", "--gpus"}


@pytest.mark.slow
def test_the_documentation_names_no_flag_that_no_script_has(stages):
    known = set()
    for script in (*SCRIPTS, *TOOLS):
        done = stages.run(REPO, [script, "--help"])
        assert done.code == 0, done.err
        own = set(re.findall(r"--?[a-z]\w*", done.out))
        for command in (c for c in DOCUMENTED if script in TOOLS and c.split()[1] == script):
            assert {word.partition("=")[0] for word in shlex.split(command) if word[:2] == "--"} <= own, command
        known |= own
    named = {flag for page in PAGES for flag in re.findall(r"(?<![\w-])--[a-z]\w*", page.read_text())}
    assert named and named <= known | LAUNCHERS | OTHERS


def test_the_two_commands_of_a_newcomer_come_first():
    makefile = (REPO / "Makefile").read_text()
    assert commands(README)[:2] == ["make quickstart", "make test"]
    assert all(re.search(rf"^{c.split()[1]}:", makefile, re.MULTILINE) for c in commands(README) if c[:5] == "make ")


# Links and the tree ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert all((page.parent / link).exists() for link in links), links
    named = re.findall(r"`((?:cream|configs/recipes|scripts|benchmarks|tests|assets)/[\w./-]*)`", text)
    assert all((REPO / name).exists() for name in named), named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_into_pages_lead_to_a_heading(page):
    for target, anchor in re.findall(r"\]\(([\w./-]*)#([^)]+)\)", page.read_text()):
        headings = re.findall(r"^#+ (.*)$", (page.parent / target if target else page).read_text(), re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        assert anchor in slugs, f"{target}#{anchor}"


def test_every_page_is_one_jump_from_the_readme():
    linked = {link for link in re.findall(r"\]\(([^)#]+)", README) if fnmatch(link, "docs/*.md")}
    assert linked == {f"docs/{page.name}" for page in PAGES[1:]}


def tree() -> dict[str, str]:
    """Path -> what the README's last section says of it; a folder's path ends with a slash, `*` is a pattern."""
    block = README.rpartition("## The tree")[2].partition("```\n")[2].partition("```")[0]
    paths, folders = {}, []
    for line in block.splitlines():
        name, _, words = line.strip().partition("  ")
        folders = folders[: (len(line) - len(line.lstrip())) // 2]
        paths["".join([*folders, name])] = words.strip()
        folders.append(name)
    return paths


def test_every_path_of_the_tree_exists():
    made_by_stages = {"outputs/"}
    for path in tree().keys() - made_by_stages:
        found = list(REPO.glob(path))
        assert found and all(each.is_dir() == path.endswith("/") for each in found), path


def test_the_tree_names_every_folder_of_the_repository_and_of_the_library():
    """And every file at the top that is code, or is neither a licence nor the settings of a tool."""
    ignored = [
        line.strip("/") for line in (REPO / ".gitignore").read_text().splitlines() if line and line[0] not in "#!"
    ]
    said_by_their_names = {"README.md", "LICENSE", "CITATION.cff", "Makefile", "pyproject.toml", ".gitignore", ".git"}
    top = {path for path in REPO.iterdir() if not any(fnmatch(path.name, pattern) for pattern in ignored)}
    inner = {path for path in (REPO / "cream").iterdir() if path.name != "__pycache__"}
    paths = {str(p.relative_to(REPO)) + "/" * p.is_dir() for p in top | inner if p.name not in said_by_their_names}
    missing = {path for path in paths if not any(path.count("/") == n.count("/") and fnmatch(path, n) for n in tree())}
    assert len(paths) > 20 and not missing, sorted(missing)


def test_every_entry_of_the_tree_is_explained():
    assert [path for path, words in tree().items() if not words] == []


def test_the_documentation_keeps_to_the_word_list():
    done = subprocess.run(
        [sys.executable, "scripts/lint_words.py", "README.md", "docs", "findings", "scripts"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Formats --------------------------------------------------------------------------------------------------------------


def examples() -> dict[str, str]:
    """File name -> text of the JSON blocks of docs/formats.md."""
    return dict(re.findall(r"^```json (\S+)\n(.*?)^```", FORMATS, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def documented(tmp_path_factory) -> Path:
    """A folder with the examples as files."""
    folder = tmp_path_factory.mktemp("formats")
    for name, text in examples().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    "name", [name for name in examples() if name.partition(".")[0] in LAYOUTS and "meta" not in name]
)
def test_examples_of_records_decode_and_survive_writing(documented, name, tmp_path):
    path, kind = documented / name, LAYOUTS[name.partition(".")[0]]
    assert store.detect(path) is kind
    records = list(store.read(path, kind))
    assert records and all(not record.extra for record in records), "an example has keys that its layout does not know"
    store.write(tmp_path / name, records)
    assert list(store.read_rows(tmp_path / name)) == list(store.read_rows(path))


@pytest.mark.parametrize("name", sorted(LAYOUTS.keys() - {"current", "previous"}))  # rewards, of one form each
def test_both_forms_hold_the_same_records(documented, name):
    forms = [documented / f"{name}.json", documented / f"{name}.jsonl"]
    by_json, by_lines = ({r.uuid: r for r in store.read(path, LAYOUTS[name])} for path in forms)
    assert by_lines and by_lines == {uuid: by_json[uuid] for uuid in by_lines}


def test_every_layout_is_shown_in_both_forms():
    shown = examples().keys()
    rewards = {"current.json", "previous.jsonl"}  # of one layout, one form each
    assert rewards <= shown
    assert {
        f"{name}.{form}" for name in LAYOUTS.keys() - {"current", "previous"} for form in ("json", "jsonl")
    } <= shown


def test_the_examples_follow_from_each_other(documented):
    samples = list(store.read(documented / "samples.json", Samples))
    current, previous = (list(store.read(documented / n, Rewards)) for n in ("current.json", "previous.jsonl"))
    assert [r.responses() for r in current] == [s.responses for s in samples]
    assert [r.finish_reason for r in current] == [s.finish_reason for s in samples]
    made = build(current, previous)
    (pair,), (shown,) = made.pairs, store.read(documented / "pairs.json", Pair)
    assert {k: pytest.approx(v, abs=1e-3) if isinstance(v, float) else v for k, v in encode(shown).items()} == encode(
        pair
    )
    sidecar = json.loads(examples()["pairs.json.meta.json"])
    assert sidecar["counts"] == {"out": 1, "dropped": dict(made.dropped)}
    assert sidecar["mean_consistency"] == pytest.approx(made.c.mean, abs=1e-3)


@pytest.mark.parametrize(("results", "summary"), [("results.json", "summary.json"), VOTES])
def test_the_graded_examples_are_graded_as_shown(documented, results, summary):
    answers = list(store.read(documented / results, Answer))
    assert [regrade(answer, DEFAULT) for answer in answers] == answers
    for made, shown in zip(table_rows(answers), json.loads(examples()[summary])["tasks"], strict=True):
        assert made == {k: _about(v) for k, v in shown.items()}


def test_the_compared_examples_are_chosen_as_shown(documented):
    answers = list(store.read(documented / "results.options.json", Answer))
    shown = json.loads(examples()["summary.options.json"])
    assert [choose_option(answer, shown["length_norm"]) for answer in answers] == answers
    assert accuracies(answers) == shown["by_length_norm"]
    assert table_rows(answers) == [{k: _about(v) for k, v in row.items()} for row in shown["tasks"]]


def test_the_hard_cases_of_the_evaluation_page_are_read_as_shown():
    """By the rules, and by the released ones; the options are one word each."""
    table = (REPO / "docs/evaluation.md").read_text().partition("| response |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert len(rows) > 9
    for response, run, wanted, released in rows:
        first, _, last = run.partition(" to ")
        labels = [chr(code) for code in range(ord(first), ord(last) + 1)] if run else []
        question = "\n".join(["Which?", *(f"{label}. gas{label}" for label in labels)])
        for strict, expected in ((False, wanted), (True, released)):
            assert grade(question, first or "1", response.strip("`"), strict)[0] == expected.lower(), response


def _about(value):
    """A number or an object of numbers, as rounded there."""
    return pytest.approx(value, abs=1e-3) if isinstance(value, float | dict) else value


# Running what the README says -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def readme_run(workspace) -> str:
    """The workspace after the README's tested commands, on fewer prompts and questions; what they printed."""
    for name, count in {"prompt.1": 45, "prompt.2": 45, "test": 60}.items():
        workspace.shorten(f"localdata/tiny/{name}.json", count)
    return "".join(_run(workspace, command) for command in readme_commands())


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
    assert set(workspace.read("configs/checkpoint.json")) == {"tiny_m1", "tiny_m2", "tiny_m3"}
    assert set(workspace.read("configs/dataset.json")) == {"tiny_dpo_1"}
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
    (again,) = [c for c in readme_commands() if "cream_iteration.sh" in c]
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
    (run,) = (workspace.folder / "outputs/dpo").iterdir()
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
@pytest.mark.parametrize("page", [p for p in PAGES if AFTER in p.read_text()], ids=lambda page: page.name)
def test_marked_commands_of_a_page_run_after_those_of_the_readme(workspace, readme_run, page):
    for command in marked_commands(page.read_text(), AFTER):
        workspace.run(command)

"""The documentation holds: its commands parse, its examples decode, its links and its tree lead somewhere. That its
commands run is in test_documented.py."""

import json
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from pages import CHOICES, PAGES, README, REPO, commands, examples, inline_commands

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

SCRIPTS = {
    script: iterate.config_of(script)
    for script in (
        *iterate.STAGES,
        *("iterate.py", "train_armo.py", "evaluate_reward.py", "prepare_data.py", "report.py"),
    )
}
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


LAUNCHED = r"^(torchrun|srun) .*?(?=\w+\.py )"  # a script, by a launcher with flags of its own
SHOWN = {re.sub(LAUNCHED, "python ", c) for page in PAGES for c in commands(page.read_text())}
INLINE = {c for page in PAGES for c in inline_commands(page.read_text())}
DOCUMENTED = {c for c in SHOWN if c.startswith("python ")}
STAGE_COMMANDS = sorted(c for c in DOCUMENTED if "/" not in c.split()[1])
TOOLS = sorted({t for page in PAGES for t in re.findall(r"python ((?:benchmarks|scripts)/\S+\.py)", page.read_text())})
PLACEHOLDER = re.compile(r"\b(NAME|MODEL)\b|\||: needs a value")  # to be chosen; a flag that is only named


@pytest.mark.parametrize("command", STAGE_COMMANDS)
def test_every_documented_command_parses(command):
    _, script, *words = shlex.split(command)
    taken = [] if script in WITH_WORDS else None
    parse(SCRIPTS[script], words, description="", example="", words=taken)  # or exits with 2


def test_the_flags_of_commands_within_sentences_parse():
    for command in sorted(c for c in INLINE if "/" not in c.split()[1]):
        _, script, *words = shlex.split(command)
        _, problems = try_parse(SCRIPTS[script], words, [] if script in WITH_WORDS else None)
        assert [p for p in problems if not PLACEHOLDER.search(p)] == [], command


def test_every_benchmark_is_documented():
    """The others are what the benchmarks import."""
    imported = {"measure", "options", "workload", "peers", "lmeval"}
    assert {f"benchmarks/{p.name}" for p in REPO.glob("benchmarks/*.py") if p.stem not in imported} <= {*TOOLS}


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
OTHERS |= {"--project"}  # trackio's
OTHERS |= {"--headless", "--hide", "--screenshot", "--virtual", "--window"}  # Chromium's: --hide-scrollbars and so on
LAUNCHERS |= {"--weight", "--logprobs"}  # of `vllm serve`: --weight-transfer-config, --logprobs-mode
LAUNCHERS |= {"--node", "--nnodes", "--nproc_per_node", "--node_rank", "--master_addr", "--nodes", "--ntasks", "--gpus"}


@pytest.mark.slow
def test_the_documentation_names_no_flag_that_no_script_has(stages):
    known = set()
    for script in (*SCRIPTS, *TOOLS):
        asked = [word for c in DOCUMENTED | INLINE if c.split()[1] == script for word in shlex.split(c)[2:]]
        done = stages.run(REPO, [script, *(asked if script in TOOLS else []), "--help"])  # values are read first
        assert done.code == 0, done.err
        own = set(re.findall(r"--?[a-z]\w*", done.out))
        for command in (c for c in DOCUMENTED | INLINE if script in TOOLS and c.split()[1] == script):
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

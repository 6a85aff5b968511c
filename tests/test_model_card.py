"""Model cards: the hub reads them, their numbers are those of other commands, texts stay text; what is uploaded."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from markdown_it import MarkdownIt
from test_report import HOSTILE, Seen
from workspace import LOOP

from cream.errors import UserError
from cream.files.fingerprints import fingerprint_folder
from cream.reporting import hub, model_card
from cream.reporting.checkpoints import read_model
from cream.reporting.markdown import one_line
from cream.reporting.outputs import Output

NAME = HOSTILE.replace("/", "∕")[:150]  # as a folder's


# The card -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_card_of_a_checkpoint_has_what_other_commands_say(looped):
    card, before = f"{LOOP}/m2/checkpoint-last/README.md", looped.state()
    tried = looped.run(f"report.py card {LOOP}/m2 --push_to_hub me/m2 --dry_run --license mit").out
    assert looped.state() == before and "to me/m2, private" in tried and "model.safetensors" in tried
    assert not re.search(r"(?m)^  (log\.jsonl|args\.json|meta\.json|state)", tried)
    looped.run(f"report.py card {LOOP}/m2")
    text = (looped.folder / card).read_text()
    found = ModelCard(text)
    assert found.data.pipeline_tag == "text-generation" and {"cream", "dpo"} <= {*found.data.tags}
    tasks = [row for row in looped.read(f"{LOOP}/m2.summary.json")["tasks"] if row["task"] != "macro"]
    shown = {each.dataset_name: each.metric_value for each in found.data.eval_results}
    assert shown == {row["task"]: pytest.approx(row["accuracy"], abs=1e-4) for row in tasks}
    about = looped.read(f"{LOOP}/m2/checkpoint-last/cream.json")
    assert about["fingerprint"] in text and looped.read(f"{LOOP}/pairs.json.meta.json")["output"][:12] in text
    assert "| --max\\_length | 4096 (the model's context: 2048)" in text
    assert str(looped.folder) not in text and "| m0 | m2 |" in text and "--gen\\_temperature | 1 " in text
    assert all(f"## {part}\n" in text for part in ("Evaluation", "Limits", "Use", "Training", "Data and lineage"))
    looped.run(f"report.py card {LOOP}/m2")  # which changes no hash of the model
    assert (looped.folder / card).read_text() == text
    (looped.folder / card).write_text(text.replace("proves little", "proves all"))
    assert "is not a card as report.py made it" in looped.refused(f"report.py card {LOOP}/m2")
    assert "HF_HUB_OFFLINE" in looped.refused(f"report.py card {LOOP}/m2 --overwrite --push_to_hub me/m2")


def test_a_stage_has_no_settings_that_it_does_not_take():
    settings = {"beta": 0.1, "method": "original", "lr": 0.001}
    for stage, kept in (("sft", {"lr"}), ("dpo", {"beta", "method", "lr"}), ("of a later version", {*settings})):
        output = Output(Path("x"), {"settings": settings | {"train_stage": stage}})
        assert {*output.settings} == kept | {"train_stage"}


def test_hostile_texts_are_text_in_the_card(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = tmp_path / NAME
    folder = home / "checkpoint-1"
    shutil.copytree(tiny_folder, folder)
    digest = fingerprint_folder(folder)
    about = {"settings": {"train_stage": HOSTILE, "seed": HOSTILE, "x": f"/home/{HOSTILE}"}, "unverified": [HOSTILE]}
    about |= {
        "inputs": {"data": HOSTILE, "start": "b"},
        "sources": {"data": f"../{NAME}.json", "start": f"../{NAME}.m0"},
    }
    about |= {"forced": [HOSTILE], "versions": {HOSTILE: HOSTILE}, "command": [f"{NAME}.py"], "output": digest}
    for name in ("args.json", "meta.json", "checkpoint-1/cream.json"):
        (home / name).write_text(json.dumps(about | {"alarms": [{"alarm": HOSTILE, "value": 1, "threshold": 0}]}))
    row = {"question": "q", "label": "1", "task": HOSTILE, "responses": "", "final_prediction": "1", "correct": True}
    (tmp_path / f"{NAME}.eval.json").write_text(json.dumps({"a": row}))
    meta = {"settings": {"mode": "evaluation"}, "inputs": {"policy": digest}}
    (tmp_path / f"{NAME}.eval.json.meta.json").write_text(json.dumps(meta))
    text = model_card.build(read_model(str(folder), folder))
    card = ModelCard(text)
    (result,) = card.data.eval_results
    assert result.dataset_name == one_line(HOSTILE) and result.metric_value == 1.0
    assert card.data.model_name == one_line(NAME) and one_line(HOSTILE) in card.data.tags
    assert "\u202e" not in text and "\u0007" not in text and "/home/" not in text
    seen = Seen(MarkdownIt("commonmark").enable("table").render(card.text))
    assert {tag for tag, _ in seen.elements} <= {
        "a",
        "code",
        "details",
        "h1",
        "h2",
        "li",
        "p",
        "pre",
        "summary",
        "ul",
    } | {*("table", "thead", "tbody", "tr", "th", "td")}
    assert [each["href"] for each in seen.all("a")] == [model_card.PAPER]
    assert "".join(seen.text).count(one_line(HOSTILE)) > 6
    assert model_card.is_unedited(text) and not model_card.is_unedited(text + " ") and not model_card.is_unedited("")


# Uploads --------------------------------------------------------------------------------------------------------------


def test_only_the_model_and_its_card_are_uploaded(tiny_folder, tmp_path):
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(tiny_folder, folder)
    about = {"stage": "dpo", "started_from": "/home/me/m1", "sources": {"data": "../secret.json"}, "fingerprint": "f"}
    (folder / "cream.json").write_text(json.dumps(about))
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "log.jsonl", "args.json"):
        (folder / name).write_text("{}")
    for name in (
        "optimizer.safetensors",
        "training_args.bin",
        "run.py",
        ".env",
        "pairs.json",
        "README.md",
        "notes.txt",
    ):
        (folder / name).write_text("{}")
    (folder / "state").mkdir()
    (folder / "state/config.json").write_text("{}")
    files = hub.files_to_upload(folder, "the card", "README.md")
    loaded = {path.name for path in tiny_folder.iterdir()}
    assert {*files} == loaded | {"cream.json", "README.md"} and files["README.md"] == b"the card"
    assert json.loads(files["cream.json"]) == {"settings": {}, "inputs": {}, "stage": "dpo", "fingerprint": "f"}
    assert len(hub.describe_files(files)) == len(files) and "  README.md  8 bytes" in hub.describe_files(files)
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "run.Model"}}))
    assert "run.py" in hub.files_to_upload(folder, "", "README.md")


class FakeHub:
    """An HfApi without a network: one repository, `found`, or an error in its place."""

    def __init__(self, found):
        self.found, self.made, self.sent = found, {}, []

    def repo_info(self, repo):
        if isinstance(self.found, Exception):
            raise self.found
        return SimpleNamespace(private=self.found)

    def create_repo(self, repo, *, private):
        self.made[repo] = private

    def create_commit(self, repo, operations, *, commit_message):
        self.sent += [(repo, [each.path_in_repo for each in operations], commit_message)]
        return SimpleNamespace(commit_url=f"https://hub/{repo}/commit/1")


def refusal(kind=HfHubHTTPError, status=404):
    import httpx2

    return kind("no", response=httpx2.Response(status, request=httpx2.Request("GET", "https://hub")))


def test_an_upload_is_one_commit_to_a_private_repository(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    files = {"config.json": tmp_path / "config.json", "README.md": b"x"}
    new = FakeHub(refusal(RepositoryNotFoundError))
    assert hub.upload("me/m", files, private=True, message="m2", api=new) == "https://hub/me/m/commit/1"
    assert new.made == {"me/m": True} and new.sent == [("me/m", ["config.json", "README.md"], "m2")]
    for is_private, wanted in ((True, True), (True, False), (False, False)):
        there = FakeHub(is_private)
        hub.upload("me/m", files, private=wanted, message="m2", api=there)
        assert len(there.sent) == 1 and there.made == {}
    public = FakeHub(False)
    with pytest.raises(UserError, match="exists, and is public; --private no"):
        hub.upload("me/m", files, private=True, message="m2", api=public)
    assert public.sent == []


@pytest.mark.parametrize(
    ("error", "says"),
    [(refusal(status=401), "hf auth login"), (refusal(status=403), "hf auth login"), (refusal(status=500), "refuses")]
    + [
        (OfflineModeIsEnabled("offline"), "unset HF_HUB_OFFLINE"),
        (ConnectionError("down"), "cannot be reached .down."),
    ],
)
def test_what_the_hub_says_is_one_message(error, says):
    with pytest.raises(UserError, match=rf"^--push_to_hub me/m: .*{says}"):
        hub.upload("me/m", {"README.md": b"x"}, private=True, message="", api=FakeHub(error))


@pytest.mark.parametrize("repo", ["m2", "a/b/c", "a b/c", "../x", "me/m--2"])
def test_a_name_that_is_no_repository_is_refused(repo):
    with pytest.raises(UserError, match="--push_to_hub"):
        hub.check_repo(repo)

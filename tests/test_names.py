"""Names: a name beats a file that happens to lie here, a stale entry breaks only itself, an unknown name meets the
nearest ones, and a model is fetched from the hub exactly when it is not whole on disk."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from cream.cli import names
from cream.errors import UserError

KNOWN = {"tiny_sft": "localdata/tiny/sft.json", "gsm8k_test": "localdata/gsm8k/test.json"}


@pytest.fixture
def registry(tmp_path):
    return tmp_path / "checkpoint.json"


def test_a_checkpoint_is_a_folder_or_a_registered_name(tmp_path, registry, repo):
    (tmp_path / "run").mkdir()
    names.register(registry, "m1", tmp_path / "run")
    names.register(registry, "here", repo / "cream")
    assert names.checkpoint("m1", registry) == tmp_path / "run" == names.checkpoint(str(tmp_path / "run"), registry)
    assert json.loads(registry.read_text())["here"] == "cream"  # relative to the repository, which may move
    assert names.checkpoint("here", registry) == repo / "cream"


def test_a_link_is_registered_as_itself(tmp_path, registry):
    """checkpoint-last is a link to the newest checkpoint; the name follows it."""
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-last").symlink_to("checkpoint-3")
    names.register(registry, "m1", tmp_path / "checkpoint-last")
    assert names.checkpoint("m1", registry).name == "checkpoint-last"


@pytest.mark.parametrize(
    "checkpoint, label",
    [
        (None, "none"),
        ("m1", "m1"),
        ("outputs/run/checkpoint-last", "run-checkpoint-last"),
        ("outputs/" + "r" * 48 + "/checkpoint-7", "r" * 48 + "-checkpoint-7"),
        ("x" * 200, "x" * 24 + "-50ef124f"),
    ],
)
def test_a_checkpoint_in_the_name_of_an_output(checkpoint, label):
    assert names.label(checkpoint) == label


def test_labels_do_not_grow_with_the_rounds():
    """A run's name has the label of its start in it: after many rounds a file could not be called so."""
    seen, label = set(), "m1"
    for t in range(12):
        label = names.label(f"outputs/dpo/results-ckpt_{label}-consistency_avg-{t:08x}/checkpoint-last")
        seen.add(label)
    assert len(seen) == 12 and max(map(len, seen)) < 64


@pytest.mark.parametrize(
    "name, how",
    [
        ("gsm8k_test", "`python prepare_data.py build gsm8k` makes it"),
        ("ARC_Easy_train", "build arc_easy`"),
        ("all_test", "build all`"),
        ("prompt_2", "build oasst1`"),
        ("oasst_sft", "build oasst1`"),
        ("tiny_test", "does not exist; put the data there"),
        ("dpo_1", "does not exist; put the data there"),
    ],
)
def test_a_data_set_that_is_not_there(name, how):
    assert how in str(names.missing_data(name, Path("localdata/x.json")))


def test_a_path_of_data_that_is_not_there(tmp_path, registry, monkeypatch):
    """One line, without the names of data sets; with the command for what is built into a folder of localdata."""
    monkeypatch.setattr(names, "ROOT", tmp_path)  # not where somebody may have built them
    monkeypatch.chdir(tmp_path)
    build = "`python prepare_data.py build all --output_dir {}localdata/small` makes it, with --task_limit N"
    for path, problem in (
        ("mine/prompt.1.json", "mine/prompt.1.json: no such file"),
        ("localdata/small/prompt.1.json", f"localdata/small/prompt.1.json: no such file; {build.format('')}"),
        (f"{tmp_path}/localdata/small/all_test.json", f"no such file; {build.format(f'{tmp_path}/')}"),
        (f"{tmp_path}/localdata/small/mine.json", "mine.json: no such file"),
        (str(tmp_path), f"{tmp_path}: expected a file, found a folder"),
    ):
        with pytest.raises(UserError) as caught:
            names.dataset(path, KNOWN, registry)
        message = str(caught.value)
        assert message.startswith("--name ") and problem in message and "gsm8k_test" not in message
        assert ("build all" in message) == ("build all" in problem)


def test_a_stale_entry_breaks_only_itself(tmp_path, registry):
    (tmp_path / "run").mkdir()
    registry.write_text(json.dumps({"gone": str(tmp_path / "gone"), "m1": str(tmp_path / "run")}))
    assert names.checkpoint("m1", registry) == tmp_path / "run"
    with pytest.raises(UserError, match="--ref_model_ckpt gone"):
        names.checkpoint("gone", registry, "--ref_model_ckpt")


def test_an_unknown_name_meets_the_nearest(tmp_path, registry):
    registry.write_text(json.dumps({"llama3_sft": "x"}))
    with pytest.raises(UserError, match="--checkpoint lama3_sft.*llama3_sft"):
        names.checkpoint("lama3_sft", registry)
    with pytest.raises(UserError, match="--name gsm8k_tset.*gsm8k_test"):
        names.dataset("gsm8k_tset", KNOWN, registry)
    with pytest.raises(UserError, match="--model lama3.*llama3"):
        names.model("lama3", {"llama3": "meta-llama/Meta-Llama-3-8B-Instruct"})


def test_a_dataset_is_a_file_a_builtin_or_registered(tmp_path, registry, repo):
    mine = tmp_path / "mine.jsonl"
    mine.touch()
    names.register(registry, "pairs_1", mine)
    assert names.dataset(str(mine), KNOWN, registry) == mine == names.dataset("pairs_1", KNOWN, registry)
    assert names.dataset("TINY_sft", KNOWN, registry) == repo / "localdata/tiny/sft.json"


def test_a_name_wins_over_what_lies_here_unless_it_is_spelled_as_a_path(tmp_path, registry, repo, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("m1", "tiny", "mine", "registered"):
        Path(folder).mkdir()
    for file in ("tiny_sft", "pairs", "pairs.json", "own"):
        Path(file).touch()
    names.register(registry, "m1", tmp_path / "registered")
    assert names.checkpoint("m1", registry) == tmp_path / "registered"
    assert [names.checkpoint(name, registry) for name in ("./m1", "mine")] == [Path("m1"), Path("mine")]

    known = {"tiny": "assets/tiny_m0"}
    assert names.model("Tiny", known) == names.model("tiny", known) == repo / "assets/tiny_m0"
    assert [names.model(name, known) for name in ("./tiny", "mine")] == [Path("tiny"), Path("mine")]

    datasets = tmp_path / "dataset.json"
    names.register(datasets, "pairs", tmp_path / "registered.json")
    names.register(datasets, "pairs.json", tmp_path / "other.json")
    assert names.dataset("tiny_sft", KNOWN, datasets) == repo / "localdata/tiny/sft.json"
    assert names.dataset("pairs", KNOWN, datasets) == tmp_path / "registered.json"
    for path in ("./tiny_sft", "pairs.json", "own"):
        assert names.dataset(path, KNOWN, datasets) == Path(path)


def test_a_path_needs_no_registry(tmp_path, registry):
    registry.write_text("{")
    assert names.checkpoint(str(tmp_path), registry) == tmp_path
    assert names.dataset(str(registry), KNOWN, registry) == registry


def test_a_name_is_not_taken_twice(tmp_path, registry):
    names.register(registry, "m1", tmp_path / "a")
    names.register(registry, "m1", tmp_path / "a")  # the same again is no change
    with pytest.raises(UserError, match="--register m1"):
        names.register(registry, "m1", tmp_path / "b")
    names.register(registry, "m1", tmp_path / "b", overwrite=True)
    assert names.read_registry(registry) == {"m1": str(tmp_path / "b")}


def test_a_built_in_name_is_taken_where_its_file_is(tmp_path, registry, repo):
    known = {"here": str(repo / "README.md"), "not_here": str(tmp_path / "absent")}
    with pytest.raises(UserError, match="--register Here: is the built-in name of .*README.md.*--overwrite"):
        names.check_free(registry, "Here", tmp_path / "a", known=known)
    names.check_free(registry, "Here", tmp_path / "a", known=known, overwrite=True)
    names.check_free(registry, "not_here", tmp_path / "a", known=known)
    names.check_free(registry, "here", repo / "README.md", known=known)  # what it stands for
    names.register(registry, "here", tmp_path / "a")
    names.check_free(registry, "here", tmp_path / "a", known=known)  # pointed elsewhere before


@pytest.mark.parametrize("name", ["", "none", "None", "a/b", "two words", ".", "..", "-x"])
def test_what_cannot_be_a_name(tmp_path, registry, name):
    with pytest.raises(UserError, match="--register"):
        names.register(registry, name, tmp_path)
    assert not registry.exists()


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', "{"])
def test_a_broken_registry_is_named(tmp_path, registry, content):
    registry.write_text(content)
    with pytest.raises(UserError, match=registry.name):
        names.checkpoint("m1", registry)
    with pytest.raises(UserError, match=registry.name):  # before any work
        names.check_free(registry, "m1", tmp_path, overwrite=True)


@pytest.mark.slow
def test_many_register_at_once(tmp_path, registry):
    wanted = {f"m{i}": tmp_path / str(i) for i in range(16)}
    threads = [threading.Thread(target=names.register, args=(registry, *entry)) for entry in wanted.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names.read_registry(registry) == {name: str(path) for name, path in wanted.items()}


REGISTER = """
import os
import sys
from pathlib import Path
from cream.cli import names
registry, folder, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
for i in range(count):
    if not os.fork():
        sys.stdin.readline()
        names.register(registry, f"m{i}", folder / str(i))
        os._exit(0)
print(flush=True)
sys.exit(any(os.wait()[1] for _ in range(count)))
"""


@pytest.mark.slow
def test_fifty_processes_register_at_once(tmp_path, registry, repo):
    """None is lost, and whoever reads the file meanwhile finds it whole."""
    wanted = {f"m{i}": str(tmp_path / str(i)) for i in range(50)}
    names.register(registry, "earlier", tmp_path)
    argv = [sys.executable, "-c", REGISTER, registry, tmp_path, "50"]
    process = subprocess.Popen(argv, cwd=repo, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdin.close()  # all have been waiting for this
    seen = set()
    while process.poll() is None:
        found = json.loads(registry.read_text())
        assert found.keys() >= {"earlier"} and wanted | {"earlier": str(tmp_path)} == wanted | found
        seen.add(len(found))
    assert process.returncode == 0
    assert names.read_registry(registry) == wanted | {"earlier": str(tmp_path)}
    assert seen <= set(range(1, 52)) and len(seen) > 1
    assert {path.name for path in tmp_path.iterdir()} <= {registry.name, f".{registry.name}.lock"}


def test_a_model_is_a_folder_a_builtin_or_a_hub_id(tmp_path, repo):
    assert names.model(str(tmp_path), {}) == tmp_path
    assert names.model("TINY", {"tiny": "cream/tiny"}) == repo / "cream/tiny"
    with pytest.raises(UserError, match="--model nobody/no-such-model.*HF_HUB_OFFLINE"):
        names.model("nobody/no-such-model", {})


@pytest.mark.parametrize("name", ["../no-such-model", "nobody/no--such-model"])
def test_what_cannot_be_a_hub_id(name):
    with pytest.raises(UserError, match="neither a folder nor a Hugging Face id"):
        names.model(name, {})


# The hub --------------------------------------------------------------------------------------------------------------

COMMIT = "0123456789" * 4
SHARDS = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
FILES = {"config.json": b"{}", "tokenizer.json": b"{}", "merges.txt": b"a b", "vocab.tiktoken": b"YQ== 0"}
FILES |= {shard: save({tensor: np.zeros(3)}) for tensor, shard in SHARDS.items()}
FILES["model.safetensors.index.json"] = json.dumps({"weight_map": SHARDS}).encode()


class Hub(BaseHTTPRequestHandler):
    """What of the hub's interface a download takes, for one model, me/m."""

    def do_GET(self, body=True):
        path = self.path.partition("?")[0]
        name = path.removeprefix(f"/me/m/resolve/{COMMIT}/")
        if name in FILES:
            content = FILES[name]
        elif path == f"/api/models/me/m/tree/{COMMIT}":
            rows = ({"type": "file", "path": name, "size": len(FILES[name]), "oid": name} for name in FILES)
            content = json.dumps(list(rows)).encode()
        else:
            content = json.dumps({"id": "me/m", "sha": COMMIT, "siblings": []}).encode()
        self.send_response(200)
        for key, value in {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Content-Length": len(content)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(content if body else b"")

    def do_HEAD(self):
        self.do_GET(body=False)

    def log_message(self, *_):
        pass


@pytest.fixture
def ask(tmp_path, repo):
    """A function: which files of me/m are in the cache, whether there is a network -> the process that asked for it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(cached, *, offline):
        cache = tmp_path / "hub/models--me--m"
        for name in cached:
            for path, content in (("refs/main", COMMIT.encode()), (f"snapshots/{COMMIT}/{name}", FILES[name])):
                (cache / path).parent.mkdir(parents=True, exist_ok=True)
                (cache / path).write_bytes(content)
        hub = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "*"}
        code = "from cream.cli import names; print(names.model('me/m', {}))"
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            cwd=repo,
            env=os.environ | hub | {"HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1"},
        )

    yield ask
    server.shutdown()
    server.server_close()


PARTS = {
    "nothing": [],
    "no weights": ["config.json", "tokenizer.json"],
    "one shard": [name for name in FILES if name != SHARDS["b"]],
}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_what_is_not_whole_is_fetched(ask, part):
    asked = ask(PARTS[part], offline=False)
    assert asked.returncode == 0, asked.stderr
    folder = Path(asked.stdout.strip())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert ask([], offline=True).stdout == asked.stdout  # now it is whole


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_what_is_not_whole_cannot_be_used_offline(ask, part):
    asked = ask(PARTS[part], offline=True)
    assert asked.stdout == ""
    assert "UserError: --model me/m: " in asked.stderr and "unset HF_HUB_OFFLINE" in asked.stderr


def test_a_registry_that_is_a_link_stays_one(tmp_path):
    """Clones that share one see each other's names."""
    shared, link = tmp_path / "shared.json", tmp_path / "clone" / "checkpoint.json"
    link.parent.mkdir()
    link.symlink_to(shared)
    names.register(link, "a", tmp_path / "x")
    names.register(link, "b", tmp_path / "y")
    assert link.is_symlink() and set(names.read_registry(shared)) == {"a", "b"}

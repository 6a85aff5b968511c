"""Real command lines without their start: a copy of the repository, and one process that forks a stage per command.

`python train.py …` spends four seconds on imports. Run as a script, this module imports the heavy libraries once, and
then runs every command that it is given in a fork of itself, so that each still has a process, files and an exit code
of its own. A fork takes the project from the workspace it runs in, unless the process is that of one workspace alone.
Each worker of the suite has such a process, itself a fork of one that all share: it listens at a door, a Unix socket.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO

LIBRARIES = ("torch", "transformers.models.llama.modeling_llama", "accelerate", "peft", "deepspeed", "datasets")
LIBRARIES += ("deepspeed.runtime.zero.muon.muon_optimizer",)  # imports torch's compiler, for every ZeRO run
CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.symlink"}  # and "open", to write
PARTS = ("*.py", "cream", "configs", "localdata/tiny", "assets", "scripts")
REGISTRIES = ("checkpoint.json", "dataset.json")  # what a user of this clone has registered is no part of a fresh one
REAL = "smollm2"  # nor is what `make real` makes, half a GB
LOOP = "outputs/loop"  # one round of the tiny loop, which the fixture `looped` has in its workspace
M1, M2 = (f"--checkpoint {LOOP}/m{t}/checkpoint-last" for t in (1, 2))
ON = "--device cpu --model tiny"
ROUND = [
    f"train.py {ON} --name tiny_sft --limit_size 32 --epoch 2 --train_bsz 8 --lr 3e-4 --output_dir {LOOP}/m1",
    f"infer.py {ON} {M1} --name tiny_prompt_1 --limit_size 24 --gen_n 4 --gen_max_tokens 48 --gen_temperature 1.0 "
    f"--output_dir {LOOP}/samples.jsonl",
    f"rewarding.py {ON} --input_file {LOOP}/samples.jsonl {M1} --ref_model_ckpt none --output {LOOP}/current.jsonl",
    f"rewarding.py {ON} --input_file {LOOP}/samples.jsonl --reward likelihood --checkpoint none "
    f"--output {LOOP}/previous.jsonl",
    f"cal_consistency.py --file1 {LOOP}/current.jsonl --file2 {LOOP}/previous.jsonl --output {LOOP}/pairs.json",
    f"train.py {ON} {M1} --name {LOOP}/pairs.json --train_bsz 8 --lr 3e-4 --output_dir {LOOP}/m2",
    *(
        f"infer.py {ON} {model} --mode evaluation --name tiny_test --limit_size 60 --gen_max_tokens 48 "
        f"--output_dir {LOOP}/{name}.json"
        for name, model in (("m0", "--checkpoint none"), ("m1", M1), ("m2", M2))
    ),
]


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code (-9 after SIGKILL), what it printed on stdout and on stderr, and, one a line,
    the files that it was about to change, if it was started to be killed at one of them."""

    code: int
    out: str
    err: str
    changes: str = ""

    def commands(self) -> list[str]:
        """The commands of next stages that it printed."""
        return [line.strip() for line in self.out.splitlines() if line.startswith("  python ")]


class Stages:
    """The process that runs stages in forks of itself."""

    def __init__(self, door: Path, *libraries: str, project: Path | None = None, **variables: str):
        """A fork of the process that listens at `door`, or starts there with `libraries`. `project`: of the one
        workspace that it is for, whose modules it imports. `variables`: of its environment."""
        from filelock import FileLock

        from cream.cli import screen

        environment = os.environ | screen.LIBRARIES | {"DS_ACCELERATOR": "cpu"} | variables  # read at import
        self.first, self.link = None, socket.socket(socket.AF_UNIX)
        with FileLock(f"{door}.lock"):
            try:
                self.link.connect(_name(door))
            except ConnectionRefusedError:
                argv = [sys.executable, __file__, str(door), *LIBRARIES, *libraries]
                own = environment | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # large pages: quick to fork
                self.first = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=own)
                self.first.stdout.readline()
                self.link.connect(_name(door))
        self.answers = self.link.makefile()
        self._ask([environment, str(project) if project else None])

    def run(self, folder: Path, argv: list[str]) -> Done:
        """`python argv…` in a folder."""
        os.close(self.start(folder, argv))
        return self.end()

    def record(self, folder: Path, argv: list[str], watched: list[str], store: Path) -> Done:
        """The same, with every state of `watched`, patterns in the folder, recorded to `store` (tests/snapshots.py)."""
        os.close(self.start(folder, argv, record=[watched, str(store)]))
        return self.end()

    def start(self, folder: Path, argv: list[str], fatal: int | None = None, record: list | None = None) -> int:
        """The same, not waited for; returns a pidfd. It kills itself before its `fatal`-th change of a file, 0: never
        (SIGKILL), and lists them."""
        self._ask([str(folder), argv, fatal, record])
        return os.pidfd_open(int(self.answers.readline()))

    @contextlib.contextmanager
    def together(self):
        """What is run within it has one process, one command after the other: for hundreds of them."""
        self._switch()
        try:
            yield
        finally:
            self._switch()

    def _switch(self) -> None:
        self._ask(None)
        self.answers.readline()

    def _ask(self, request: object) -> None:
        self.link.sendall(json.dumps(request).encode() + b"\n")

    def end(self) -> Done:
        """How the command that was started last ended."""
        return Done(*json.loads(self.answers.readline()))

    def close(self) -> None:
        """End the process; the first one ends with the last of its forks."""
        self.link.shutdown(socket.SHUT_RDWR)
        self.answers.close()
        self.link.close()
        if self.first:
            self.first.wait()
            self.first.stdout.close()


class Workspace:
    """A fresh clone: what the repository tracks, without its tests, in a folder of its own; `loop`: another one, whose
    round (ROUND) it has as well."""

    def __init__(self, folder: Path, repo: Path, stages: Stages | None, loop: Path | None = None):
        self.folder, self.stages = folder, stages
        ignore = shutil.ignore_patterns(".*", "*.pyc.*", *REGISTRIES, REAL)  # and what is being compiled
        for source in (path for part in PARTS for path in repo.glob(part)):
            target = folder / source.relative_to(repo)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target, ignore=ignore) if source.is_dir() else shutil.copy2(source, target)
        if loop:
            shutil.copytree(loop / LOOP, folder / LOOP, symlinks=True, copy_function=_link)

    def run(self, command: str, code: int = 0) -> Done:
        """A command line, "train.py --model tiny …" (a leading "python" is skipped); it must end with `code`."""
        done = self.stages.run(self.folder, self.argv(command))
        assert done.code == code, f"{command}\nended with {done.code}, not {code}\n{done.out}\n{done.err}"
        return done

    def refused(self, command: str) -> str:
        """The message of a command that must end with exit code 2, no traceback, and nothing written or changed."""
        before = self.state()
        done = self.run(command, code=2)
        assert "Traceback" not in done.err, done.err
        assert self.state() == before, f"{command}\nchanged files"
        return done.err

    def start(self, command: str) -> subprocess.Popen:
        """The same in a process of its own, not waited for."""
        pipe = subprocess.PIPE
        argv = [sys.executable, *self.argv(command)]
        return subprocess.Popen(argv, cwd=self.folder, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def spawn(self, command: str) -> str:
        """The same, waited for; it must end with 0. For stages that start processes or threads of their own."""
        process = self.start(command)
        out, _ = process.communicate()
        assert process.returncode == 0, f"{command}\nended with {process.returncode}\n{out}"
        return out

    def argv(self, command: str) -> list[str]:
        """The words of a command line after `python`."""
        return shlex.split(command.removeprefix("python "))

    def state(self) -> dict[str, int]:
        """Modification time in ns of every file but locks that a stage could write; 0 of folders, where locks stand."""
        roots = [self.folder / name for name in ("outputs", "configs", "localdata")]
        paths = [path for root in roots for path in root.rglob("*") if path.suffix != ".lock"]
        return {str(path): 0 if path.is_dir() else path.lstat().st_mtime_ns for path in paths}

    def read(self, path: str) -> object:
        """What a JSON file of the workspace holds."""
        return json.loads((self.folder / path).read_text())

    def write(self, path: str, value: object) -> None:
        """A JSON file of the workspace."""
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(json.dumps(value))

    def shorten(self, path: str, count: int) -> None:
        """Leave the first records of a data file only, so that a command without a limit is quick."""
        records = self.read(path)
        self.write(path, records[:count] if isinstance(records, list) else dict(list(records.items())[:count]))


def _link(source: str, target: str) -> None:
    """A link to weights, which no stage changes in place, and a copy of any other file, whose times are kept."""
    (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)


def _name(door: Path | str) -> str:
    """The socket's name in Linux's abstract namespace: a path would be limited to 107 characters, and that of a
    temporary folder may have more."""
    return f"\0{str(door)[-100:]}"


def listen(door: str, libraries: list[str]) -> None:
    """Import the libraries, then answer whoever comes to the door in a fork of this process; until all have gone."""
    sys.modules["sklearn"] = None  # as in every stage (cream/cli/console.py)
    gc.disable()  # nothing that imports make is garbage
    for name in libraries:
        if importlib.util.find_spec(name):
            with contextlib.redirect_stdout(sys.stderr):
                importlib.import_module(name)
    conversions = sys.modules["transformers.conversion_mapping"]
    conversions.get_checkpoint_conversion_mapping("llama")  # makes 700 patterns, once for all that load a model
    gc.freeze()  # nor need forks look through it
    gc.enable()
    with socket.socket(socket.AF_UNIX) as listener, contextlib.suppress(ChildProcessError):
        listener.bind(_name(door))
        listener.listen()
        print(flush=True)
        os.dup2(2, 1)
        while True:
            with contextlib.suppress(TimeoutError):
                link = listener.accept()[0]
                if not os.fork():
                    listener.close()
                    serve(link)
                    os._exit(0)
                link.close()
            listener.settimeout(1)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def serve(link: socket.socket) -> None:
    """Answer each line of a connection, [folder, argv, fatal, record], with a line at its start, its process, and one
    at its end, the fields of Done. Between two lines "null", each answered with an empty one, one fork answers all. The
    very first line has the environment, and the folder of a project to import."""
    link.settimeout(None)
    requests, answers = map(json.loads, link.makefile()), link.makefile("w")
    environment, project = next(requests)
    os.environ.clear()
    os.environ |= environment
    if project:
        sys.path.insert(1, project)
        for name in modules(Path(project)):
            importlib.import_module(name)
        gc.freeze()
    for request in requests:
        _reap()
        if request is None:
            if not (child := os.fork()):
                _answer_all(requests, answers)
            os.waitpid(child, 0)
            print(file=answers, flush=True)
            continue
        folder, argv, fatal, record = request
        streams = [os.memfd_create(name) for name in ("stdout", "stderr", "changes")]
        child = os.fork()
        if not child:
            _stage(folder, argv, fatal, record, *streams)
        print(child, file=answers, flush=True)
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        print(json.dumps([code, *map(_text, streams)]), file=answers, flush=True)
    _reap()


def _reap() -> None:
    """The command that ended last: until now its number stood for it alone."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def modules(project: Path) -> list[str]:
    """The names of a project's modules."""
    paths = [*project.glob("*.py"), *project.glob("cream/**/*.py")]
    names = (".".join(path.relative_to(project).with_suffix("").parts) for path in paths)
    return sorted(name.removesuffix(".__init__") for name in names)


def _answer_all(requests: Iterator, answers: TextIO) -> NoReturn:
    """Run commands in this process, up to the end of requests or a null."""
    print(file=answers, flush=True)
    for folder, argv, _, _ in iter(lambda: next(requests, None), None):
        streams = [os.memfd_create(name) for name in ("stdout", "stderr", "changes")]
        print(os.getpid(), file=answers, flush=True)
        _redirect(*streams[:2])
        os.chdir(folder)
        code = _run(argv)
        print(json.dumps([code, *map(_text, streams)]), file=answers, flush=True)
    os._exit(0)


def _text(stream: int) -> str:
    with open(stream, "rb") as file:
        file.seek(0)
        return file.read().decode(errors="replace")


def _watch(fatal: int, changes: int) -> None:
    """List each change of a file before it is made; end this process before the `fatal`-th."""
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event not in CHANGES and not (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = str(args[0])
        if "__pycache__" in path or os.path.isabs(path) and not path.startswith(os.getcwd()):
            return
        os.write(changes, f"{event} {path}\n".encode())
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _stage(folder: str, argv: list[str], fatal: int | None, record: list | None, *streams: int) -> None:
    """Become `python argv…` in a folder; does not return."""
    out, err, changes = streams
    if fatal is not None:
        _watch(fatal, changes)
    if record is not None:
        import snapshots

        snapshots.record(Path(folder), record[0], Path(record[1]))
    _redirect(out, err)
    os.chdir(folder)
    become(argv)


def _redirect(out: int, err: int) -> None:
    for stream, target in ((out, 1), (err, 2)):
        os.dup2(stream, target)


def become(argv: list[str], prepare: Callable[[], object] = lambda: None) -> NoReturn:
    """Go on as `python argv…` in this folder, after prepare()."""
    os._exit(_run(argv, prepare))


def _run(argv: list[str], prepare: Callable[[], object] = lambda: None) -> int:
    """The exit code of `python argv…` in this folder and process, after prepare()."""
    try:
        prepare()
        sys.path[0], sys.argv = os.path.dirname(os.path.abspath(argv[0])), argv
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    listen(sys.argv[1], sys.argv[2:])
    os._exit(0)  # without what some libraries print when they are unloaded

"""A function over items on one device, on several, or on all of a cluster.

One device works in this process. Several are replicas under Ray Data, each with a model of its own: Ray hands the items
out as replicas are free, holds the input back meanwhile, and gives what a lost replica or node had in hand to another.
Only the items and results in flight are in memory, wherever the input is long.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import socket
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

from cream.cli import interrupts
from cream.errors import UserError
from cream.files.folders import REMOTE_CODE

BATCH = 256  # items that a replica takes at a time, computed again if it is lost
CLIENT = "ray://"
HEAD_FAILED = ("Starting Ray client server failed", "Initialization failure from server")
ATTEMPTS = 3  # to join a cluster
RESTARTS = 5  # of a replica that dies, alone or with its node; more often is not an accident
ROW = 16  # items, or results, that go through Ray together: for each such row it takes some hundredths of a second


class Worker(Protocol):
    """Has a model."""

    def __call__(self, items: Iterable) -> Iterator[tuple[str, object]]:
        """(item.uuid, result) for each item, in any order; items are taken as they are needed."""

    def close(self) -> None:
        """Give the device back."""


@dataclass(frozen=True)
class Pool:
    """Where to work: `replicas`, each on `group` devices of a `kind`, cpu or cuda, that hold one model together; of
    this machine, or of the Ray cluster at `address`."""

    kind: str
    replicas: int = 1
    group: int = 1
    address: str | None = None

    @classmethod
    def of_cluster(cls, address: str, kind: str, replicas: int | None, group: int) -> Pool:
        """On a running cluster, which this joins. kind auto: cuda where it has GPUs. replicas None: as many as its GPUs
        hold, or one a node of CPUs. Raises UserError where there is no such cluster, or it has too few devices."""
        if address.startswith(CLIENT) and (Path.home() / ".ray" / "auth_token").exists():
            os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray itself does so for all but its client
        import ray

        _join(address)
        have = ray.cluster_resources()
        if kind == "auto":
            kind = "cuda" if have.get("GPU") else "cpu"
        if kind == "cuda":
            most = usual = sum(int(node["Resources"].get("GPU", 0)) // group for node in ray.nodes() if node["Alive"])
        else:
            most, usual = int(have.get("CPU", 0)), sum(node["Alive"] for node in ray.nodes())
        if not 0 < (replicas or usual) <= most:
            asked = f"--num_replicas {replicas}" if replicas else "one replica"
            of = f" of --tensor_parallel_size {group}, each on one node" if group > 1 else ""
            raise UserError(
                f"--ray_address {address}: the cluster has {kind} devices for {most} replicas{of}, not for {asked}"
            )
        return cls(kind, replicas or usual, group, address)

    @property
    def alone(self) -> bool:
        """Whether this process does the work, without Ray."""
        return self.address is None and self.replicas == 1

    def batch(self, count: int) -> int:
        """Items that a replica takes at a time when there are `count`."""
        size = BATCH if self.alone else max(1, min(BATCH, -(-count // (2 * self.replicas))))
        return size if size < ROW else size // ROW * ROW

    def run(
        self, source: Callable[[], Iterable], make: Callable[[str], Worker], count: int
    ) -> Iterator[tuple[str, object]]:
        """(item.uuid, result) for every item of `source()`, about `count`, in any order, as they are finished.

        A signal ends it by Interrupted, after what this process has in hand, or the next result of another.

        `source` and `make` are pickled when there are several replicas, and so are items and results; make(kind) is
        then called in each replica. Raises what a worker raises, a UserError with the node's name.
        """
        if not self.alone:
            work = _through_client if self.address and self.address.startswith(CLIENT) else _on_ray
            with interrupts.deferred():
                for result in work(self, source, make, self.batch(count)):
                    yield result
                    interrupts.check()
            return
        worker = make(self.kind)
        try:
            with interrupts.deferred():
                yield from worker(interrupts.until_interrupted(source()))
            interrupts.check()
        finally:
            worker.close()


class Replica:
    """A worker as Ray Data calls it: on batches of pickled items. Results leave in the order of the items, so many at a
    time, so that a batch that is done again, of which some results have been taken already, gives the others."""

    def __init__(self, make: Callable[[str], Worker], kind: str):
        self.failed = None
        try:
            self.worker = make(kind)
        except Exception as error:  # Ray would start the replica again, for ever; the first call raises it
            self.failed = error

    def __call__(self, batch: dict) -> Iterator[dict]:
        """{"items": [bytes]} -> {"results": [bytes]}, each of ROW results, the last of what is left."""
        try:
            if self.failed is not None:
                raise self.failed
            items = [item for row in batch["items"] for item in pickle.loads(row)]
            results: dict[str, object] = {}
            todo = iter([item.uuid for item in items])
            wanted, ready = next(todo), []
            for key, result in self.worker(items):
                results[key] = result
                while wanted in results:
                    ready.append((wanted, results.pop(wanted)))
                    wanted = next(todo, None)
                    if len(ready) == ROW or wanted is None:
                        yield {"results": [pickle.dumps(ready)]}
                        ready = []
        except UserError as error:
            raise UserError(f"node {socket.gethostname()}: {error}") from None


class Driver:
    """Ray Data's driver inside a cluster: it cannot work through a client (ray://), which asks this actor instead."""

    def __init__(self, *work):
        self.results = _on_ray(*work)

    def some(self) -> list[tuple[str, object]]:
        """The next results; [] after the last."""
        return list(islice(self.results, ROW))


def _through_client(*work) -> Iterator[tuple[str, object]]:
    import ray
    from ray.exceptions import RayError, RayTaskError

    driver = ray.remote(num_cpus=0)(Driver).remote(*work)
    ahead = driver.some.remote()
    try:
        while results := ray.get(ahead):
            ahead = driver.some.remote()
            yield from results
    except RayTaskError as error:
        raise _mistake(error) or error from None
    except RayError as error:
        raise UserError(f"Ray: {error}") from error
    finally:
        ray.kill(driver)


def _mistake(error) -> UserError | None:
    """The user's mistake that a task of Ray ended with, if it was one, without Ray's advice on retries."""
    return UserError(str(error.cause).partition("\nFailed to apply")[0]) if isinstance(error.cause, UserError) else None


def _on_ray(pool: Pool, source, make, batch: int) -> Iterator[tuple[str, object]]:
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.exceptions import RayActorError, RayError, RayTaskError
    from ray.util.annotations import RayDeprecationWarning

    for name in ("ray", "ray.data"):  # which importing has set up; what ends the work is raised as well
        logging.getLogger(name).setLevel(logging.CRITICAL)
    _join(pool.address)
    gc.collect()  # replicas of a pass that failed hold their devices until nothing refers to them
    try:
        context = DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.target_max_block_size = 1  # a block, which is what moves, holds one row
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}  # which has the input's file
        share = {"num_gpus": pool.group}  # what Ray reserves for a replica; of CPUs an even part, and as many threads
        if pool.kind == "cpu":
            share = {"num_cpus": max(1, int(ray.cluster_resources()["CPU"]) // pool.replicas)}
        rows = _datasource(source, min(batch, ROW))
        items = ray.data.read_datasource(rows, override_num_blocks=1, num_cpus=0, label_selector=here)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RayDeprecationWarning)  # of max_restarts, which has no successor yet
            results = items.map_batches(
                Replica,
                batch_size=max(1, batch // ROW),
                compute=ActorPoolStrategy(size=pool.replicas, max_tasks_in_flight_per_actor=2),
                fn_constructor_args=(make, pool.kind),
                max_restarts=RESTARTS,
                **share,
            )
        taken: set[str] = set()
        for row in results.iter_rows():
            for name, result in pickle.loads(row["results"]):
                if name not in taken:
                    taken.add(name)
                    yield name, result
    except RayTaskError as error:
        raise _mistake(error) or error from None
    except RayActorError:
        raise UserError(
            f"a replica died {RESTARTS + 1} times, often for lack of memory; the same command resumes from here"
        ) from None
    except RayError as error:
        raise UserError(f"Ray: {error}") from error


def _join(address: str | None) -> None:
    """Connect to a cluster, or start one on this machine (None), unless that is done. It lasts as long as this process:
    the next pass finds it."""
    import ray

    if ray.is_initialized():
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    variables = {REMOTE_CODE: os.environ.get(REMOTE_CODE, "no")}
    workers = {"env_vars": variables, "worker_process_setup_hook": "cream.cli.imports.import_quickly"}
    if address is None:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # replicas import what this process does
        here = {"_node_ip_address": "127.0.0.1"}  # its ports are open to this machine alone
        ray.init("local", include_dashboard=False, runtime_env=workers, **here, **quiet)
        interrupts.listen()  # Ray puts a handler of its own in place
        return
    package = str(Path(__file__).resolve().parents[1])
    for attempt in range(ATTEMPTS):
        try:
            ray.init(address, runtime_env={"py_modules": [package], **workers}, **quiet)
            break
        except (ConnectionError, ValueError) as error:
            # of a client (ray://): the head starts a process for it, which at times fails or comes too late
            if not any(sign in str(error) for sign in HEAD_FAILED) or attempt == ATTEMPTS - 1:
                raise UserError(f"--ray_address {address}: no Ray cluster answers there: {error}") from None
    interrupts.listen()


def _datasource(source: Callable[[], Iterable], size: int):
    import pyarrow
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    def blocks():
        items = iter(source())
        while row := list(islice(items, size)):
            yield pyarrow.table({"items": [pickle.dumps(row)]})

    class Items(Datasource):
        """What `source` gives, `size` items a row, read on the node that asked, as it is needed."""

        def estimate_inmemory_data_size(self):
            return None

        def get_read_tasks(self, parallelism, per_task_row_limit=None, data_context=None):
            return [ReadTask(blocks, BlockMetadata(None, None, None, None))]

    return Items()

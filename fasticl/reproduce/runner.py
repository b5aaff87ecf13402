"""Runs independent jobs side by side, keeps every finished result on disk, and goes on from there next time."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import torch


@dataclass(frozen=True)
class Job:
    """One call, ``function(**arguments)``, whose result is JSON's.

    Attributes:
        function: ``"module:name"``, importable by a worker.
        arguments: keyword arguments, JSON's.
        places: further ones, which say where to keep what, and change nothing in the result.
    """

    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    places: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def key(self) -> str:
        """A file name of its own: what a reader recognises, then a hash of function, arguments and the code it runs."""
        name = self.function.rpartition(":")[2]
        said = "-".join(f"{k}{v}" for k, v in sorted(self.arguments.items()) if isinstance(v, (int, float)))
        identity = json.dumps([self.function, self.arguments, _code(self.function)], sort_keys=True)
        return re.sub(r"[^\w.-]", "", f"{name}-{said}")[:60] + "-" + hashlib.sha256(identity.encode()).hexdigest()[:12]

    def __hash__(self) -> int:
        return hash((self.function, json.dumps(self.arguments, sort_keys=True)))


@dataclass(frozen=True)
class Outcome:
    """What became of a job: ``result`` if it returned, else ``error``, what it raised or how its process ended."""

    job: Job
    seconds: float
    result: Any = None
    error: str | None = None


def execute(
    jobs: Sequence[Job],
    folder: Path,
    *,
    workers: int | None = None,
    ray_address: str | None = None,
    finished: Callable[[Outcome], None] = lambda outcome: None,
) -> dict[Job, Outcome]:
    """Runs the jobs that ``folder`` holds no result of, each in a process of its own with one thread.

    A job that raises, or whose process dies, fails alone; it has no file, and is run again next time.

    Args:
        jobs: run in this order; doubles once.
        folder: of ``<key>.json`` files, made if absent.
        workers: processes at a time; None is the number of CPUs that this process may use.
        ray_address: a Ray cluster's address, ``"local"`` or ``"auto"``: jobs then run there, one CPU each.
        finished: called here, with each outcome as it comes; those found on disk come first.

    Raises:
        ImportError: Ray is asked for and missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: dict[Job, Outcome] = {}

    def keep(outcome: Outcome) -> None:
        outcomes[outcome.job] = outcome
        finished(outcome)

    missing = []
    for job in dict.fromkeys(jobs):
        if (found := _read(job, folder)) is not None:
            keep(found)
        else:
            missing.append(job)
    if missing:
        run = _on_ray(missing, ray_address) if ray_address else _in_processes(missing, folder, workers)
        for outcome in run:
            if ray_address and outcome.error is None:
                _write(outcome, folder)
            keep(outcome)
    return {job: outcomes[job] for job in jobs}


def call(function: str, arguments: dict[str, Any]) -> tuple[Any, float]:
    """The result and the seconds it took, on one thread."""
    torch.set_num_threads(1)
    module, _, name = function.partition(":")
    start = time.perf_counter()
    return getattr(import_module(module), name)(**arguments), time.perf_counter() - start


def _code(function: str) -> str:
    """Hash of the function's module and of ``fasticl.icl``: results of other code are not reused."""
    digest = hashlib.sha256()
    module = import_module(function.partition(":")[0])
    files = [Path(module.__file__ or ""), *sorted((Path(__file__).parent.parent / "icl").glob("*.py"))]
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _read(job: Job, folder: Path) -> Outcome | None:
    with suppress(OSError, ValueError, KeyError, TypeError):  # absent, or not whole
        saved = json.loads((folder / f"{job.key}.json").read_text(encoding="utf-8"))
        return Outcome(job, saved["seconds"], saved["result"])
    return None


def _write(outcome: Outcome, folder: Path) -> None:
    """Beside, then renamed: a file that exists is whole."""
    path = folder / f"{outcome.job.key}.json"
    saved = {
        "function": outcome.job.function,
        "arguments": outcome.job.arguments,
        "seconds": outcome.seconds,
        "result": outcome.result,
    }
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(saved) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _work(job: Job, folder: str, connection: Any) -> None:
    """In the worker: writes its own result, so that it is kept even if whoever waits for it is gone."""
    try:
        result, seconds = call(job.function, job.arguments | job.places)
        _write(Outcome(job, seconds, result), Path(folder))
        connection.send(None)
    except Exception as error:  # reported, whatever it is
        connection.send(f"{type(error).__name__}: {error}")


def _in_processes(jobs: Sequence[Job], folder: Path, workers: int | None) -> Iterator[Outcome]:
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A server that has imported torch and has no threads yet forks workers in milliseconds.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([__name__])
    waiting = list(reversed(jobs))
    running: dict[Connection, tuple[Job, BaseProcess, float]] = {}  # by the end of the pipe that we read
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(job, str(folder), theirs), daemon=True)
                process.start()
                theirs.close()  # else its end is never seen
                running[ours] = (job, process, time.perf_counter())
            for connection in cast(list[Connection], wait(list(running))):
                job, process, start = running.pop(connection)
                try:
                    error = connection.recv()
                    process.join()
                except EOFError:
                    process.join()
                    error = f"its process ended with exit code {process.exitcode}"
                found = _read(job, folder) if error is None else None
                yield found or Outcome(job, time.perf_counter() - start, error=error or "its result was not written")
    finally:
        for _, process, _ in running.values():
            process.terminate()


def _on_ray(jobs: Sequence[Job], address: str) -> Iterator[Outcome]:
    try:
        import ray
    except ImportError as error:
        raise ImportError("--ray needs Ray: pip install 'fasticl[ray]'") from error
    started = not ray.is_initialized()
    if started:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    try:
        remote = ray.remote(num_cpus=1, max_retries=2)(call)  # again where a node or a worker is lost
        running = {remote.remote(job.function, job.arguments | job.places): job for job in jobs}
        while running:
            (reference,), _ = ray.wait(list(running), num_returns=1)
            job = running.pop(reference)
            try:
                result, seconds = ray.get(reference)
                yield Outcome(job, seconds, result)
            except ray.exceptions.RayTaskError as error:
                yield Outcome(job, 0.0, error=f"{type(error.cause).__name__}: {error.cause}")
            except ray.exceptions.RayError as error:
                yield Outcome(job, 0.0, error=f"its Ray worker was lost: {type(error).__name__}")
    finally:
        if started:
            ray.shutdown()

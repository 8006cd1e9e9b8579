"""Worker processes that encode documents."""

import contextlib
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from minillm_core.data.documents import Piece
from minillm_core.data.encode import Encoder, Problems, Work, write_blocks
from minillm_core.errors import InputError


class WorkerEndedError(InputError):
    """A worker process ended in the middle of a task."""


Task = tuple[Path, Sequence[Piece]]


def n_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_tasks(work: Work, tasks: Iterable[Task], n_workers: int) -> Iterator[tuple[Task, Problems]]:
    """Encodes every task into the file that it names, and yields the problems of its documents. The order of the tasks
    is lost.

    Not `multiprocessing`: its processes import the program that started them, and outlive it if it is killed.

    Args:
        n_workers: processes; with 1, this process does the work itself.

    Raises:
        InputError: a source cannot be read, or changed since the preparation began.
    """
    if n_workers == 1:
        encoder = Encoder(work)
        for path, pieces in tasks:
            yield (path, pieces), write_blocks(path, encoder.encode(pieces))
        return
    with contextlib.ExitStack() as stack:
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        workers = [stack.enter_context(_Worker(work)) for _ in range(n_workers)]
        for worker in workers:
            idle.put(worker)
        threads = stack.enter_context(ThreadPoolExecutor(n_workers))

        def run(task: Task) -> tuple[Task, Problems]:
            worker = idle.get()
            try:
                return task, worker.run(task)
            finally:
                idle.put(worker)

        running: set[Future[tuple[Task, Problems]]] = set()
        try:
            for task in tasks:
                running.add(threads.submit(run, task))
                if len(running) >= 2 * n_workers:  # so that the texts of compressed files do not fill the memory
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            for future in running:
                yield future.result()
        finally:
            for future in running:
                future.cancel()
            for worker in workers:
                worker.kill()  # after an error or Ctrl-C, nothing waits for their tasks


class _Worker:
    """One process."""

    def __init__(self, work: Work):
        command = [sys.executable, "-P", "-m", "minillm_core.data.encode"]
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path.rstrip(os.pathsep), "TOKENIZERS_PARALLELISM": "false"}
        # in a process group of its own: Ctrl-C is for the parent
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, process_group=0
        )
        self._first: Work | None = work

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def kill(self) -> None:
        self._process.kill()

    def run(self, task: Task) -> Problems:
        assert self._process.stdout is not None
        try:
            if self._first is not None:
                self._send(self._first)
                self._first = None
            self._send(task)
            answer = pickle.load(self._process.stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError) as error:
            status = self._process.wait()
            hint = "if there was not enough memory, use fewer --workers"
            raise WorkerEndedError("a worker process ended", found=f"status {status}", hint=hint) from error
        if isinstance(answer, Exception):
            raise answer
        return tuple(answer)

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        pickle.dump(message, self._process.stdin)
        self._process.stdin.flush()

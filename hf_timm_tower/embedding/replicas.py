"""Processes that work on numbered tasks, their results in order.

Each has its own pipe and at most two tasks: one that it works on, one that waits there. A process that dies is replaced
and its tasks are given out again; a task at which a process dies twice ends the run. When this process dies, in
whatever way, the pipes close and the others end.
"""

import contextlib
import ctypes
import io
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing  # teaches the pipes to pass tensors through shared memory

from ..reader.errors import TowerError, shown

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_TASKS_EACH = 2
_SECONDS_TO_END = 5.0
_BY_VALUE = 2**16
"""Bytes up to which a tensor is sent as it is: shared memory for it costs both processes more than the copy."""


def usable_cores() -> int:
    """Cores that this process may use: of its affinity mask, and of a container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
    except (OSError, ValueError):
        return count
    return count if quota == "max" else max(1, min(count, int(quota) // int(period)))


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of up to 32 MiB for the next ones, 256 MiB in all, in a process that only embeds.

    It gives them back to the system else, and each batch faults its activations in anew: a third of the time of
    MobileNetV3-S between two decodings. Nothing happens on another C library.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(AttributeError):
            for parameter, value in ((_M_MMAP_THRESHOLD, 2**25), (_M_TRIM_THRESHOLD, 2**28)):
                ctypes.CDLL(None).mallopt(parameter, value)


def start_method() -> str:
    """How processes are started: as the program has chosen, else forked where that is safe.

    A fork has the tower as it is, its mapped files and whatever class its head is of, in milliseconds and without a
    copy. Elsewhere the tower is pickled, and its tensors move to shared memory.
    """
    chosen = multiprocessing.get_start_method(allow_none=True)
    return chosen or ("fork" if sys.platform.startswith("linux") else "spawn")


class _Worker:
    """One process, seen from this one."""

    def __init__(self, work: Callable[[Any], Any], context: Any) -> None:
        self.connection, theirs = context.Pipe()
        self.tasks: dict[int, Any] = {}  # in the order in which they were sent
        self.process = context.Process(target=_serve, args=(work, theirs, self.connection), daemon=True)
        try:
            self.process.start()
        except (AttributeError, TypeError, pickle.PicklingError) as error:  # only where processes are spawned
            raise TowerError(
                f"the tower cannot be sent to another process: {error}. Put the class of its head at the top of a "
                "module, or num_workers=0"
            ) from error
        theirs.close()  # so that its end shows as the end of the pipe

    def send(self, number: int, task: Any) -> None:
        self.tasks[number] = task
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its end shows where results are received
            self.connection.send((number, task))

    def end(self) -> None:
        self.connection.close()
        self.process.join(_SECONDS_TO_END)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def in_order(
    work: Callable[[Any], Any], tasks: Iterator[Any], processes: int, name: Callable[[Any], object] = lambda task: task
) -> Iterator[Any]:
    """`map(work, tasks)` by several processes; it looks only a few tasks ahead.

    Args:
        work: Task -> result. With forked processes it need not be picklable; tasks and results must be.
        tasks: They are taken in this process.
        processes: How many at most.
        name: Of a task, for errors.

    Raises:
        TowerError: a process died twice at the same task.
        Exception: whatever `work` raises.
    """
    context = multiprocessing.get_context(start_method())
    workers: list[_Worker] = []  # started as tasks come: for a few images a few
    died: dict[int, int] = {}  # task -> how many processes died at it
    done: dict[int, Any] = {}
    given = taken = 0  # results that the caller has, tasks that were sent
    window = processes * _TASKS_EACH * 4  # so that one slow task does not let results pile up
    more = True
    try:
        while more or given < taken:
            while more and taken - given < window:
                free = [worker for worker in workers if len(worker.tasks) < _TASKS_EACH]
                if not free and len(workers) == processes:
                    break
                try:
                    task = next(tasks)
                except StopIteration:
                    more = False
                    break
                if len(workers) < processes and all(worker.tasks for worker in workers):
                    workers.append(_Worker(work, context))
                    free = workers[-1:]
                min(free, key=lambda worker: len(worker.tasks)).send(taken, task)
                taken += 1
            if given == taken:
                continue
            by_connection = {worker.connection: place for place, worker in enumerate(workers)}
            for connection in wait([worker.connection for worker in workers if worker.tasks]):
                place = by_connection[connection]
                worker = workers[place]
                try:
                    number, result, error = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    workers[place] = _replaced(worker, work, context, died, name)
                    continue
                if error is not None:
                    raise error
                del worker.tasks[number]
                done[number] = result
            while given in done:
                result = done.pop(given)
                given += 1
                yield result
    finally:
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.end()


def _replaced(
    worker: _Worker, work: Callable[[Any], Any], context: Any, died: dict[int, int], name: Callable[[Any], object]
) -> _Worker:
    worker.end()
    at, task = next(iter(worker.tasks.items()))
    died[at] = died.get(at, 0) + 1
    if died[at] > 1:
        code = worker.process.exitcode
        how = f"by signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        spawned = "" if start_method() == "fork" else 'the script lacks `if __name__ == "__main__":`, '
        raise TowerError(
            f"a process ended {how}, twice, while it worked on {shown(name(task), 300)}. Perhaps {spawned}one of these "
            "images crashes its decoder, or memory is short (in a container also /dev/shm): fewer num_workers, or "
            "num_workers=0 to see more"
        )
    new = _Worker(work, context)
    for number, each in worker.tasks.items():
        new.send(number, each)
    return new


def _serve(work: Callable[[Any], Any], connection: Connection, parents: Connection) -> None:
    parents.close()  # forked: else the pipe stays open when the parent dies
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    torch.set_num_threads(1)
    keep_freed_memory()
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, waiting), daemon=True).start()
    while True:
        number, task = waiting.get()
        result = error = None
        try:
            result = work(task)
        except Exception as raised:  # it is raised again where the results are asked for
            error = raised
        try:
            message = _pickled((number, result, None if error is None else _sendable(error)))
        except Exception as raised:  # torch's, where there is no shared memory left
            told = TowerError(
                f"a result cannot be sent between processes: {raised}. Where /dev/shm is full, enlarge it (docker "
                "--shm-size), or num_workers=0"
            )
            message = _pickled((number, None, told))
        try:
            connection.send_bytes(message)
        except (BrokenPipeError, ConnectionResetError):
            os._exit(1)


def _pickled(value: Any) -> memoryview:
    message = io.BytesIO()
    _Pickler(message).dump(value)
    return message.getbuffer()


def _sendable(error: Exception) -> Exception:
    """The same error, or where another process could not make it from its arguments, one that says what it says."""
    try:
        pickle.loads(_pickled(error))
    except Exception:  # whatever its class raises
        return TowerError(f"{type(error).__name__}: {error}")
    return error


class _Pickler(ForkingPickler):
    def reducer_override(self, value: Any) -> Any:
        if type(value) is torch.Tensor and value.nbytes <= _BY_VALUE and value.dtype in (torch.float32, torch.float16):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _receive(connection: Connection, waiting: "queue.SimpleQueue[Any]") -> None:
    """Always ready to receive: two processes that both wait to send would wait for ever."""
    while True:
        try:
            waiting.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)  # the parent has closed the pipe, or is gone

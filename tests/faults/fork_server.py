"""Forks commands from a process that has imported torch already, so that one takes milliseconds.

A script: it reads requests from stdin, one JSON object a line, and answers each with one. Every
command is a process of its own.
"""

import contextlib
import faulthandler
import gc
import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch.distributed.run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import dump_activations.api
import dump_activations.commands.dump
import dump_activations.commands.inspect
from dump_activations.interrupts import die_of
from dump_activations.storage.writing import journal, shards


def torchrun(arguments: list[str]) -> int:
    """Be torchrun, whose exit code is 1 where a process failed."""
    try:
        torch.distributed.run.main(arguments)
    except ChildFailedError:
        return 1
    return 0


COMMANDS = {
    "dump-activations": dump_activations.commands.dump.main,
    "inspect-activations": dump_activations.commands.inspect.main,
    "torchrun": torchrun,
}


def serve() -> None:
    gc.freeze()  # or each command would copy what it collects
    running: set[int] = set()
    try:
        for line in sys.stdin:
            request = json.loads(line)
            answer: int | None
            if "poll" in request:
                pid, status = os.waitpid(request["poll"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else None
                running.discard(pid)
            else:
                answer = os.fork()
                if answer == 0:
                    running.clear()
                    run(request)
                running.add(answer)
            print(json.dumps(answer), flush=True)
    finally:
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def run(request: dict[str, Any]) -> None:
    """Become the command that a request describes; does not return."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if request["sync_interval"] is not None:
        journal.SYNC_INTERVAL = request["sync_interval"]
    if request["first_note"] is not None:
        shards._FIRST_NOTE_SECONDS = request["first_note"]
    if request["cores"] is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: request["cores"]])
    for name, limit in request["limits"].items():
        used = used_memory() if name == "RLIMIT_DATA" else 0
        resource.setrlimit(getattr(resource, name), (used + limit, used + limit))
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # Last: from here on the preloaded library may break a system call.
    os.environ.update(request["environment"])
    code = COMMANDS[request["command"]](request["arguments"])
    # Threads that were left behind hold up the end, as in any process. Tearing
    # down torch's modules would take longer than the command.
    threading._shutdown()
    sys.stdout.flush()
    if code < 0:
        die_of(-code)
    os._exit(code)


def used_memory() -> int:
    """Return the bytes that count for RLIMIT_DATA."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmData:")[2].split()[0])


if __name__ == "__main__":
    serve()

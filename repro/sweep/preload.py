"""Cells that start with torch already imported: a server imports their modules once and is forked for each cell.

    sweep ── argv, log, locks ─▶ server ── fork ──▶ helper ── fork ──▶ cell
                                                    (exits: the sweep becomes the cell's parent)

A main module opts in with `PRELOAD = ("gnn.train",)`, the modules to import beforehand. A cell started this way sees
what a fresh `python -m MODULE ...` sees (arguments, environment, streams, a session of its own) and has its exit codes.
The sweep adopts orphans (it is a "child subreaper"), so that neither these nor signals depend on the server. Whatever
goes wrong on the way, the caller starts a fresh interpreter instead.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import IO, Any, NoReturn

from repro.sweep.cell import past_interpreter_flags

_MESSAGE_BYTES = 1 << 17
_MOST_DESCRIPTORS = 253  # SCM_MAX_FD of Linux
_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


# -- which lines ------------------------------------------------------------------------------------------------------


def module_call(argv: Sequence[str]) -> tuple[list[str], str, list[str]] | None:
    """(interpreter flags, module, its arguments) of `python [flags] -m MODULE ...`; None for any other command."""
    if not argv or argv[0] != sys.executable:
        return None
    at = past_interpreter_flags(argv)
    if at + 1 >= len(argv) or argv[at] != "-m":
        return None
    return list(argv[1:at]), argv[at + 1], list(argv[at + 2 :])


def declared_preload(module: str) -> tuple[str, ...]:
    """The module's `PRELOAD`, read from its source: nothing is imported; () where there is none."""
    top, *rest = module.split(".")
    with contextlib.suppress(ImportError, OSError, SyntaxError, ValueError):
        spec = importlib.util.find_spec(top)
        for name in rest:  # find_spec would import the packages on the way
            spec = PathFinder.find_spec(name, (spec and spec.submodule_search_locations) or [])
        if spec is not None and (places := spec.submodule_search_locations):
            spec = PathFinder.find_spec("__main__", places)
        if spec is not None and spec.origin is not None:
            for node in ast.parse(Path(spec.origin).read_bytes()).body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PRELOAD":
                    return tuple(ast.literal_eval(node.value))
    return ()


# -- the sweep's side --------------------------------------------------------------------------------------------------


class ForkedProcess:
    """A child that this process did not start through subprocess."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code (negative: a signal), None while it runs."""
        if self._code is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # SIGCHLD is ignored: the code is lost; 0, as subprocess says
                pid, status = self.pid, 0
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def send_signal(self, sig: int) -> None:
        """Signal it, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, sig)


def launch(
    flags: list[str], modules: tuple[str, ...], environment: dict[str, str], channel: socket.socket
) -> subprocess.Popen[bytes]:
    """Start a server that reads its requests from `channel`."""
    return subprocess.Popen(
        [sys.executable, *flags, "-m", "repro.sweep.preload", str(channel.fileno()), *modules],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=environment, pass_fds=[channel.fileno()], start_new_session=True,
    )  # fmt: skip


class _Server:
    """A running server and the sweep's end of its channel."""

    def __init__(self, flags: list[str], modules: tuple[str, ...], environment: dict[str, str]) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = launch(flags, modules, environment, theirs)

    def fork(self, argv: Sequence[str], descriptors: list[int], own: dict[str, str]) -> ForkedProcess | None:
        """The cell's process; None when the server is dead, in which case nothing of the cell has run."""
        read_go, write_go = os.pipe()
        try:
            message = json.dumps({"argv": list(argv), "cwd": os.getcwd(), "environment": own}).encode()
            socket.send_fds(self._channel, [message], [*descriptors, read_go])
            answer = self._channel.recv(32)
            if not answer:
                return None
            os.write(write_go, b"!")  # without it a cell whose process number never arrived does nothing
            return ForkedProcess(int(answer))
        except OSError:
            return None
        finally:
            os.close(read_go)
            os.close(write_go)

    def close(self) -> None:
        """Stop the server, which holds nothing; its cells live on."""
        self._channel.close()
        self._process.send_signal(signal.SIGKILL)
        while self._process.poll() is None:
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)


class Preloader:
    """The servers of one sweep, each started when the first of its cells is."""

    def __init__(self) -> None:
        self._servers: dict[tuple[str, ...], _Server] = {}
        self._given_up: set[tuple[str, ...]] = set()

    def start(
        self, argv: Sequence[str], environment: dict[str, str], log: IO[bytes], held: list[int], own: dict[str, str]
    ) -> ForkedProcess | None:
        """Start `python -m MODULE` from a server; None when it has to be started as a fresh interpreter.

        Args:
            argv: the command.
            environment: what all cells have in common; the same in all calls.
            log: becomes the cell's stdout and stderr.
            held: descriptors of the cell's locks, which its process holds from then on too.
            own: variables of this cell.
        """
        call = module_call(argv)
        modules = declared_preload(call[1]) if call else ()
        if call is None or not modules:
            return None
        key = (*call[0], call[1])
        if key in self._given_up or not _adopt_orphans(True):
            return None
        descriptors = [log.fileno(), *held]
        if (server := self._servers.get(key)) is not None:
            if (process := server.fork(argv, descriptors, own)) is not None:
                return process
            server.close()  # killed: start another
        self._servers[key] = server = _Server(call[0], modules, environment)
        process = server.fork(argv, descriptors, own)
        if process is None:
            server.close()
            del self._servers[key]
            self._given_up.add(key)
            print(f"note: {', '.join(modules)} cannot be preloaded; cells start more slowly", file=sys.stderr)
        return process

    def close(self) -> None:
        """Stop the servers."""
        for server in self._servers.values():
            server.close()
        self._servers.clear()
        _adopt_orphans(False)


def _adopt_orphans(on: bool) -> bool:
    """Become the parent of the descendants' orphans; False where the system cannot do that."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    return prctl is not None and prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0) == 0


# -- the server's side -------------------------------------------------------------------------------------------------


def serve(channel: socket.socket, modules: Sequence[str]) -> str | None:
    """Import `modules`, then fork a cell per request.

    Returns in a cell's process with the module that it has to run, and in the server with None once the sweep is gone.
    """
    for name in modules:
        importlib.import_module(name)
    if "torch" in sys.modules:
        importlib.import_module("torch._dynamo")  # the first optimizer would: most of a second
    gc.collect()
    gc.freeze()  # what is imported lasts: cells need neither copy nor search it
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, _MESSAGE_BYTES, _MOST_DESCRIPTORS)
        if not message:
            return None
        pid = _fork_orphan()
        if pid == 0:
            channel.close()
            return _become(json.loads(message), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(str(pid).encode())


def _fork_orphan() -> int:
    """Fork a process whose parent is gone: 0 in it, its number in the caller."""
    reading, writing = os.pipe()
    helper = os.fork()
    if helper == 0:
        try:
            pid = os.fork()
        except OSError:
            os._exit(1)
        if pid:
            os.write(writing, str(pid).encode())
            os._exit(0)
        os.close(reading)
        os.close(writing)
        return 0
    os.close(writing)
    with open(reading, encoding="ascii") as pipe:
        pid = int(pipe.read())
    with contextlib.suppress(ChildProcessError):  # SIGCHLD is ignored
        os.waitpid(helper, 0)
    return pid


def _become(request: dict[str, Any], log: int, *others: int) -> str:
    """Turn this process into the one that `request["argv"]` would start; returns its module."""
    argv: list[str] = request["argv"]
    *held, go = others
    os.setsid()
    if not os.read(go, 1):
        os._exit(0)  # the sweep has died, or has started the cell in another way
    os.chdir(request["cwd"])
    null = os.open(os.devnull, os.O_RDONLY)
    for stream, descriptor in enumerate((null, log, log)):
        os.dup2(descriptor, stream)
    for descriptor in (null, log, go):
        os.close(descriptor)
    for descriptor in held:
        os.set_inheritable(descriptor, True)
    # In time for CUDA_VISIBLE_DEVICES, which CUDA reads when it is initialised. An import that has initialised it is
    # what the next lines look for: the interpreter that they start reads the variable afresh.
    os.environ.update(request["environment"])
    torch = sys.modules.get("torch")
    if torch is not None and getattr(torch.cuda, "_is_in_bad_fork", bool)():
        os.execv(argv[0], argv)  # an import has touched the GPU, which a forked process cannot use
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()  # drawn by the system, as at a fresh start; Python's own generator does that itself
    call = module_call(argv)
    assert call is not None
    _, module, arguments = call
    sys.argv, sys.orig_argv = ["-m", *arguments], argv
    return module


def run_to_exit(module: str) -> NoReturn:
    """Run a module as `__main__` and leave as an interpreter does, but without taking all its modules apart."""
    code: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as leave:
        code = leave.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for the threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((code or 0) & 0xFF)


if __name__ == "__main__":
    if (name := serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])) is not None:
        run_to_exit(name)

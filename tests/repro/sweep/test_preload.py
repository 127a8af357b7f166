"""Cells forked from a server are what a fresh interpreter would have made of their line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from repro.sweep import preload
from repro.sweep.preload import Preloader, declared_preload, module_call

# Says what it sees of the world; its PRELOAD counts its imports.
PROBE = """
import json, os, random, signal, sys, threading, time, warnings
PRELOAD = ("probe_library",)
def main():
    import probe_library
    flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    seen = {
        "argv": sys.argv, "orig_argv": sys.orig_argv, "name": __name__, "file": __file__, "path": sys.path,
        "package": __package__, "spec": __spec__.name, "flags": str(sys.flags), "warnoptions": sys.warnoptions,
        "filters": str(warnings.filters), "environ": dict(os.environ), "cwd": os.getcwd(),
        "session": os.getsid(0) == os.getpid(), "stdin": os.readlink("/proc/self/fd/0"),
        "stdout": os.path.basename(os.readlink("/proc/self/fd/1")),
        "same": os.path.samestat(os.fstat(1), os.fstat(2)), "buffered": sys.stdout.line_buffering,
        "term": str(signal.getsignal(signal.SIGTERM)), "int": str(signal.getsignal(signal.SIGINT)),
        "threads": threading.active_count(), "main": sys.modules["__main__"].__file__, "hash": hash("x"),
        "held": sorted(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")) for fd in os.listdir("/proc/self/fd")
                       if int(fd) > 2 and os.path.exists(f"/proc/self/fd/{fd}")),
    }
    print("out"); print("err", file=sys.stderr)
    with open(flags["--seen"], "w") as file:
        json.dump(seen, file)
    with open(flags["--imported"], "a") as file:
        file.write(f"{probe_library.IMPORTED_BY} {random.random()} {os.getppid()}\\n")
    do = flags.get("--do")
    if do == "raise": raise ValueError("told")
    if do == "text": sys.exit("a reason")
    if do == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if do == "wait": time.sleep(60)
    if do: sys.exit(int(do))
if __name__ == "__main__":
    main()
"""


class Probe:
    """Starts the probe in both ways."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "probe.py").write_text(PROBE)
        (folder / "probe_library.py").write_text("import os\nIMPORTED_BY = os.getpid()\n")
        self.imported = folder / "imported"
        self.environment = dict(os.environ) | {
            "PYTHONPATH": os.pathsep.join([str(folder), os.environ["PYTHONPATH"]]), "PYTHONHASHSEED": "7",
        }  # fmt: skip

    def command(self, *flags: str, do: str = "", name: str = "seen") -> list[str]:
        told = ["--seen", str(self.folder / name), "--imported", str(self.imported), *(["--do", do] if do else [])]
        return [sys.executable, *flags, "-m", "probe", *told]

    def fork(
        self, preloader: Preloader, *flags: str, do: str = "", own: dict[str, str] | None = None
    ) -> preload.ForkedProcess | None:
        with open(self.folder / "log.txt", "wb") as log, open(self.folder / "sweep.lock", "a") as lock:
            return preloader.start(self.command(*flags, do=do), self.environment, log, [lock.fileno()], own or {})

    def fresh(self, *flags: str, do: str = "") -> int:
        with open(self.folder / "log.txt", "wb") as log, open(self.folder / "sweep.lock", "a") as lock:
            return subprocess.run(
                self.command(*flags, do=do), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment,
                pass_fds=[lock.fileno()], start_new_session=True, check=False,
            ).returncode  # fmt: skip

    def outcome(self) -> tuple[str, str]:
        return (self.folder / "seen").read_text(), (self.folder / "log.txt").read_text()


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Probe:
    monkeypatch.syspath_prepend(str(tmp_path))
    return Probe(tmp_path)


@pytest.fixture
def preloader():
    found = Preloader()
    yield found
    found.close()


def ended(process: preload.ForkedProcess) -> int:
    deadline = time.monotonic() + 60
    while (code := process.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return code


@pytest.mark.parametrize("flags", [(), ("-W", "error", "-u"), ("-Wignore", "-X", "dev")])
def test_a_forked_cell_sees_what_a_fresh_one_sees(probe: Probe, preloader: Preloader, flags: tuple[str, ...]) -> None:
    assert probe.fresh(*flags) == 0
    fresh = probe.outcome()
    found = probe.fork(preloader, *flags)
    assert found is not None and ended(found) == 0
    assert json.loads(fresh[0]) == json.loads(probe.outcome()[0])
    assert sorted(fresh[1].split()) == sorted(probe.outcome()[1].split()) == ["err", "out"]
    assert json.loads(fresh[0])["held"].count("sweep.lock") == 1


def test_each_forked_cell_has_its_own_gpus(probe: Probe, preloader: Preloader) -> None:
    """The server sees all devices; what a cell sees is decided when it is forked."""
    seen = []
    for own in ({"CUDA_VISIBLE_DEVICES": "gpu-a"}, {"CUDA_VISIBLE_DEVICES": "gpu-b,gpu-c"}, {}):
        found = probe.fork(preloader, own=own)
        assert found is not None and ended(found) == 0
        seen.append(json.loads(probe.outcome()[0])["environ"].get("CUDA_VISIBLE_DEVICES"))
    assert seen == ["gpu-a", "gpu-b,gpu-c", os.environ.get("CUDA_VISIBLE_DEVICES")]


@pytest.mark.parametrize("do", ["raise", "text", "kill", "3", "300"])
def test_exit_codes_are_a_fresh_interpreter_s(probe: Probe, preloader: Preloader, do: str) -> None:
    code = probe.fresh(do=do)
    last = probe.outcome()[1].splitlines()[-1:]
    found = probe.fork(preloader, do=do)
    assert found is not None and ended(found) == code != 0
    assert probe.outcome()[1].splitlines()[-1:] == last


def test_one_import_serves_many_cells_and_the_sweep_is_their_parent(probe: Probe, preloader: Preloader) -> None:
    for _ in range(3):
        found = probe.fork(preloader)
        assert found is not None and ended(found) == 0
    importers, numbers, parents = zip(*(line.split() for line in probe.imported.read_text().splitlines()), strict=True)
    assert len(set(importers)) == 1 and len(set(numbers)) == 3 and set(parents) == {str(os.getpid())}


def test_a_killed_server_is_replaced_and_its_cells_live_on(probe: Probe, preloader: Preloader) -> None:
    first = probe.fork(preloader, do="wait")
    assert first is not None
    (server,) = (p for p in psutil.Process().children() if "repro.sweep.preload" in p.cmdline() and p.pid != first.pid)
    server.kill()
    second = probe.fork(preloader)
    assert second is not None and ended(second) == 0
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    assert ended(first) == -signal.SIGKILL


def test_what_cannot_be_preloaded_is_left_to_a_fresh_interpreter(
    probe: Probe, preloader: Preloader, capsys: pytest.CaptureFixture[str]
) -> None:
    (probe.folder / "probe_library.py").write_text("raise RuntimeError('broken')\n")
    assert probe.fork(preloader) is None and probe.fork(preloader) is None
    assert capsys.readouterr().err == "note: probe_library cannot be preloaded; cells start more slowly\n"
    (probe.folder / "probe.py").write_text("print('no PRELOAD')\n")
    assert declared_preload("probe") == () == declared_preload("no_such_module") == declared_preload("torch.nn.nope")


def test_only_python_m_is_preloaded() -> None:
    python = sys.executable
    assert module_call([python, "-W", "error", "-u", "-m", "a.b", "-m", "x"]) == (
        ["-W", "error", "-u"],
        "a.b",
        ["-m", "x"],
    )
    for command in ([python, "a.py"], [python, "-c", "-m"], ["torchrun", "-m", "a"], [python, "-m"], [python], []):
        assert module_call(command) is None


def test_nothing_is_imported_to_find_out(probe: Probe) -> None:
    (probe.folder / "loud").mkdir()
    (probe.folder / "loud" / "__init__.py").write_text("raise SystemExit\n")
    (probe.folder / "loud" / "main.py").write_text("PRELOAD = ('a', 'b')\nraise SystemExit\n")
    assert declared_preload("loud.main") == ("a", "b")


def test_a_killed_sweep_leaves_no_server(probe: Probe, tmp_path: Path) -> None:
    line = " ".join(["python", *probe.command(do="wait")[1:]])
    process = subprocess.Popen(
        [sys.executable, "-m", "repro.sweep", "--results", str(tmp_path / "results")],
        stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env=probe.environment, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(line)
    process.stdin.close()
    deadline = time.monotonic() + 60
    while not probe.imported.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(process.pid).children()
    (cell,) = (p for p in children if any(f.path.endswith("sweep.lock") for f in p.open_files()))
    process.kill()
    process.wait()
    gone, left = psutil.wait_procs([p for p in children if p != cell], timeout=10)
    assert len(gone) == 1 and not left
    assert cell.is_running()
    cell.kill()


def test_a_sweep_and_reports_need_no_torch() -> None:
    program = "import sys, repro.sweep.sweep, repro.sweep.watch, repro.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import repro.sweep, repro.report"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "torch" not in done.stderr

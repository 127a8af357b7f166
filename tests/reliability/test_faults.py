"""One run whose writes fail, whose process dies at each of them, whose folders vanish, whose clock goes back."""

from __future__ import annotations

import builtins
import errno
import json
import os
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from repro.errors import UserError
from repro.run import run as run_module

STEPS = 2
PAST_THE_END = 77  # exit code of a run in which the fault would have come after the last write
CALLS = ("open", "fsync", "replace", "mkdir")  # of module os; `open` is the built-in one, when it opens for writing


def faulty(act: Callable[[], None], at: int) -> Callable[[], bool]:
    """Call `act` before the `at`-th call that changes the disk (from 1 on); the result tells if it came to that."""
    count = 0

    def before(real: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            nonlocal count
            if writes(*args, **settings):
                count += 1
                if count == at:
                    act()
            return real(*args, **settings)

        return call

    def for_writing(path: Any, mode: str = "r", *args: Any, **settings: Any) -> bool:
        return any(letter in mode for letter in "wa")

    builtins.open = before(builtins.open, for_writing)  # type: ignore[assignment]
    for name in CALLS[1:]:
        setattr(os, name, before(getattr(os, name), lambda *args, **settings: True))
    return lambda: count >= at


@pytest.fixture(scope="module")
def undisturbed(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("undisturbed")
    tiny.experiment(tiny.Config(str(folder), steps=STEPS))
    return tiny.comparable(folder)


def no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """`git describe` opens pipes, whose number is not the run's."""
    monkeypatch.setattr(run_module, "_commit", lambda: None)


def death() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("act", "name"), [(death, "killed"), (full_disk, "full disk")])
def test_a_fault_at_every_write(
    act: Callable[[], None], name: str, tmp_path: Path, tiny: Any, undisturbed: Any, figures: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    no_commit(monkeypatch)
    for at in range(1, 200):
        config = tiny.Config(str(tmp_path / f"{at}"), steps=STEPS)
        out = tmp_path / f"{at}.log"

        def body(config: Any = config, at: int = at) -> int:
            reached = faulty(act, at)
            tiny.experiment(config)
            return 0 if reached() else PAST_THE_END

        code = tiny.wait(tiny.forked(body, out))
        folder = Path(config.output_dir)
        if code == PAST_THE_END:
            break
        said = out.read_text()
        if act is death:
            assert code == -signal.SIGKILL
        elif code:  # 0: the call did not matter, as mkdir of a folder that is there
            assert code == 2 and said.splitlines()[-1].startswith("error: ") and "Traceback" not in said, said
            assert "o space left on device" in said
        if (folder / "record.json").exists():  # the fault came after the end: in fsync of the folder
            json.loads((folder / "record.json").read_text())
        tiny.experiment(config)
        assert tiny.comparable(folder) == undisturbed, f"write {at}"
        assert sorted(p.name for p in folder.iterdir()) == [
            "args.yaml", "env.json", "lock", "metrics.jsonl", "record.json"
        ]  # fmt: skip
    assert 25 < at < 199, "the faults did not reach every write"
    figures[f"write_{'deaths' if act is death else 'errors'}"] = {"points": at - 1, "resumed_equal": at - 1}


@pytest.mark.parametrize("limit", [100, 700, 2000, 6000])
def test_no_file_may_grow(limit: int, tmp_path: Path, tiny: Any, undisturbed: Any) -> None:
    """A quota: files end in the middle of a write."""
    config = tiny.Config(str(tmp_path / "run"), steps=STEPS)

    def body() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        tiny.experiment(config)

    code = tiny.wait(tiny.forked(body, os.open(os.devnull, os.O_WRONLY)))
    assert code == 2
    assert not (tmp_path / "run" / "record.json").exists()
    tiny.experiment(config)
    assert tiny.comparable(tmp_path / "run") == undisturbed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path, tiny: Any, undisturbed: Any) -> None:
    filler = small_disk / "filler"
    free = os.statvfs(small_disk)
    filler.write_bytes(b"x" * max(0, free.f_bavail * free.f_frsize - 3 * 4096))
    config = tiny.Config(str(small_disk / "run"), steps=STEPS)
    out = tmp_path / "log"
    assert tiny.wait(tiny.forked(lambda: tiny.experiment(config), out)) == 2
    assert out.read_text().splitlines()[-1].startswith("error: No space left on device")
    assert not (small_disk / "run" / "record.json").exists()
    filler.unlink()
    tiny.experiment(config)
    assert tiny.comparable(small_disk / "run") == undisturbed


@pytest.fixture
def unwritable() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    folder.rmdir()


def without_privileges() -> None:
    """Root may write everywhere: become somebody else."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def test_a_read_only_output_folder(unwritable: Path, tmp_path: Path, tiny: Any) -> None:
    config = tiny.Config(str(unwritable / "run"), steps=STEPS)

    def body() -> None:
        without_privileges()
        tiny.experiment(config)

    assert tiny.wait(tiny.forked(body, tmp_path / "log")) == 2
    assert (
        tmp_path / "log"
    ).read_text() == f"error: --output_dir {unwritable}/run: cannot be written (Permission denied)\n"
    assert not list(unwritable.iterdir())


def test_a_vanished_output_folder(tmp_path: Path, tiny: Any) -> None:
    """Somebody deletes the folder of a run at work: one line, and the next start begins anew."""
    config = tiny.Config(str(tmp_path / "run"), steps=40)
    pid = tiny.forked(lambda: tiny.experiment(config, 0.02), tmp_path / "log")
    while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
        time.sleep(0.005)
    (tmp_path / "run").rename(tmp_path / "gone")
    assert tiny.wait(pid) == 2
    said = (tmp_path / "log").read_text()
    assert said.startswith("error: No such file or directory") and len(said.splitlines()) == 1


def test_a_vanished_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gnn.main import main as train_graph
    from ViT_imagenet.main import main as train_images

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output = tmp_path / "run"
    with pytest.raises(UserError, match="vanished: no such folder"):
        train_graph(["--data=dblp", f"--data_root={tmp_path / 'vanished'}", f"--output_dir={output}"])
    with pytest.raises(UserError, match="vanished"):
        train_images(["--scale=0.1", f"--data_path={tmp_path / 'vanished'}", f"--output_dir={tmp_path / 'images'}"])
    assert not list(tmp_path.rglob("record.json"))


def test_sigterm_saves(tmp_path: Path, tiny: Any, undisturbed: Any) -> None:
    config = tiny.Config(str(tmp_path / "run"), steps=STEPS)
    pid = tiny.forked(lambda: tiny.experiment(config, 0.3), tmp_path / "log")
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.005)
    os.kill(pid, signal.SIGTERM)
    assert tiny.wait(pid) == 128 + signal.SIGTERM
    assert "re-running the command resumes" in (tmp_path / "log").read_text()
    tiny.experiment(config)
    assert tiny.comparable(tmp_path / "run") == undisturbed


def test_a_clock_that_goes_back(tmp_path: Path, tiny: Any, undisturbed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which checkpoint is the newest, and how long a run took, never comes from the wall clock."""
    config = tiny.Config(str(tmp_path / "run"), steps=STEPS)
    pid = tiny.forked(lambda: tiny.experiment(config, 0.2), tmp_path / "log")
    while len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) < 2:
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    tiny.wait(pid)
    for place, year in zip(sorted((tmp_path / "run" / "checkpoints").glob("step-*")), (2100, 1980), strict=True):
        for path in [place, *place.iterdir()]:
            os.utime(path, times=((year - 1970) * 3.15e7,) * 2)
    monkeypatch.setattr(time, "time", lambda: 1e8)  # 1973
    tiny.experiment(config)
    assert tiny.comparable(tmp_path / "run") == undisturbed
    assert 0 < json.loads((tmp_path / "run" / "record.json").read_text())["seconds"] < 60


def test_out_of_memory_is_one_line(tmp_path: Path, tiny: Any) -> None:
    """An allocation that fails, where the kernel refuses instead of killing."""
    import torch

    def allocate() -> None:
        torch.empty(2**62, dtype=torch.uint8)

    assert tiny.wait(tiny.forked(allocate, tmp_path / "log")) == 2
    said = (tmp_path / "log").read_text()
    assert said.startswith("error: out of memory") and len(said.splitlines()) == 1

"""A checkpoint comes back as it was written, and damage or a failed write never costs more than one of them."""

from __future__ import annotations

import errno
import math
import os
import resource
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro import checkpoint
from repro.checkpoint import list_checkpoints, load_checkpoint, read_checkpoint, save_checkpoint
from repro.files import write_atomic

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


def same(a, b):
    """Equal in value, type and order, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.cpu(), b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


def test_a_training_state_comes_back(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(3):
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
        scheduler.step()
    state = {
        "model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
        "best": None, "pair": (1, (2.5, "x")), 7: {0: [], "": ()},
        "edge": [math.inf, math.nan, True, -0.0, "ü\n", 2**70],
    }  # fmt: skip
    save_checkpoint(tmp_path, 4, state)
    step, read = load_checkpoint(tmp_path)
    assert step == 4 and same(state, read)
    optimizer.load_state_dict(read["optimizer"])
    assert list(read["optimizer"]["state"]) == list(range(4))  # parameters are numbered by ints, which JSON lacks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
def test_every_dtype_and_shape(tmp_path, dtype, shape):
    state = {"x": torch.arange(math.prod(shape)).reshape(shape).to(dtype), "view": torch.ones(4, 4, dtype=dtype).T[1:]}
    assert same(state, read_checkpoint(save_checkpoint(tmp_path, 0, state)))


def test_tensors_that_share_memory_come_back_apart(tmp_path):
    x = torch.zeros(3, requires_grad=True)
    read = read_checkpoint(save_checkpoint(tmp_path, 0, {"a": x, "b": x.detach()[:2]}))
    read["a"][0] = 1
    assert read["b"][0] == 0 and not read["a"].requires_grad


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.text() | st.integers() | st.tuples(st.integers(), st.text())
nests = st.recursive(
    leaves, lambda n: st.lists(n, max_size=3) | st.dictionaries(keys, n, max_size=3) | st.tuples(n, n), max_leaves=12
)


@settings(max_examples=60, deadline=None)
@given(nests)
def test_any_nest_comes_back(tmp_path_factory, nest):
    assert same(nest, read_checkpoint(save_checkpoint(tmp_path_factory.mktemp("c"), 1, nest)))


@pytest.mark.parametrize("wrong", [object(), {1, 2}, b"bytes", len, {"deep": [(object(),)]}])
def test_what_would_need_pickle_is_refused_and_leaves_nothing(tmp_path, wrong):
    with pytest.raises(TypeError, match="cannot hold"):
        save_checkpoint(tmp_path, 1, wrong)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_pickled(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"x": torch.ones(2), "t": (1, None)})
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "state.json", "tensors.safetensors"]
    for file in path.iterdir():
        content = file.read_bytes()
        assert not content.startswith((b"\x80", b"PK")) and b"torch" not in content


def test_damage_at_every_byte_of_every_file_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"x": torch.ones(2), "n": 3})
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for offset in range(len(whole)):
            file.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
            with pytest.raises(ValueError, match="step-0000000001"):
                read_checkpoint(path)
        for damaged in (b"", whole[:-1], whole + b"\0", b"\xff" * len(whole)):
            file.write_bytes(damaged)
            with pytest.raises(ValueError):
                read_checkpoint(path)
        file.unlink()
        with pytest.raises(ValueError):
            read_checkpoint(path)
        file.write_bytes(whole)
    assert read_checkpoint(path)["n"] == 3


def test_the_last_two_are_kept_and_the_older_one_stands_in_for_a_damaged_one(tmp_path, capsys):
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, {"step": step})
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-0000000002", "step-0000000010"]
    assert load_checkpoint(tmp_path) == (10, {"step": 10})
    assert capsys.readouterr().err == ""
    (tmp_path / "step-0000000010" / "state.json").write_text("{}")
    assert load_checkpoint(tmp_path) == (2, {"step": 2})
    assert "damaged checkpoint skipped" in (told := capsys.readouterr().err) and "step-0000000010" in told


def test_after_damage_to_both_the_new_ones_are_not_taken_for_old(tmp_path, capsys):
    """Started over from 0, a run writes steps below the damaged ones': these must go, not the new one."""
    for step in (100, 150):
        (save_checkpoint(tmp_path, step, step) / "manifest.json").write_text("")
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 50, "new")
    assert load_checkpoint(tmp_path) == (50, "new")
    save_checkpoint(tmp_path, 100, "new")
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-0000000050", "step-0000000100"]
    assert load_checkpoint(tmp_path) == (100, "new")
    assert capsys.readouterr().err.count("damaged") == 2


def test_no_checkpoint_is_none(tmp_path):
    assert load_checkpoint(tmp_path / "nowhere") is None


def test_what_a_killed_process_left_is_not_read_and_goes_with_the_next(tmp_path):
    (tmp_path / ".tmp-step-0000000009-1").mkdir()
    (tmp_path / ".tmp-step-0000000009-1" / "state.json").write_text("half")
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 3, None)
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000003"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_failed_write_leaves_the_old_ones_whole(tmp_path, monkeypatch, call, nth):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"x": torch.full((4,), step)})
    before, calls, real = sorted(p.name for p in tmp_path.iterdir()), [], getattr(os, call)

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) >= nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(checkpoint.os, call, failing)
    if call == "replace" and nth > 1:
        save_checkpoint(tmp_path, 3, {"x": torch.zeros(4)})  # one rename is all there is
        assert len(calls) == 1
        return
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 3, {"x": torch.zeros(4)})
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    step, state = load_checkpoint(tmp_path)
    assert step == 2 and same(state, {"x": torch.full((4,), 2)})


def test_a_file_size_limit_leaves_the_old_one_whole(tmp_path):
    """A real refusal by the system in the middle of a write."""
    save_checkpoint(tmp_path, 1, {"x": torch.ones(8)})
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(OSError) as refused:
            save_checkpoint(tmp_path, 2, {"x": torch.ones(100_000)})
        with pytest.raises(OSError):
            write_atomic(tmp_path / "file", b"x" * 20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert refused.value.errno == errno.EFBIG
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000001"]
    assert load_checkpoint(tmp_path)[0] == 1


def test_write_atomic_replaces_or_leaves(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    monkeypatch.setattr(checkpoint.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "bad disk")))
    with pytest.raises(OSError, match="bad disk"):
        write_atomic(path, b"newer")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["file"]

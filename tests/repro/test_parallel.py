"""Two gloo processes give what one gives: loss, gradients, running statistics, in float64."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from repro.parallel import BatchNorm, all_names, gather, sync_batch_norm

# Rank r has rows r·B/2 .. of the batch; everything is compared with the whole batch on one process, which each rank
# computes for itself before it turns the network's BatchNorm into one over both.
PAIR = """
import sys, torch, torch.distributed as dist, warnings
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from repro.parallel import BatchNorm, all_names, gather, sync_batch_norm

dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=int(sys.argv[1]), world_size=2)
rank = dist.get_rank()
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                    nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False)).double()
images = torch.randn(8, 3, 6, 6, dtype=torch.float64)
weights = torch.randn(8, 8, dtype=torch.float64)
start = {k: v.clone() for k, v in net.state_dict().items()}

def loss_of(z):  # every row meets every other one
    u = normalize(z, dim=1)
    return (weights * (u @ u.T)).exp().log1p().sum()

whole = loss_of(net(images))
whole.backward()
gradients = [p.grad.clone() for p in net.parameters()]
buffers = {k: v.clone() for k, v in net.named_buffers()}
net.load_state_dict(start)
net.zero_grad()
mine = slice(rank * 4, rank * 4 + 4)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # the name that replaces broadcast_buffers came with torch 2.14
    wrapped = DistributedDataParallel(sync_batch_norm(net), broadcast_buffers=False)
assert {type(m) for m in net if "Norm" in type(m).__name__} == {BatchNorm}
z = gather(wrapped(images[mine]))
assert z.shape == (8, 5)
loss = loss_of(z)
loss.backward()
torch.testing.assert_close(loss, whole, rtol=1e-10, atol=1e-10)
for ours, theirs in zip(net.parameters(), gradients, strict=True):
    torch.testing.assert_close(ours.grad, theirs, rtol=1e-10, atol=1e-10)
for name, buffer in net.named_buffers():
    torch.testing.assert_close(buffer, buffers[name], rtol=1e-10, atol=1e-10)
net.eval()  # uses its own rows and the running statistics
assert net(images[:3]).shape == (3, 5)
assert all_names(["a", f"b{rank}"]) == ["a", "b0", "b1"]
dist.barrier()
print("equal", flush=True)
import os
os._exit(0)  # gloo's threads may abort an interpreter that is leaving
"""


def test_two_processes_give_one_processs_loss_and_gradients(tmp_path: Path, python: str, root: Path) -> None:
    command = [python, "-W", "error", "-c", PAIR]
    pair = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], cwd=root, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True, env=os.environ)
        for rank in (0, 1)
    ]  # fmt: skip
    ends = [process.communicate(timeout=200) for process in pair]
    for out, err in ends:
        assert out.strip() == "equal", err[-3000:]


def test_one_process_needs_nothing_of_it() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather(rows) is rows
    net = nn.Sequential(nn.BatchNorm1d(2))
    assert type(sync_batch_norm(net)[0]) is nn.BatchNorm1d
    assert all_names(["a", "b", "a"]) == ["a", "b"]
    x = torch.randn(5, 2)
    torch.testing.assert_close(BatchNorm(2)(x), nn.BatchNorm1d(2)(x))
    with pytest.raises(ValueError, match=r"needs \(B, C"):
        BatchNorm(2)(torch.zeros(2))

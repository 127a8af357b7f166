"""Two processes under torchrun, one of them killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torchvision.utils import save_image

LIMIT_SECONDS = 60


def images(folder: Path) -> Path:
    """Two classes of noise, 24 training and 4 validation images each."""
    generator = torch.Generator().manual_seed(0)
    for split, number in (("train", 24), ("val", 4)):
        for label in range(2):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for i in range(number):
                save_image(torch.rand(3, 32, 32, generator=generator) * (label + 1) / 2, place / f"{i}.png")
    return folder


@pytest.mark.slow
def test_a_killed_process_ends_the_run_soon_and_it_resumes(
    tmp_path: Path, python: str, root: Path, figures: dict[str, Any]
) -> None:
    output = tmp_path / "run"
    command = [
        python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "ViT_imagenet.main",
        "--cpu", "--data_set=FOLDER", f"--data_path={images(tmp_path / 'images')}", "--scale=0.1", "--depth=2",
        "--model=deit_nano_patch8_32", "--batch_size=4", "--num_workers=0", "--epochs=20", "--warmup_epochs=0",
        "--no_repeated_aug", "--checkpoint_every=1", f"--output_dir={output}",
    ]  # fmt: skip
    log = tmp_path / "log"
    with open(log, "w") as file:
        launcher = subprocess.Popen(command, cwd=root, stdout=file, stderr=file)
    deadline = time.monotonic() + 200
    while not list((output / "checkpoints").glob("step-*")):
        assert launcher.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
    ranks = [p for p in psutil.Process(launcher.pid).children() if "ViT_imagenet.main" in " ".join(p.cmdline())]
    assert len(ranks) == 2
    helper = next(p for p in ranks if p.environ()["RANK"] == "1")
    began = time.monotonic()
    helper.kill()
    code = launcher.wait(timeout=LIMIT_SECONDS)
    seconds = time.monotonic() - began
    said = log.read_text()
    assert code != 0
    assert re.search(r"Signal 9 \(SIGKILL\)", said), said[-3000:]
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks)
    assert not (output / "record.json").exists()
    with open(log, "a") as file:
        again = subprocess.Popen(command, cwd=root, stdout=file, stderr=file)
    while not (output / "record.json").exists():
        assert again.poll() is None or (output / "record.json").exists(), log.read_text()[-3000:]
        time.sleep(0.1)
    try:
        again.wait(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        os.kill(again.pid, signal.SIGKILL)
        raise
    assert "going on from step" in log.read_text()
    assert json.loads((output / "record.json").read_text())["processes"] == 2
    figures["two_processes"] = {"seconds_until_the_run_ended": round(seconds, 1), "limit": LIMIT_SECONDS}

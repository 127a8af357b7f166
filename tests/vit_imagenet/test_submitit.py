from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from repro.errors import Interrupted, UserError
from ViT_imagenet import run_with_submitit
from ViT_imagenet.run_with_submitit import Training, main


def test_the_request_reaches_sbatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("sbatch", "echo Submitted batch job 42"), ("srun", "true")):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    flags = "--nodes 2 --gpus 4 --cpus 12 --mem_gb 200 --time 600 --partition long --account me --constraint a100"
    assert main([*flags.split(), "--", "--scale=0.1", f"--output_dir={tmp_path / 'run'}"]) == 0
    assert "job 42" in capsys.readouterr().out
    text = (tmp_path / "run" / "submitit" / "42_submission.sh").read_text()
    for line in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "cpus-per-task=12", "time=600", "partition=long",
                 "account=me", "constraint=a100", "mem=200GB", "signal=USR2@120", "job-name=run"):  # fmt: skip
        assert f"#SBATCH --{line}\n" in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--nodes 0", "--nodes must be at least 1"),
        ("--gpus 0", "needs --tasks"),
        ("--gpus 4 --tasks 2", "one process per GPU"),
    ],
)
def test_refused(flags: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        main([*flags.split(), "--", "--scale=0.1", "--output_dir=x"])


def test_bad_training_flags_are_told_before_the_queue(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--norm contra needs a step"):
        main(["--", f"--output_dir={tmp_path / 'x'}"])
    with pytest.raises(UserError, match="output_dir"):
        main([])
    assert not (tmp_path / "x").exists()


def test_dry_run_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--scale=0.1", "--batch_size=128", f"--output_dir={tmp_path / 'x'}"]
    assert main(["--nodes=2", "--gpus=4", "--dry_run", "--", *flags]) == 0
    out = capsys.readouterr().out
    assert "tasks_per_node: 4" in out
    assert "8 processes, effective batch 1024" in out
    assert not (tmp_path / "x").exists()


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="nothing submitted"):
        main(["--gpus=1", "--", "--scale=0.1", f"--output_dir={tmp_path / 'x'}"])


def test_a_stopped_run_goes_back_to_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the run has saved, submitit's own handler gets the signal, and asks for the same command again."""
    heard: list[int] = []

    def stopped(argv: list[str]) -> None:
        raise Interrupted(signal.SIGUSR2)

    class Environment:
        def export(self, **settings: object) -> None:
            assert settings == {"set_cuda_visible_devices": False, "overwrite": True}

    monkeypatch.setattr("ViT_imagenet.main.main", stopped)
    monkeypatch.setattr(run_with_submitit.submitit.helpers, "TorchDistributedEnvironment", Environment)
    before = signal.signal(signal.SIGUSR2, lambda signum, frame: heard.append(signum))
    try:
        assert Training(["--scale=0.1"])() == 0
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert heard == [signal.SIGUSR2]
    again = Training(["--scale=0.1"]).checkpoint()
    assert isinstance(again.function, Training)
    assert again.function.argv == ["--scale=0.1"]

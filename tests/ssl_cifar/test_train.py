"""Whole runs: records, resuming after any end, several processes, bad images."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from repro.errors import Interrupted, UserError
from repro.run.run import Run
from SSL_cifar import methods
from SSL_cifar.engine import Trainer, accelerator_for
from SSL_cifar.main import main, parse

from .conftest import METHOD_FLAGS

FlagsOf = Callable[[str], list[str]]


def record(folder: Path) -> dict:
    return json.loads((folder / "record.json").read_text())


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def same_run(one: Path, other: Path) -> None:
    """Weights, curves and metrics are equal to the last bit; seconds are not compared."""
    assert same_weights(one, other)
    for a, b in zip(lines(one), lines(other), strict=True):
        assert {k: v for k, v in a.items() if k != "images_per_second"} == {
            k: v for k, v in b.items() if k != "images_per_second"
        }
    assert record(one)["metrics"] == record(other)["metrics"]


def test_every_method_has_quick_flags() -> None:
    assert sorted(METHOD_FLAGS) == methods.NAMES


def test_a_run_ends_with_a_record(
    quick: list[str], flags_of: FlagsOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*quick, *flags_of("simclr"), "--probe", "--knn_every=1", f"--output_dir={tmp_path / 'a'}"]
    main(flags)
    done = record(tmp_path / "a")
    assert done["experiment"] == "SSL_cifar" and done["selection"] == "last epoch"
    assert done["cell"]["method"] == "SimCLR τ=0.5" and done["cell"]["model"] == "resnet18"
    assert done["metrics"]["test_images"] == 11 and done["train_images"] == 24
    for name in ("knn_accuracy", "linear_accuracy"):
        assert done["metrics"][name] * 11 == pytest.approx(round(done["metrics"][name] * 11))
    assert done["metrics"]["train_loss"] == lines(tmp_path / "a")[-1]["train_loss"]
    assert {"erank_cov_h", "uniformity"} <= done["metrics"].keys() and done["spectrum"][0] == 1
    assert "knn_accuracy" in lines(tmp_path / "a")[0]
    assert not (tmp_path / "a" / "checkpoints").exists()
    said = capsys.readouterr().out
    assert "8 x 1 processes = 8; lr 0.05 (as given); 3 steps per epoch" in said
    main(flags)
    assert "done already" in capsys.readouterr().out


@pytest.mark.parametrize("name", methods.NAMES)
def test_stopped_anywhere_and_started_again_gives_the_same_run(
    name: str, quick: list[str], flags_of: FlagsOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every method: its banks, queues, averages and counters are in the checkpoint."""
    flags = [*quick, *flags_of(name), "--checkpoint_every=1"]
    main([*flags, f"--output_dir={tmp_path / 'whole'}"])
    real = Run.checkpoint
    ends = {3, 5}  # an epoch's end, and the middle of the next

    def die(self: Run, step: int, state: object) -> None:
        real(self, step, state)
        if step in ends:
            ends.remove(step)
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "checkpoint", die)
    while ends:
        with pytest.raises(KeyboardInterrupt):
            main([*flags, f"--output_dir={tmp_path / 'stopped'}"])
    main([*flags, f"--output_dir={tmp_path / 'stopped'}"])
    same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.fixture(scope="module")
def long(quick: list[str], flags_of: FlagsOf) -> list[str]:
    return [*quick, *flags_of("simsiam_multi"), "--checkpoint_every=1", "--epochs=7"]


@pytest.fixture(scope="module")
def whole(long: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    main([*long, f"--output_dir={folder}"])
    return folder


def test_killed_in_mid_epoch_and_started_again(
    long: list[str], whole: Path, tmp_path: Path, python: str, root: Path
) -> None:
    flags, folder = long, tmp_path / "killed"
    process = subprocess.Popen(
        [python, "-m", "SSL_cifar.main", *flags, f"--output_dir={folder}"], cwd=root, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (folder / "checkpoints" / "step-0000000004").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    assert process.wait(timeout=100) == -signal.SIGKILL
    assert not (folder / "record.json").exists()
    main([*flags, f"--output_dir={folder}"])
    same_run(whole, folder)


def test_a_signal_is_taken_at_the_end_of_a_step(
    quick: list[str], flags_of: FlagsOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from SSL_cifar.engine import Trainer

    real = Trainer.step

    def stopped(self: Trainer, views: object, batch: object, number: int) -> object:
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, views, batch, number)

    flags = [*quick, *flags_of("simclr"), f"--output_dir={tmp_path / 'a'}"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopped)
        with pytest.raises(Interrupted):
            main(flags)
    assert [path.name for path in (tmp_path / "a" / "checkpoints").glob("step-*")] == ["step-0000000002"]


def test_images_in_memory_and_from_workers_give_the_same_run(
    quick: list[str], flags_of: FlagsOf, tmp_path: Path
) -> None:
    flags = [*quick, *flags_of("simclr_attn")]
    main([*flags, f"--output_dir={tmp_path / 'memory'}"])
    main([*flags, "--no_cache", "--num_workers=2", f"--output_dir={tmp_path / 'workers'}"])
    for name, a in load_file(tmp_path / "memory" / "model.safetensors").items():
        torch.testing.assert_close(
            load_file(tmp_path / "workers" / "model.safetensors")[name], a, rtol=0, atol=1e-5, msg=name
        )
    assert (
        record(tmp_path / "memory")["metrics"]["knn_accuracy"]
        == record(tmp_path / "workers")["metrics"]["knn_accuracy"]
    )


@pytest.mark.parametrize("cache", ["--cache", "--no_cache"])
def test_bad_images_end_the_run_or_are_counted(
    cache: str, quick: list[str], flags_of: FlagsOf, make_parquet: Callable[..., Path], tmp_path: Path
) -> None:
    flags = [*quick, *flags_of("simsiam_multi"), f"--data_path={make_parquet(bad=(4,))}", cache, "--num_workers=0"]
    with pytest.raises(UserError, match="row 4.*--on-bad-image skip"):
        main([*flags, f"--output_dir={tmp_path / 'fails'}"])
    assert not (tmp_path / "fails" / "record.json").exists()
    main([*flags, "--on_bad_image=skip", f"--output_dir={tmp_path / 'skips'}"])
    done = record(tmp_path / "skips")
    assert done["metrics"]["test_images"] == 10 and done["train_images"] == 24
    assert [name.split(" (")[0] for name in done["bad_images"]] == [
        f"{split}-00000-of-00001.parquet, row 4" for split in ("train", "test")
    ]


def test_a_bad_image_is_left_out_of_evaluation_with_and_without_cache(
    quick: list[str], flags_of: FlagsOf, make_parquet: Callable[..., Path], tmp_path: Path
) -> None:
    config = parse(
        [*quick, *flags_of("simclr"), f"--data_path={make_parquet(bad=(4, 23))}", "--on_bad_image=skip", "--probe"]
        + ["--num_workers=0", f"--output_dir={tmp_path}"]
    )
    found = []
    for cache in (True, False):
        trainer = Trainer(replace(config, cache=cache), accelerator_for(config))
        train, test = (
            trainer.evaluation.features(trainer.method.eval(), half)
            for half in (trainer.evaluation.train, trainer.evaluation.test)
        )
        found.append((trainer.evaluation.full(trainer.method)[0], len(train[1]), len(test[1])))
        taken = torch.cat([batch.index for _, batch in trainer.batches.epoch(0, 0)])
        assert len(taken) == 24 and not {4, 23} & set(taken.tolist())  # training takes the next image instead
    assert found[0][1:] == found[1][1:] == (22, 10)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4, abs=1e-5)


def test_a_checkpoint_of_other_images_is_refused(
    quick: list[str],
    flags_of: FlagsOf,
    make_parquet: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def die(self: Run, step: int, state: object, real: Callable[..., None] = Run.checkpoint) -> None:
        real(self, step, state)
        raise KeyboardInterrupt

    flags = [*quick, *flags_of("simsiam_multi"), "--checkpoint_every=1", f"--output_dir={tmp_path / 'a'}"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "checkpoint", die)
        with pytest.raises(KeyboardInterrupt):
            main(flags)
    with pytest.raises(UserError, match="was trained with 24 images, the data here give 30: use the same data"):
        main([*flags, f"--data_path={make_parquet(train=30)}"])


def test_a_diverged_run_names_flag_and_step(
    quick: list[str], flags_of: FlagsOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = methods.load("rdm_simsiam")
    real = kind.forward

    def diverges(self: object, views: object, batch: object) -> dict[str, torch.Tensor]:
        return {name: rows * float("nan") for name, rows in real(self, views, batch).items()}

    monkeypatch.setattr(kind, "forward", diverges)
    flags = [*quick, *flags_of("rdm_simsiam")]
    with pytest.raises(UserError, match="not finite at epoch 0, step 0: lower --lr 0.05"):
        main([*flags, f"--output_dir={tmp_path / 'a'}"])
    with pytest.raises(UserError, match="loss is nan at epoch 0, step 0: lower --lr 0.05"):
        main([*flags, "--sigma=0", f"--output_dir={tmp_path / 'b'}"])

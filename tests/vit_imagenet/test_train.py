from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from repro.config import parse_config
from repro.errors import Interrupted, UserError, run_main
from repro.images.data import load_data
from repro.report.figures import main as figures
from repro.run.run import Run
from repro.weights import read_state
from tests.image_sets import picture
from ViT_imagenet.config import Config
from ViT_imagenet.main import main
from ViT_imagenet.predict import main as predict


def record(folder: Path) -> dict:
    return json.loads((folder / "record.json").read_text())


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_weights(one: Path, other: Path, name: str = "model.safetensors") -> bool:
    a, b = load_file(one / name), load_file(other / name)
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def flags(quick: list[str], parquet: Path) -> list[str]:
    return [*quick, f"--data_path={parquet}"]


@pytest.fixture(scope="module")
def undisturbed(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "whole"
    main([*flags, "--checkpoint_every=2", f"--output_dir={folder}"])
    return folder


def test_a_run_ends_with_a_record(undisturbed: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    done = record(undisturbed)
    assert done["metrics"]["test_images"] == 11
    assert 0 <= done["metrics"]["test_accuracy"] <= 1
    assert done["metrics"]["test_accuracy"] * 11 == pytest.approx(round(done["metrics"]["test_accuracy"] * 11))
    assert done["selection"] == "last epoch"
    assert done["images_per_second"] > 0
    assert [line["epoch"] for line in lines(undisturbed)] == [0, 1]
    assert not (undisturbed / "checkpoints").exists()
    before = (undisturbed / "record.json").read_bytes()
    main([*flags, "--checkpoint_every=2", f"--output_dir={undisturbed}"])
    assert "done already" in capsys.readouterr().out
    assert (undisturbed / "record.json").read_bytes() == before


def test_start_tells_norms_and_learning_rate(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*flags, "--no_unscaled_lr", "--accumulate=2", "--lr=5e-4", "--epochs=1", f"--output_dir={tmp_path / 'a'}"])
    out = capsys.readouterr().out
    assert "5 of 5 are ContraNorm, blocks.0.norm1 .. norm (scale=0.1" in out
    assert "4 x 2 x 1 processes = 8; lr 7.81e-06 (0.0005 x 8 / 512)" in out
    at = flags.index("--scale")
    vanilla = flags[:at] + flags[at + 2 :]
    main([*vanilla, "--norm=vanilla", "--epochs=1", f"--output_dir={tmp_path / 'b'}"])
    assert "none of 5 is ContraNorm (vanilla)" in capsys.readouterr().out


def test_killed_in_mid_epoch_and_started_again_gives_the_same_weights(
    undisturbed: Path, flags: list[str], tmp_path: Path, python: str, root: Path
) -> None:
    folder = tmp_path / "killed"
    command = [*flags, "--checkpoint_every=2", f"--output_dir={folder}"]
    process = subprocess.Popen(
        [python, "-m", "ViT_imagenet.main", *command], cwd=root, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    wanted = folder / "checkpoints" / "step-0000000002" / "manifest.json"  # 2 of 6 steps of the first epoch
    deadline = time.monotonic() + 120
    while not wanted.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    main(command)
    assert same_weights(undisturbed, folder)
    assert same_weights(undisturbed, folder, "model_ema.safetensors")
    for whole, again in zip(lines(undisturbed), lines(folder), strict=True):
        for key in set(whole) - {"images_per_second"}:
            assert whole[key] == again[key], key


@pytest.mark.parametrize(
    "step", [3, 6, pytest.param(1, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)]
)
def test_stopped_by_a_signal_anywhere_and_started_again_gives_the_same_weights(
    step: int, undisturbed: Path, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM is taken at the end of a step; every point of an epoch, its end too, must be one to resume from."""
    from ViT_imagenet import train

    taken = 0
    real = train.batch_loss  # once per step: no accumulation here

    def counted(*arguments: object) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    folder = tmp_path / "stopped"
    command = [*flags, "--checkpoint_every=2", f"--output_dir={folder}"]
    monkeypatch.setattr(train, "batch_loss", counted)
    with pytest.raises(Interrupted):
        main(command)
    assert taken == step
    main(command)
    assert same_weights(undisturbed, folder)


def test_workers_and_accumulation_do_not_change_the_weights(
    undisturbed: Path, flags: list[str], tmp_path: Path
) -> None:
    main([*flags, "--checkpoint_every=2", "--num_workers=2", f"--output_dir={tmp_path / 'workers'}"])
    assert same_weights(undisturbed, tmp_path / "workers")
    still = [*flags, "--drop_path=0", "--epochs=1"]
    main([*still, f"--output_dir={tmp_path / 'whole batch'}"])
    main([*still, "--batch_size=2", "--accumulate=2", f"--output_dir={tmp_path / 'accumulated'}"])
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole batch", "accumulated"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)


def test_two_processes_count_every_image_once_and_step_like_one(
    quick: list[str], make_parquet: Callable[..., Path], tmp_path: Path, python: str, root: Path
) -> None:
    """One step of 8 images, Mixup, CutMix and random erasing on; 11 test images on 2 processes."""
    folder = make_parquet(train=8, test=11)
    # Adam divides by the gradient's size: where a gradient is almost 0, rounding alone decides its first step. Plain
    # SGD shows the gradients as they are.
    flags = [
        *quick,
        "--cpu" if torch.accelerator.is_available() else "--no_cpu",  # without a GPU the flag must not be needed
        f"--data_path={folder}",
        "--epochs=1",
        "--drop_path=0",
        "--warmup_epochs=0",
        "--opt=sgd",
        "--lr=0.1",
    ]
    main([*flags, "--batch_size=8", f"--output_dir={tmp_path / 'one'}"])
    result = subprocess.run(
        [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "ViT_imagenet.main",
         *flags, "--batch_size=4", f"--output_dir={tmp_path / 'two'}"],
        cwd=root, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert (tmp_path / "two" / "record.json").exists(), result.stderr[-3000:]  # the record decides, not gloo's farewell
    one, two = record(tmp_path / "one"), record(tmp_path / "two")
    assert two["processes"] == 2
    assert two["metrics"]["test_images"] == 11
    assert two["metrics"]["test_accuracy"] == one["metrics"]["test_accuracy"]
    assert lines(tmp_path / "two")[0]["train_loss"] == pytest.approx(lines(tmp_path / "one")[0]["train_loss"], abs=1e-5)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=1e-5)


def test_processes_that_do_not_find_each_other_are_told(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}
    alone = SimpleNamespace(num_processes=1)
    monkeypatch.setattr("accelerate.Accelerator", lambda **settings: asked.update(settings) or alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one of 2 processes that do not find each other"):
        main([*flags, "--no_cpu", f"--output_dir={tmp_path / 'a'}"])
    assert asked["cpu"] is not torch.accelerator.is_available()


def test_bad_images_end_the_run_or_are_counted(
    quick: list[str], make_parquet: Callable[..., Path], tmp_path: Path
) -> None:
    flags = [*quick, f"--data_path={make_parquet(bad=(4,))}", "--epochs=1"]
    with pytest.raises(UserError, match="row 4"):
        main([*flags, f"--output_dir={tmp_path / 'fails'}"])
    assert not (tmp_path / "fails" / "record.json").exists()
    main([*flags, "--on-bad-image=skip", f"--output_dir={tmp_path / 'skips'}"])
    done = record(tmp_path / "skips")
    assert done["metrics"]["test_images"] == 10
    assert [name.split(" (")[0] for name in done["bad_images"]] == [
        f"{split}-00000-of-00001.parquet, row 4" for split in ("train", "test")
    ]


def test_eval_finetune_and_resume(undisturbed: Path, flags: list[str], tmp_path: Path) -> None:
    main([*flags, "--eval", f"--resume={undisturbed}", f"--output_dir={tmp_path / 'eval'}"])
    assert record(tmp_path / "eval")["metrics"]["test_accuracy"] == record(undisturbed)["metrics"]["test_accuracy"]
    assert record(tmp_path / "eval")["metrics"]["test_loss"] == pytest.approx(
        record(undisturbed)["metrics"]["test_loss"]
    )
    with pytest.raises(UserError, match="trained with scale=0.1, not 0.2"):
        main([*flags, "--scale=0.2", "--eval", f"--resume={undisturbed}", f"--output_dir={tmp_path / 'other'}"])
    main([*flags, "--epochs=1", "--input_size=48", f"--finetune={undisturbed / 'model.safetensors'}", "--probe",
          f"--output_dir={tmp_path / 'larger'}"])  # fmt: skip
    done = record(tmp_path / "larger")
    assert done["collapse"]["layer"] == done["collapse_untrained"]["layer"] == [1, 2]
    assert done["collapse"] != done["collapse_untrained"] and sum(done["spectrum"]) == pytest.approx(1)
    assert load_file(tmp_path / "larger" / "model.safetensors")["pos_embed"].shape == (1, 37, 128)


def test_weights_of_another_number_of_classes(
    undisturbed: Path, quick: list[str], make_parquet: Callable[..., Path], tmp_path: Path
) -> None:
    flags = [*quick, "--epochs=1", f"--data_path={make_parquet(classes=4)}", f"--finetune={undisturbed}"]
    with pytest.raises(UserError, match="3 classes, the data 4.*--reset-head"):
        main([*flags, f"--output_dir={tmp_path / 'a'}"])
    assert not (tmp_path / "a").exists()
    main([*flags, "--reset-head", f"--output_dir={tmp_path / 'b'}"])
    assert record(tmp_path / "b")["metrics"]["test_images"] == 11
    with pytest.raises(UserError, match="does not fit the model: blocks.2"):
        main([*flags, "--reset-head", "--depth=3", f"--output_dir={tmp_path / 'c'}"])


def test_plain_weights_start_a_contranorm_model(flags: list[str], tmp_path: Path) -> None:
    plain = timm.create_model("deit_micro_patch8_32", depth=2, num_classes=3)
    torch.save({"model": plain.state_dict()}, tmp_path / "plain.pth")
    main(
        [*flags, "--epochs=1", "--learnable", f"--finetune={tmp_path / 'plain.pth'}", f"--output_dir={tmp_path / 'r'}"]
    )
    assert "blocks.0.norm1.step" in load_file(tmp_path / "r" / "model.safetensors")
    with pytest.raises(UserError, match=r"blocks.0.norm1.step is missing there"):
        main([*flags, "--learnable", "--eval", f"--resume={tmp_path / 'plain.pth'}", f"--output_dir={tmp_path / 's'}"])


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation(kind: str, flags: list[str], tmp_path: Path) -> None:
    teacher = timm.create_model("deit_micro_patch8_32", num_classes=3)
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    more = [f"--distillation-type={kind}", "--teacher-model=deit_micro_patch8_32", "--epochs=1"]
    with pytest.raises(UserError, match="no distillation token"):
        main([*flags, *more, f"--teacher-path={tmp_path / 'teacher.safetensors'}", f"--output_dir={tmp_path / 'a'}"])
    more += ["--model=deit_tiny_distilled_patch16_224", "--input_size=32"]
    with pytest.raises(UserError, match="untrained teacher"):
        main([*flags, *more, f"--output_dir={tmp_path / 'b'}"])
    main([*flags, *more, f"--teacher-path={tmp_path / 'teacher.safetensors'}", f"--output_dir={tmp_path / 'c'}"])
    assert record(tmp_path / "c")["metrics"]["test_images"] == 11


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A run that ends as soon as it has saved the checkpoint of a step, or the first one."""
    real = Run.checkpoint

    def run(arguments: list[str], at: int | None = None) -> None:
        def die(self: Run, step: int, state: object) -> None:
            real(self, step, state)
            if at in (None, step):
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Run, "checkpoint", die)
            with pytest.raises(KeyboardInterrupt):
                main(arguments)

    return run


def test_resume_goes_on_from_another_folders_checkpoint(
    undisturbed: Path, flags: list[str], tmp_path: Path, interrupted: Callable[..., None]
) -> None:
    command = [*flags, "--checkpoint_every=2"]
    interrupted([*command, f"--output_dir={tmp_path / 'first'}"], at=4)
    main([*command, f"--resume={tmp_path / 'first'}", f"--output_dir={tmp_path / 'second'}"])
    assert same_weights(undisturbed, tmp_path / "second")
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        main([*command, f"--resume={undisturbed}", f"--output_dir={tmp_path / 'third'}"])


def test_another_model_is_not_resumed_and_a_new_average_starts_from_the_weights(
    flags: list[str], tmp_path: Path, interrupted: Callable[..., None]
) -> None:
    first = tmp_path / "first"
    interrupted([*flags, "--no_model_ema", f"--output_dir={first}"])
    (checkpoint,) = (first / "checkpoints").glob("step-*")
    with pytest.raises(UserError, match="trained with scale=0.1, not 0.2"):
        main([*flags, "--scale=0.2", f"--resume={checkpoint}", f"--output_dir={tmp_path / 'other'}"])
    assert not (tmp_path / "other").exists()
    more = [f"--resume={checkpoint}", "--model_ema_decay=0.999999", f"--output_dir={tmp_path / 'second'}"]
    main([*flags, *more])
    before, average = read_state(str(first))["model"], load_file(tmp_path / "second" / "model_ema.safetensors")
    for name in average:
        torch.testing.assert_close(average[name], before[name], rtol=0, atol=1e-6)


def test_a_diverged_run_is_told(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ViT_imagenet import train

    monkeypatch.setattr(train, "batch_loss", lambda setup, x, y: setup.model(x).sum() * float("nan"))
    with pytest.raises(UserError, match="loss is nan at epoch 0"):
        main([*flags, f"--output_dir={tmp_path / 'a'}"])


@pytest.mark.parametrize(
    "more",
    [
        ["--data_path=/nowhere"],
        ["--input_size=33"],
        ["--depth=0"],
        ["--norm=vanilla"],
        ["--mixed_precision=fp16"],
        ["--batch_size=30"],
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_no_folder(
    more: list[str], flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run_main(lambda: main([*flags, *more, f"--output_dir={tmp_path / 'a'}"]))
    assert left.value.code == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert not (tmp_path / "a").exists()


def test_a_checkpoint_in_mid_epoch_needs_the_same_steps(
    flags: list[str], tmp_path: Path, interrupted: Callable[..., None]
) -> None:
    interrupted([*flags, "--checkpoint_every=2", f"--output_dir={tmp_path / 'first'}"])
    with pytest.raises(UserError, match="step 2 of 6 of an epoch, which has 3 steps here"):
        main([*flags, "--accumulate=2", f"--resume={tmp_path / 'first'}", f"--output_dir={tmp_path / 'second'}"])


def test_deit_3s_loss_and_augmentation(flags: list[str], tmp_path: Path) -> None:
    more = ["--bce-loss", "--smoothing=0", "--ThreeAugment", "--src", "--epochs=1"]
    main([*flags, *more, f"--output_dir={tmp_path / 'mixed'}"])
    assert 0 < lines(tmp_path / "mixed")[0]["train_loss"] < 1.5  # 0.69 for each of three undecided classes, averaged
    main([*flags, *more, "--mixup=0", "--cutmix=0", f"--output_dir={tmp_path / 'plain'}"])
    assert record(tmp_path / "plain")["metrics"]["test_images"] == 11


def test_predict_names_the_class_of_an_image(
    undisturbed: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in range(3):
        picture(label, 99).save(tmp_path / f"{label}.png")
    files = [str(tmp_path / f"{label}.png") for label in range(3)]
    predict(["--model", str(undisturbed), "--image", f"[{', '.join(files)}]"])
    rows = [row.split("\t") for row in capsys.readouterr().out.splitlines()]
    assert [row[2] for row in rows] == [name for name in files for _ in range(3)]
    assert {row[0] for row in rows} == {"c0", "c1", "c2"}
    for start in (0, 3, 6):
        numbers = [float(row[1]) for row in rows[start : start + 3]]
        assert sum(numbers) == pytest.approx(1, abs=2e-4) and numbers == sorted(numbers, reverse=True)
    assert [rows[start][0] for start in (0, 3, 6)] == ["c0", "c1", "c2"]  # the run's test accuracy is 1
    predict(["--model", str(undisturbed), "--image", files[0], "--top=1", "--ema"])
    assert len(capsys.readouterr().out.splitlines()) == 1
    (tmp_path / "text.png").write_text("no image")
    for wrong, said in (("text.png", "text.png"), ("gone.png", "gone.png")):
        with pytest.raises(UserError, match=f"{said} .*not readable as an image"):
            predict(["--model", str(undisturbed), "--image", str(tmp_path / wrong)])
    moved = tmp_path / "moved"  # to a machine without the images that it was trained on
    shutil.copytree(undisturbed, moved)
    settings = (moved / "args.yaml").read_text()
    (moved / "args.yaml").write_text(re.sub("(?m)^data_root: .*", "data_root: /gone", settings))
    predict(["--model", str(moved), "--image", files[0], "--top=1"])
    assert capsys.readouterr().out.startswith("c0")
    with pytest.raises(UserError, match="--top must be at least 1, got 0"):
        predict(["--model", str(undisturbed), "--image", files[0], "--top=0"])
    with pytest.raises(UserError, match=r"no model.safetensors there"):
        predict(["--model", str(tmp_path), "--image", files[0]])


def test_the_effective_batch_is_printed_and_can_be_resumed_with_other_micro_batches(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*flags, "--effective_batch=8", "--epochs=1", f"--output_dir={tmp_path / 'a'}"])
    assert "4 x 2 x 1 processes = 8" in capsys.readouterr().out
    main([*flags, "--accumulate=2", "--epochs=1", f"--output_dir={tmp_path / 'b'}"])
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_another_processors_kernels_give_the_same_accuracy(
    undisturbed: Path, flags: list[str], tmp_path: Path, python: str, root: Path
) -> None:
    """The README's tolerance: the saved weights' loss to 1e-4, the same accuracy."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    subprocess.run(
        [python, "-m", "ViT_imagenet.main", *flags, "--eval", f"--resume={undisturbed}",
         f"--output_dir={tmp_path / 'o'}"],
        cwd=root, env=environment, check=True, capture_output=True,
    )  # fmt: skip
    ours, theirs = record(undisturbed)["metrics"], record(tmp_path / "o")["metrics"]
    assert theirs["test_accuracy"] == ours["test_accuracy"]
    assert theirs["test_loss"] == pytest.approx(ours["test_loss"], abs=1e-4)


def test_curves_are_drawn_from_records(undisturbed: Path, tmp_path: Path) -> None:
    figures(["--records", str(undisturbed), "--kind", "curves", "--output", str(tmp_path / "curves")])
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".svg"}


def test_held_out_training_images_take_the_place_of_the_test_images(flags: list[str], tmp_path: Path) -> None:
    folders = []
    for seed in ("0", "1"):
        folders.append(tmp_path / seed)
        main([*flags, "--hold_out=0.25", "--epochs=1", f"--seed={seed}", f"--output_dir={folders[-1]}"])
        done = record(folders[-1])
        assert done["metrics"]["validation_images"] == 6  # of 24 training images
        assert {"validation_accuracy", "validation_accuracy_ema", "best_epoch_validation_accuracy"} < set(
            done["metrics"]
        )
        assert not [name for name in done["metrics"] if "test" in name]
        assert done["protocol"] == "CIFAR10 held-out 0.25 of train, top-1, centre crop"
        assert done["config"]["hold_out"] == 0.25
    parts = [load_data(parse_config(Config, [*flags, f"--output_dir={f}"], prog="x"), hold_out=0.25) for f in folders]
    train, held = (set(half.indices) for half in (parts[0].train, parts[0].test))
    assert len(train) == 18 and len(held) == 6 and not train & held
    assert held == set(parts[1].test.indices)
    with pytest.raises(UserError, match="--hold_out is a share"):
        main([*flags, "--hold_out=1", f"--output_dir={tmp_path / 'none'}"])
    assert not (tmp_path / "none").exists()

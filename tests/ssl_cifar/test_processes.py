"""Two gloo processes give one process's losses and gradients, in float64, for every method; and a run of both ends."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from SSL_cifar import methods
from SSL_cifar.main import main

from .conftest import METHOD_FLAGS
from .steps import steps

FlagsOf = Callable[[str], list[str]]
ROOM = Path(__file__).parent


@pytest.fixture(scope="module")
def found(
    quick: list[str], flags_of: FlagsOf, tmp_path_factory: pytest.TempPathFactory, python: str, root: Path
) -> tuple[Path, Path]:
    """Folders with a file for each method, and a whole run: of one process, and of two."""
    folder = tmp_path_factory.mktemp("steps")
    one, two = folder / "one", folder / "two"
    lines = {name: [*quick, *flags_of(name), "--output_dir=x"] for name in METHOD_FLAGS}
    whole = [*quick, *flags_of("simclr"), "--lr=1e-4", "--epochs=1"]
    pair = subprocess.Popen(
        [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOM / "steps.py"), str(two),
         json.dumps(lines), *whole],
        cwd=root, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    steps(one, lines)
    main([*whole, f"--output_dir={one / 'run'}"])
    told = pair.communicate(timeout=280)[1]
    assert (two / "run" / "record.json").exists(), told[-3000:]  # the record decides, not gloo's farewell
    return one, two


@pytest.mark.parametrize("name", methods.NAMES)
def test_two_processes_give_one_processs_loss_gradients_and_state(name: str, found: tuple[Path, Path]) -> None:
    one, two = (load_file(folder / f"{name}.safetensors") for folder in found)
    assert one.keys() == two.keys() and one["loss.0"].dtype == torch.float64
    assert any(name.startswith("grad.") and value.abs().max() > 1e-6 for name, value in one.items())
    for key, value in one.items():
        first = key == "loss.0" or key.startswith("grad.")  # later ones: rounding has gone through five steps
        tolerance = 1e-10 if first else 1e-6
        torch.testing.assert_close(
            two[key], value, rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )
    kept = [k for k in one if ".bank." in k or ".queue." in k or ".momentum." in k]
    if name in ("simsiam_multi", "moco", "byol", "rdm_byol", "arcl"):
        assert kept


def test_a_run_of_two_processes(found: tuple[Path, Path]) -> None:
    """Features of 24 + 11 images are computed in halves, each image once."""
    one, two = (json.loads((folder / "run" / "record.json").read_text()) for folder in found)
    assert two["processes"] == 2 and two["metrics"]["test_images"] == 11
    for name in ("train_loss", "erank_cov_h", "uniformity"):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], abs=1e-3)

"""Steps of each method in float64, by any number of processes, a file for each; then a whole run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from SSL_cifar.engine import Trainer, accelerator_for
from SSL_cifar.main import main, parse


def steps(folder: Path, lines: dict[str, list[str]]) -> None:
    """Two epochs of one step: losses, gradients of the first step, and all that the method keeps in the end."""
    folder.mkdir(exist_ok=True)
    torch.set_default_dtype(torch.float64)
    try:
        for name, flags in lines.items():
            AcceleratorState._reset_state(reset_partial_state=False)
            accelerator = accelerator_for(config := parse([*flags, "--max_train_samples=8"]))
            trainer = Trainer(config, accelerator)
            found, number = {}, 0
            for epoch in range(2):
                for views, batch in trainer.batches.epoch(epoch, 0):
                    found[f"loss.{number}"] = trainer.step(views, batch, number)[0]
                    if number == 0:
                        named = trainer.method.named_parameters()
                        found |= {f"grad.{k}": p.grad.clone() for k, p in named if p.grad is not None}
                    number += 1
                trainer.method.after_epoch()
            found |= {f"state.{k}": v.clone() for k, v in trainer.method.state_dict().items()}
            if accelerator.is_main_process:
                save_file({k: v.contiguous() for k, v in found.items()}, folder / f"{name}.safetensors")
    finally:
        torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    steps(folder, json.loads(sys.argv[2]))
    AcceleratorState._reset_state(reset_partial_state=False)
    main([*sys.argv[3:], f"--output_dir={folder / 'run'}"])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort an interpreter that is leaving

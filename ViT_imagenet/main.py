"""Train or evaluate a DeiT, ContraNorm or vanilla: `python -m ViT_imagenet.main --scale 0.1 --output_dir out/run`."""

from __future__ import annotations

from collections.abc import Sequence

from repro.config import parse_config
from repro.errors import UserError, run_main

PRELOAD = ("ViT_imagenet.train",)  # what a process that starts many runs imports once for all of them


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and do one run."""
    from ViT_imagenet.config import Config

    config = parse_config(Config, argv, prog="python -m ViT_imagenet.main", description=str(__doc__))
    config.check_folders()
    # Imported after parsing: a wrong flag is reported before timm and torchvision have loaded.
    import torch
    from accelerate import Accelerator

    from repro.parallel import check_processes
    from repro.run.run import Run
    from ViT_imagenet.train import evaluate_only, prepare, prepare_evaluation, train

    if config.mixed_precision == "fp16" and (config.cpu or not torch.cuda.is_available()):
        raise UserError("--mixed_precision fp16 needs a GPU: use bf16 or no")
    # Without cpu=True torchrun's processes ignore each other on CPUs.
    cpu = config.cpu or not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=cpu)
    check_processes(accelerator.num_processes)
    main_process = accelerator.is_main_process
    run = Run(config.output_dir, "ViT_imagenet", config, main=main_process, report_to=config.report_to)
    if run.done:
        with run:
            return
    # Prepared before the folder is entered: nothing has been written when bad input is refused.
    if config.eval:
        evaluation = prepare_evaluation(config, accelerator)
        with run:
            evaluate_only(evaluation, run)
    else:
        setup = prepare(config, accelerator)
        with run:
            train(setup, run)
    if accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_main(main)

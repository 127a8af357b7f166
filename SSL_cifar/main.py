"""Pre-train one method: `python -m SSL_cifar.main --method simsiam --output_dir out/run`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from repro.config import load_yaml, parse_config
from repro.errors import UserError, run_main
from SSL_cifar.config import Config

PRELOAD = ("SSL_cifar.engine",)  # what a process that starts many runs imports once for all of them
PROG = "python -m SSL_cifar.main"


def chosen_method(argv: Sequence[str]) -> str | None:
    """The method that a command line names, itself or in its --config files; its flags follow from it."""
    words = [word for part in argv for word in (part.split("=", 1) if part.startswith("--") else [part])]
    values = {"method": [], "config": []}
    for flag, value in zip(words, words[1:], strict=False):
        if flag.startswith("--") and flag[2:] in values:
            values[flag[2:]].append(value)
    for path in values["config"] if not values["method"] else []:
        loaded = load_yaml(Path(path))
        if isinstance(loaded, dict) and "method" in loaded:
            values["method"].append(str(loaded["method"]))
    return values["method"][-1] if values["method"] else None


def parse(argv: Sequence[str], prog: str = PROG) -> Config:
    """The settings of the chosen method.

    Raises:
        UserError: no method, an unknown one, a flag that is not the method's.
    """
    from SSL_cifar import methods  # loads torch: the methods' flags stand in their files

    name = chosen_method(argv)
    if name is None:
        if {"-h", "--help"} & set(argv):
            parse_config(Config, argv, prog=prog, description=f"{__doc__} Methods: {', '.join(methods.NAMES)}.")
        raise UserError(f"no --method: choose one of {', '.join(methods.NAMES)}")
    kind = methods.load(name)
    try:
        return parse_config(kind.Settings, argv, prog=prog, description=str(kind.__doc__))
    except UserError as error:
        found = re.search(r"unknown (?:flag --|key ')([\w-]+)", str(error))
        flag = found[1].replace("-", "_") if found else ""
        owners = [other for other in methods.NAMES if flag in methods.load(other).Settings.__dataclass_fields__]
        if not owners:
            raise
        raise UserError(f"--{flag} is a flag of --method {' or '.join(owners)}, not of {name}: leave it out") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and do one run."""
    config = parse(sys.argv[1:] if argv is None else argv)
    config.check_folders()
    import torch  # these after parsing, which needs the methods' flags only

    from repro.run.run import Run
    from SSL_cifar.engine import Trainer, accelerator_for

    accelerator = accelerator_for(config)
    run = Run(config.output_dir, "SSL_cifar", config, main=accelerator.is_main_process, report_to=config.report_to)
    if run.done:
        with run:
            return
    trainer = Trainer(config, accelerator)  # before the folder is entered: nothing is written when input is refused
    with run:
        trainer.train(run)
    if accelerator.num_processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_main(main)

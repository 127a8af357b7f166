"""A tiny resumable experiment without torch, for sweeps: adds up numbers that depend on the seed, step by step.

Like a real one it saves after every step, leaves on SIGTERM and SIGUSR2 with what it has, goes on from there, and
writes its record last. `--pause` makes a step take that many seconds, `--until FILE` makes it wait, in the middle, for
a file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import FrameType


def write(path: Path, value: object) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.02)
    parser.add_argument("--until", type=Path)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    stopped: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        stopped.append(signum)

    for signum in (signal.SIGTERM, signal.SIGUSR2):  # SLURM sends USR2 to every process of a job, not to its head alone
        signal.signal(signum, stop)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if (args.output_dir / "record.json").exists():
        print("done already")
        return 0
    with open(args.output_dir / "starts.txt", "a") as file:
        file.write(f"{os.environ.get('SLURM_JOB_ID', '')}\n")
    state = args.output_dir / "state.json"
    step, total = json.loads(state.read_text()) if state.exists() else (0, 0.0)
    print(f"from step {step}", flush=True)
    while step < args.steps:
        step, total = step + 1, total + random.Random(f"{args.seed} {step}").random()
        write(state, [step, total])
        while args.until is not None and step == args.steps // 2 and not args.until.exists() and not stopped:
            time.sleep(0.05)
        time.sleep(args.pause)
        if stopped:
            print(f"stopped at step {step}", file=sys.stderr)
            return 128 + stopped[0]
    write(args.output_dir / "record.json", {"metrics": {"total": total}, "seed": args.seed, "steps": step})
    return 0


if __name__ == "__main__":
    sys.exit(main())

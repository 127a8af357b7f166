"""`python -m repro.sweep`."""

from repro.errors import run_main
from repro.sweep.sweep import main

if __name__ == "__main__":
    run_main(main)

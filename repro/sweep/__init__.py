"""Many runs: cells, their status, and the launchers that start them. Nothing here imports torch."""

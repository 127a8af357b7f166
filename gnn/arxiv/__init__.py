"""ogbn-arxiv: RevGAT with label reuse, self-distillation and ContraNorm over features (D-ContraNorm)."""

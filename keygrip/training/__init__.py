"""What every training run shares: optimiser recipes, averaged weights, checkpoints, strategies, progress, sweeps."""

"""What every training run shares: optimiser recipes, EMA weights, checkpoints, strategies, progress, sweeps."""

"""Shared parts of all training runs: optimiser recipes, EMA weights, checkpoints, strategies, progress, sweeps."""

"""Shared parts of all training runs: optimizer recipes, EMA weights, checkpoints, strategies, progress, sweeps."""

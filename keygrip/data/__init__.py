"""Demonstrations from disk to typed batches."""

"""Data recorded in simulated environments."""

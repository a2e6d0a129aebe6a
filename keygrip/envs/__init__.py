"""Environments that a policy can be judged in."""

"""A policy behind HTTP, for robots whose computer is not the one with the model."""

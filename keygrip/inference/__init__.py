"""Trained models on users' inputs: generated images, answered questions."""

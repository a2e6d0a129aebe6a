"""Evaluation of trained models: rollouts of policies, answers to questions about videos, generated images."""

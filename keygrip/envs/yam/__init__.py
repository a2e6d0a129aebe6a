"""The simulated YAM cell: scene, tasks, scripted expert and a gymnasium environment (``keygrip.envs.yam.environment``).

Importing this package loads nothing heavy; ``scene`` loads MuJoCo.
"""

"""Readers of other projects' recordings: one module per format, with `detect(root)` and `find(root, calibration)`.

A new format is a module here and a line in `keygrip.data.robot.discovery.FOREIGN_FORMATS`.
"""

"""The embedded data source: a YAM arm at a table in MuJoCo, a scripted expert, a recorder, a gymnasium environment.

Importing this package is light; `keygrip.sim.environment`, `keygrip.sim.scene` and `keygrip.sim.recorder` load MuJoCo.
"""

from __future__ import annotations

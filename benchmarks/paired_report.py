"""Makes the paired report of a sweep again, also of several sweeps under one folder:

python benchmarks/paired_report.py runs/sweeps/geometry_comparison  # the comparisons of sweep=geometry_comparison
python benchmarks/paired_report.py FOLDER geometry_vla/arm_neither  # all others against one
python benchmarks/paired_report.py FOLDER geometry_vla/arm_mean=geometry_vla/arm_pool_4,geometry_vla/arm_pool_16
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from keygrip.config import config_folder
from keygrip.evaluation.paired_report import make_report

SWEEP = "sweep/geometry_comparison.yaml"


def references(given: Sequence[str]) -> Any:
    """Names, or names with the arms that are compared with each; without any those of the sweep."""
    if not given:
        sweep = OmegaConf.load(config_folder() / SWEEP)
        return OmegaConf.to_container(sweep.hydra.callbacks.paired_report.references)
    if len({"=" in each for each in given}) > 1:
        raise ValueError("give all references with their arms (REFERENCE=ARM,ARM), or all without")
    pairs = [each.partition("=") for each in given]
    return {name: arms.split(",") for name, _, arms in pairs} if pairs[0][1] else list(given)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python benchmarks/paired_report.py FOLDER [REFERENCE[=ARM,ARM] ...]")
    try:
        make_report(sys.argv[1], references(sys.argv[2:]))
    except (OSError, ValueError) as error:
        sys.exit(str(error))

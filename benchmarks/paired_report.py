"""Makes the paired report of a sweep again, also of several sweeps under one folder:

python benchmarks/paired_report.py runs/sweeps/geometry_comparison geometry_vla/arm_neither geometry_vla/arm_none
"""

from __future__ import annotations

import sys

from keygrip.evaluation.paired_report import make_report

if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python benchmarks/paired_report.py FOLDER REFERENCE [REFERENCE ...]")
    try:
        make_report(sys.argv[1], sys.argv[2:])
    except (OSError, ValueError) as error:
        sys.exit(str(error))

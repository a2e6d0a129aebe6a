"""Copies a recording with a wrong camera and late images, for the comparison of training on clean, broken and repaired
data; `benchmarks/repaired_data.json` has the commands.

    python benchmarks/repaired_data/damage.py CLEAN BROKEN --degrees 6 --cm 4 --focal-percent 10 --late-frames 3
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import doctor_faults as planted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])  # type: ignore[union-attr]
    parser.add_argument("clean", type=Path)
    parser.add_argument("broken", type=Path)
    parser.add_argument("--degrees", type=float, default=6.0, help="the camera is turned about a drawn axis")
    parser.add_argument("--cm", type=float, default=4.0, help="and shifted in a drawn direction")
    parser.add_argument("--focal-percent", type=float, default=10.0, help="its stored focal length is longer")
    parser.add_argument("--late-frames", type=int, default=3, help="images show what was so many frames ago")
    parser.add_argument("--seed", type=int, default=0, help="of axis and direction")
    options = parser.parse_args()
    fault = planted.Fault(
        kind="calibration",
        magnitude="all at once",
        says="",
        cameras=planted.turned(options.degrees, options.cm, options.focal_percent, options.seed),
        images=planted.shifted(options.late_frames),
    )
    planted.plant(options.clean, options.broken, fault, demos=None)


if __name__ == "__main__":
    main()

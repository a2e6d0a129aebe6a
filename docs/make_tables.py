"""Write the tables of README.md and docs/*.md from the records in benchmarks/: ``python docs/make_tables.py``.

A table is placed between ``<!-- table NAME -->`` and ``<!-- /table -->``. NAME is the name of a function in
``docs/doc_tables`` that returns the table; its docstring describes the table.
"""

from __future__ import annotations

import re
import sys

from doc_tables import foveated_vlm, geometry_vla, metaworld, patch_dit, runtime, volume_query  # noqa: F401  (they register tables)
from doc_tables.base import ROOT, TABLES

PLACE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def main() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        before = path.read_text(encoding="utf-8")
        after = PLACE.sub(lambda place: place[1] + TABLES[place[2]]() + place[3], before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            sys.stdout.write(f"{path.relative_to(ROOT)}: tables written\n")


if __name__ == "__main__":
    main()

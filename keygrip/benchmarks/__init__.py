"""Cases of ``python -m keygrip.bench``: what keygrip costs, measured side by side in one run.

A case is a frozen dataclass of options, built from ``conf/bench.yaml``, whose ``run(quick)`` returns figures by name; a
figure's unit stands in its name. With ``quick`` it takes fewer repetitions, and none further after its
``quick_limit_s``; what it prepares is not limited. New cases need an entry in that file and nothing else.
"""

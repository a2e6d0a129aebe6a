"""Cases of ``python -m keygrip.bench``: what keygrip costs, measured side by side in one run.

A case is a frozen dataclass of options, built from ``conf/bench.yaml``, whose ``run(quick)`` returns figures by name; a
figure's unit stands in its name. With ``quick`` it takes fewer repetitions or smaller sizes. A case with a
``quick_limit_s`` takes no further repetition after so many seconds; others, and what a case prepares, are not limited
in time. New cases need an entry in that file and nothing else.
"""

"""Cases of ``python -m keygrip.bench``: the cost of keygrip, measured together in one run.

A case is a frozen dataclass of options, built from ``conf/bench.yaml``, whose ``run(quick)`` returns figures by name.
The name of a figure contains its unit. With ``quick`` it uses fewer repetitions or smaller sizes. A case with a
``quick_limit_s`` starts no further repetition of a measurement after that many seconds, nor 30 s after the case began,
except that each side has at least 3; other cases, and preparation, have no time limit. A new case needs only an entry
in that file. A case that measures processes other than its own has the class attribute ``in_other_processes = True``.
"""

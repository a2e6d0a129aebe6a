"""Tables of README.md and docs/*.md, made from the records in benchmarks/; see `docs/make_tables.py`."""

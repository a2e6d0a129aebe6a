"""Preparation of shards: one module a source, each a function that ``conf/step`` names."""

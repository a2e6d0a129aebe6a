"""The Meta-World benchmark: 50 tasks of a Sawyer arm with scripted policies (Yu et al., 2020; `metaworld` 3.1).

Importing this package loads neither `metaworld` nor MuJoCo; ``environment`` does.
"""

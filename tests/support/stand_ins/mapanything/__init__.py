"""A stand-in for the package of the same name, which tests do not install: the parts of its interface that are used."""

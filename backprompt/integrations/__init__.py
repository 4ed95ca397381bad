"""Connections with other libraries: scikit-learn, lm-evaluation-harness and TRL.

Modules of this folder may import all other folders except the command line. No other module imports these libraries.
A new integration is a module here, with an extra of its name in `pyproject.toml`.
"""

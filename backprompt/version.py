"""The version of the package: a module of its own, since modules that write it down must not import the package."""

__version__ = "0.1.0"

"""The version of the package, in its own module: modules that record the version must not import the package."""

__version__ = "0.2.0"

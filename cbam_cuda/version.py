"""The version, in one place: pyproject.toml and the compiled module take it from here."""

__version__ = "0.1.0"

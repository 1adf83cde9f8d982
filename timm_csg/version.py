"""The version, for people, checkpoints and the build."""

__version__ = "0.1.0"

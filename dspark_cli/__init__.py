"""dspark: local language models, the same answer sooner."""

__version__ = "0.1.0"

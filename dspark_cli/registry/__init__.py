"""Names, files, what belongs together (models.toml), and what fits this machine."""

from dspark_cli.registry.models import find, load_models
from dspark_cli.registry.resolve import Resolved, resolve

__all__ = ["Resolved", "find", "load_models", "resolve"]

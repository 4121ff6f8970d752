"""Names, files and what belongs together (models.toml)."""

from dspark_cli.registry.models import Entry, KnownDrafter, load_models
from dspark_cli.registry.resolve import Resolved, resolve

__all__ = ["Entry", "KnownDrafter", "Resolved", "load_models", "resolve"]

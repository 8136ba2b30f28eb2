"""Model architectures, and where their weights come from.

`load` is the researcher's door. The names are imported when first asked for: `resolve` needs no JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pjengine.models.loading import load
    from pjengine.models.sources import Source, resolve

__all__ = ["Source", "load", "resolve"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from pjengine.models.loading import load

        return load
    if name in ("Source", "resolve"):
        from pjengine.models import sources

        return getattr(sources, name)
    raise AttributeError(f"module 'pjengine.models' has no attribute {name!r}")

"""`python -m pjengine` is the `pjengine` command."""

from __future__ import annotations

from pjengine.serving.cli import app

if __name__ == "__main__":
    app()

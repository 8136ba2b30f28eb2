"""The JSON files of a model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pjengine.errors import ModelError


def read_json(path: Path, kind: type) -> Any:
    """Parsed file of the given JSON type, dict or list; None where there is no such file; ModelError for any other."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error}); fetch it again") from error
    if not isinstance(value, kind):
        raise ModelError(f"{path}: expected a JSON {'object' if kind is dict else 'array'}, got {type(value).__name__}")
    return value

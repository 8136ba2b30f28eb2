"""The code of docs/researcher.md runs as it stands and does what the text says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "researcher.md"


@pytest.mark.real
def test_researcher_docs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    names: dict[str, Any] = {}

    exec(blocks[0], names)
    answers = names["next_tokens"](names["params"], names["inputs"]).tolist()
    assert [names["tokenizer"].decode([token]) for token in answers] == [" Paris", " cold"]

    exec(blocks[1], names)
    assert 0 < names["after"] < names["before"]

    exec(blocks[2], names)
    assert set(names["lens"]) == {10, 20, 30}
    assert names["lens"][30] == names["next_tokens"](names["params"], names["inputs"]).tolist()

    exec(blocks[3], names)
    assert names["norms"].shape == (30,)
    assert np.isfinite(names["norms"]).all()

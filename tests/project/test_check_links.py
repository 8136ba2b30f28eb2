"""The document check finds what is broken and leaves alone what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.check_links import broken_document_links, broken_root_links


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("models", "pallas_kernels", "serving"):
        (tmp_path / "pjengine" / name).mkdir(parents=True)
        (tmp_path / name).symlink_to(f"pjengine/{name}")
    return tmp_path


def test_good_links_pass(root: Path) -> None:
    page = root / "page.md"
    page.write_text(
        "[a](other.md#part) [b](https://example.org/x) [c](#here) ![d](<pjengine/models>) [e](mailto:a@b.c)\n"
    )
    (root / "other.md").touch()
    assert broken_document_links(page, root) == []
    assert broken_root_links(root) == []


def test_broken_links_are_named(root: Path) -> None:
    page = root / "page.md"
    page.write_text("[a](gone.md) and [b](also/gone.md 'title')\n")
    assert broken_document_links(page, root) == [
        "page.md: broken link gone.md",
        "page.md: broken link also/gone.md",
    ]


def test_code_is_not_read_as_links(root: Path) -> None:
    page = root / "page.md"
    page.write_text("`x[0](y)`\n\n```python\ntable[i](j)\n```\n")
    assert broken_document_links(page, root) == []


@pytest.mark.parametrize("fault", ["missing", "elsewhere", "folder"])
def test_a_wrong_root_link_is_named(root: Path, fault: str) -> None:
    (root / "serving").unlink()
    if fault == "elsewhere":
        (root / "serving").symlink_to("pjengine/models")
    elif fault == "folder":
        (root / "serving").mkdir()
    assert broken_root_links(root) == ["serving: expected a link to pjengine/serving"]

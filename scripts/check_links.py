"""Checks that the root's reading links stand and that the relative links of the tracked Markdown files resolve."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

ROOT_LINKS = {name: f"pjengine/{name}" for name in ("models", "pallas_kernels", "serving")}
FENCE = re.compile(r"^ {0,3}(```|~~~).*?^ {0,3}\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
EXTERNAL = re.compile(r"^(?:[a-z][a-z0-9+.-]*:|#)", re.IGNORECASE)


def broken_root_links(root: Path) -> list[str]:
    """One line for each root link that is missing or points elsewhere."""
    found = []
    for name, target in ROOT_LINKS.items():
        link = root / name
        if not link.is_symlink() or link.readlink() != Path(target) or not link.is_dir():
            found.append(f"{name}: expected a link to {target}")
    return found


def broken_document_links(document: Path, root: Path) -> list[str]:
    """One line for each relative link of a Markdown file that leads nowhere."""
    text = CODE.sub("", FENCE.sub("", document.read_text(encoding="utf-8")))
    targets = [unquote(t.split("#")[0]) for t in LINK.findall(text) if not EXTERNAL.match(t)]
    return [f"{document.relative_to(root)}: broken link {t}" for t in targets if not (document.parent / t).exists()]


def main() -> int:
    root = Path(__file__).resolve().parent.parent
    listed = subprocess.run(
        ["git", "ls-files", "-z", "*.md"], cwd=root, check=True, capture_output=True, text=True
    ).stdout
    documents = [root / name for name in listed.split("\0") if name and (root / name).exists()]
    problems = broken_root_links(root) + [line for d in documents for line in broken_document_links(d, root)]
    print("\n".join(problems), end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

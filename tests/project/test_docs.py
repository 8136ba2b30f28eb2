"""The code of the README and the documents runs as it stands."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.live_server import LiveServer, running

ROOT = Path(__file__).parents[2]
CHAT_MODEL, EMBEDDING_MODEL = "smollm2-135m-instruct", "all-minilm-l6-v2"

pytestmark = pytest.mark.real


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    text = (ROOT / document).read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, cwd=ROOT)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_python(code: str) -> str:
    return run([sys.executable, "-W", "error", "-c", code])


def at(server: LiveServer, code: str) -> str:
    """The code with the document's port replaced by the running server's."""
    changed, count = re.subn(r"http://localhost:\d+", server.url, code)
    assert count
    return changed


@pytest.fixture(scope="module")
def chat_server() -> Iterator[LiveServer]:
    with running(["-m", "pjengine", "serve", CHAT_MODEL, "--port", "0"], seconds=240) as server:
        yield server


@pytest.fixture(scope="module")
def embedding_server() -> Iterator[LiveServer]:
    with running(["-m", "pjengine", "serve", EMBEDDING_MODEL, "--port", "0"], seconds=240) as server:
        yield server


def test_readme_in_process() -> None:
    _, offline, embeddings, research = blocks("README.md", "python")
    assert "→" in run_python(offline)
    assert run_python(embeddings).startswith("(384,) 0.")
    assert run_python(research) == "(5, 49152)\n"


def test_readme_over_http(chat_server: LiveServer) -> None:
    client = blocks("README.md", "python")[0]
    assert len(run_python(at(chat_server, client))) > 10
    (curl,) = (block for block in blocks("README.md", "sh") if block.startswith("curl"))
    check_curl(chat_server, curl, '"chat.completion"')


@pytest.mark.parametrize("index", [0, 1, 2])
def test_offline(index: int) -> None:
    code = blocks("docs/offline.md", "python")
    assert len(code) == 3
    assert run_python(code[index]).strip()


def test_embeddings(embedding_server: LiveServer) -> None:
    in_process, client = blocks("docs/embeddings.md", "python")
    near, far = map(float, run_python(in_process).split())
    assert far < 0.2 < 0.4 < near
    assert run_python(at(embedding_server, client)) == "384\n"
    embed, ranks = (block for block in blocks("docs/embeddings.md", "sh") if "curl" in block)
    check_curl(embedding_server, embed[embed.index("curl") :], '"embedding"')
    check_curl(embedding_server, ranks[ranks.index("curl") :], '"index":1')


def check_curl(server: LiveServer, command: str, expected: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    assert expected in run(["bash", "-euc", at(server, command)])

"""What quickstart says to the server; standard library only: `quickstart_client.py URL ready|chat|embed [TEXT]`."""

from __future__ import annotations

import json
import sys
import urllib.request
from http.client import HTTPResponse


def request(url: str, body: dict[str, object] | None = None) -> HTTPResponse:
    """GET without a body, else POST of JSON; raises URLError or HTTPError."""
    data = None if body is None else json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=300)


def model_name(url: str) -> str:
    return json.load(request(f"{url}/v1/models"))["data"][0]["id"]


def chat(url: str, question: str) -> None:
    """Prints the answer token by token, as it comes."""
    messages = [{"role": "user", "content": question}]
    body = {"model": model_name(url), "messages": messages, "stream": True, "max_tokens": 64, "temperature": 0}
    for line in request(f"{url}/v1/chat/completions", body):
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            raise SystemExit(f"the server answered with an error: {event['error']}")
        for choice in event["choices"]:
            print(choice["delta"].get("content") or "", end="", flush=True)
    print()


def embed(url: str, text: str) -> None:
    """Prints the first elements and the length of the text's embedding."""
    vector = json.load(request(f"{url}/v1/embeddings", {"model": model_name(url), "input": text}))["data"][0][
        "embedding"
    ]
    print(f"[{', '.join(f'{x:.4f}' for x in vector[:6])}, …]  ({len(vector)} numbers)")


def main(url: str, action: str, text: str = "") -> None:
    match action:
        case "ready":
            request(f"{url}/health")
        case "chat":
            chat(url, text)
        case "embed":
            embed(url, text)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])

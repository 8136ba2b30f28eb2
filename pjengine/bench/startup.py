"""Start-up to the first token, in fresh processes: cold, with an empty compile cache, and again with the cache it left.

`python -m pjengine.bench.startup` is such a process: it reads the engine's options as JSON from standard input, and
the last line of its standard output is JSON again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pjengine.config import EngineConfig
from pjengine.errors import PJEngineError
from pjengine.phases import PhaseLog

if TYPE_CHECKING:
    from pjengine.bench.roofline import Roofline

PROMPT_TOKENS = 16


def measure(config: EngineConfig) -> tuple[str, Roofline, list[dict[str, Any]]]:
    """Two starts. This process never touches the device, whose memory the starts need.

    Returns: the device's kind, its roofline, and a row of phases in seconds for the cold and the warm start.
    Raises: PJEngineError with the engine's message if it does not start.
    """
    from pjengine.bench.roofline import Roofline

    ceiling = _run({"config": dataclasses.asdict(config), "job": "roofline"})
    rows = []
    with tempfile.TemporaryDirectory(prefix="pjengine-startup-") as cache:
        options = dataclasses.asdict(dataclasses.replace(config, compile_cache=cache))
        for start in ("cold", "warm"):
            began = time.monotonic()
            phases = _run({"config": options, "job": "start", "began": began})["phases"]
            rows.append({"start": start, **phases, "total": sum(phases.values())})
    return ceiling["device"], Roofline(**ceiling["roofline"]), rows


def _run(task: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, input=json.dumps(task), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise PJEngineError(f"the process that starts the engine ended with code {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise PJEngineError(answer["error"])
    return answer


def _roofline(config: EngineConfig) -> dict[str, Any]:
    import jax

    from pjengine.bench.roofline import measure
    from pjengine.factory import prepare_device

    prepare_device(config)
    return {"device": jax.devices()[0].device_kind, "roofline": dataclasses.asdict(measure())}


def _start(config: EngineConfig, began: float) -> dict[str, Any]:
    """Phases from the start of this process to the first token (or embedding) of a prompt of PROMPT_TOKENS."""
    phases = PhaseLog()
    logger = logging.getLogger("pjengine")
    logger.addHandler(phases)
    logger.setLevel(logging.INFO)

    import jax

    from pjengine.factory import make_engine, prepare_device
    from pjengine.request import Request
    from pjengine.sampling_params import SamplingParams

    phases.mark("imports")
    prepare_device(config)
    jax.devices()
    phases.mark("device")
    engine = make_engine(config, progress=False)
    params = SamplingParams(temperature=0.0, max_tokens=1) if engine.info.kind == "generate" else None
    engine.add(Request(request_id="first", prompt_token_ids=list(range(1, PROMPT_TOKENS + 1)), params=params))
    while engine.has_work:
        engine.step()
    phases.mark("first token")
    return {"phases": phases.seconds(began)}


def main() -> None:
    task = json.loads(sys.stdin.read())
    config = EngineConfig(**task["config"])
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        "roofline": lambda: _roofline(config),
        "start": lambda: _start(config, task["began"]),
    }
    try:
        answer = jobs[task["job"]]()
    except PJEngineError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()

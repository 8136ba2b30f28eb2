"""Embeddings on the GPU: results that take the short way to the host, and those that take JAX's."""

from __future__ import annotations

import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjengine import LLM
from pjengine.cuda_driver import DeviceCopies
from tests.helpers import load_golden, split_rows

pytestmark = pytest.mark.gpu

BERT = Path(__file__).parents[1] / "golden" / "bert"


def test_copies_wait_for_the_program_and_serve_any_thread() -> None:
    copies = DeviceCopies(jax.devices()[0].local_hardware_id)
    x = jax.random.normal(jax.random.key(0), (4096, 4096))
    late = jax.jit(lambda x: jnp.tanh(x @ x @ x @ x)[:8])(x)
    found = [copies.to_host(late)]
    thread = threading.Thread(target=lambda: found.append(copies.to_host(late)))
    thread.start()
    thread.join()
    for copy in found:
        np.testing.assert_array_equal(copy, np.asarray(late))


def test_one_by_one_and_all_together() -> None:
    """A lone text's result is copied by the driver; those of a batch for many rows come as JAX brings them."""
    golden, _ = load_golden("bert")
    prompts = split_rows(golden["tokens"], golden["starts"])
    llm = LLM(str(BERT), dtype="float32")
    alone = [llm.embed([prompt])[0].embedding for prompt in prompts]
    many = [output.embedding for output in llm.embed(prompts * 150)]
    for i, vector in enumerate(many):
        np.testing.assert_allclose(vector, alone[i % len(prompts)], atol=1e-5)

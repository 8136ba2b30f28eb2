"""The Ray Data stage on two local workers, in a process of its own: Ray's warnings are not ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from pjengine import LLM, InvalidRequest
from pjengine.bulk.ray_data import Embedder
from tests.helpers import GOLDEN
from tests.serving.live_server import ROOT

MODEL = "all-minilm-l6-v2"
OPTIONS = {"max_model_len": 32, "max_num_batched_tokens": 32, "dtype": "float32"}
TEXTS = [f"text {i}" for i in range(64)]

PIPELINE = """
import os, sys, time
import pyarrow as pa
import ray
from pjengine.bulk.ray_data import Embedder
from tests.bulk.test_ray import MODEL, OPTIONS, TEXTS

class Signed(Embedder):
    def __call__(self, batch):
        time.sleep(0.1)
        out = super().__call__(batch)
        return out.append_column("worker", pa.array([os.getpid()] * len(out)))

ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 << 20)
rows = ray.data.from_items([{"id": i, "text": text} for i, text in enumerate(TEXTS)], override_num_blocks=8)
rows.map_batches(
    Signed,
    fn_constructor_args=[MODEL],
    fn_constructor_kwargs=OPTIONS,
    batch_format="pyarrow",
    batch_size=8,
    num_cpus=1,
    compute=ray.data.ActorPoolStrategy(size=2),
).write_parquet(sys.argv[1])
"""


def test_batches_that_cannot_be_embedded() -> None:
    embedder = Embedder(str(GOLDEN / "sentence-transformer"), max_num_batched_tokens=32)
    table = embedder(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}))
    assert str(table.schema.field("embedding").type) == "fixed_size_list<item: float>[24]"
    wrong: list[tuple[Any, str]] = [
        (pyarrow.table({"body": ["a"]}), "text_column: 'text' is none of body"),
        (pyarrow.table({"text": ["a", None]}), "text: expected strings, got None in row 1"),
        (pyarrow.table({"text": [5]}), "text: expected strings, got 5"),  # and not a token id
        (pyarrow.table({"text": ["a"], "embedding": [1]}), "embedding: the batches have such a column already"),
        ({"text": ["a"]}, 'batch_format: expected "pyarrow"'),
    ]
    for batch, message in wrong:
        with pytest.raises(InvalidRequest, match=message):
            embedder(batch)


@pytest.mark.real
def test_two_workers_share_a_dataset(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PIPELINE, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    table = pyarrow.parquet.read_table(tmp_path).sort_by("id")
    assert table.column("id").to_pylist() == list(range(64))
    assert len(set(table.column("worker").to_pylist())) == 2
    with LLM(MODEL, **OPTIONS) as llm:
        expected = np.stack([result.embedding for result in llm.embed(TEXTS, use_tqdm=False)])
    np.testing.assert_allclose(np.stack(table.column("embedding").to_numpy()), expected, rtol=0, atol=1e-5)

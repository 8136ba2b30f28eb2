"""Random weights: normal, of the declared spread, the same for a seed, and unlike each other."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from pjengine.models.params import ParamSpec, init_params


def specs(layers: int = 3) -> dict[str, Any]:
    def layer() -> dict[str, ParamSpec]:
        return {
            "matrix": ParamSpec((512, 1024), (None, None), ("m",)),
            "norm": ParamSpec((512,), (None,), ("n",), init="ones"),
            "bias": ParamSpec((3,), (None,), ("b",), init="zeros", dtype="float32"),
        }

    return {"embed": ParamSpec((3000, 512), (None, None), ("e",)), "layers": [layer() for _ in range(layers)]}


def test_they_are_normal_with_the_declared_spread() -> None:
    weights = np.asarray(init_params(specs(), "float32")["embed"]).ravel() / 0.02
    assert abs(weights.mean()) < 4 / np.sqrt(weights.size)
    assert abs(weights.std() - 1) < 4 / np.sqrt(2 * weights.size)
    assert abs((weights**4).mean() - 3) < 4 * np.sqrt(96 / weights.size)
    for limit, share in ((1, 0.317311), (2, 0.045500), (3, 0.002700)):
        assert abs((abs(weights) > limit).mean() - share) < 4 * np.sqrt(share / weights.size)
    assert abs(weights).max() < 5.3


def test_rows_columns_and_arrays_are_independent() -> None:
    """A matrix whose rows or columns follow from each other has other singular values than a random one."""
    params = init_params(specs(), "float32")
    first, second = (np.asarray(params["layers"][i]["matrix"]) / 0.02 for i in (0, 1))
    singular = np.linalg.svd(first, compute_uv=False)
    assert singular[0] == pytest.approx(np.sqrt(1024) + np.sqrt(512), rel=0.02)
    assert singular[-1] == pytest.approx(np.sqrt(1024) - np.sqrt(512), rel=0.05)
    for a, b in ((first, second), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
        assert abs((a * b).mean()) < 4 / np.sqrt(a.size)


def test_a_seed_says_them_all() -> None:
    a, same, other = (jax.tree.leaves(init_params(specs(), "bfloat16", seed)) for seed in (7, 7, 8))
    assert all((x == y).all() for x, y in zip(a, same, strict=True))
    assert not (a[0] == other[0]).all()


def test_constants_and_dtypes_are_as_declared() -> None:
    layer = init_params(specs(), "bfloat16")["layers"][2]
    assert layer["matrix"].dtype == "bfloat16"
    assert layer["bias"].dtype == "float32"
    assert not layer["bias"].any()
    assert (layer["norm"] == 1).all()

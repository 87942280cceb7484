"""Impossible specs can't be built, and the JSON form loses nothing."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlatent.errors import UserError
from kvlatent.model.spec import LatentSpec, check_dims


def spec(**changes: Any) -> LatentSpec:
    fields: dict[str, Any] = {
        "preset": "best",
        "head_dim": 16,
        "d_qk": (8, 8),
        "d_vo": (4, 4),
        "qk_map": "folded",
        "inv_freq": (1.0, 0.5, 0.25, 0.125),
        "per_head_frequencies": False,
        "scale": 0.25,
    }
    return LatentSpec(**(fields | changes))


@settings(max_examples=50)
@given(half_qk=st.integers(1, 8), d_vo=st.lists(st.integers(1, 16), min_size=1, max_size=4), scale=st.floats(1e-3, 1.0))
def test_json_form_loses_nothing(half_qk: int, d_vo: list[int], scale: float) -> None:
    inv_freq = tuple(1.7**-i for i in range(half_qk))
    built = spec(d_qk=(2 * half_qk,) * len(d_vo), d_vo=tuple(d_vo), inv_freq=inv_freq, scale=scale)
    assert LatentSpec.from_dict(json.loads(json.dumps(built.to_dict()))) == built


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_qk": (7, 7)}, "d_qk must be even"),
        ({"d_qk": (0, 0)}, "at least 2"),
        ({"d_qk": (18, 18)}, "d_qk must be at most the model's head_dim 16; got 18"),
        ({"d_vo": (17, 4)}, "d_vo must be between 1 and the model's head_dim 16; got 17"),
        ({"d_vo": (0, 4)}, "d_vo must be between 1"),
        ({"d_qk": (8,)}, "must name every layer; got 1 and 2"),
        ({"d_qk": (), "d_vo": ()}, "must name every layer"),
        ({"preset": "better"}, "preset must be one of best, portable, paper, none; got 'better'"),
        ({"qk_map": "sideways"}, "qk_map must be one of folded, before_rope, after_rope"),
        ({"inv_freq": (1.0, 0.5)}, "2 frequencies rotates 4 dims; the layers rotate \\[8\\]"),
        ({"d_qk": (8, 6)}, "the layers rotate \\[6, 8\\]"),
        ({"qk_map": "after_rope"}, "the layers rotate \\[16\\]"),
    ],
)
def test_impossible_specs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        spec(**changes)


def test_unknown_and_missing_entries_are_refused() -> None:
    known = spec().to_dict()
    with pytest.raises(UserError, match="unknown entries in the checkpoint's latent spec: d_kv, rank"):
        LatentSpec.from_dict(known | {"rank": 3, "d_kv": 4})
    known.pop("scale")
    with pytest.raises(UserError, match=r"incomplete: scale"):
        LatentSpec.from_dict(known)


def test_layout_is_portable_only_where_a_stock_engine_could_run_it() -> None:
    assert spec().layout == "portable"
    assert spec(d_vo=(4, 8)).layout == "best"
    assert spec(per_head_frequencies=True).layout == "best"
    assert spec(qk_map="before_rope").layout == "best"
    assert spec(qk_map="after_rope", inv_freq=tuple(range(8))).layout == "best"
    assert spec(qk_map="after_rope", inv_freq=tuple(range(8)), window=64, sinks=4).layout == "best"


def test_cache_bytes_per_token_adds_up_layers_of_different_dims() -> None:
    uneven = replace(spec(per_head_frequencies=True), d_qk=(8, 6), d_vo=(4, 5))
    assert uneven.cache_bytes_per_token(kv_heads=3, element_size=2) == 3 * (8 + 4 + 6 + 5) * 2
    assert spec().cache_bytes_per_token(kv_heads=2, element_size=4) == 2 * 2 * (8 + 4) * 4


def test_full_dims_are_possible() -> None:
    check_dims(16, (16, 16), (16, 16))

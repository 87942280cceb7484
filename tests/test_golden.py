"""Every preset and reduction gives the numbers that were measured: see `tests/golden.py`, which also makes hashes."""

import json

import pytest
import torch
from golden import GOLDEN, cases


def test_every_preset_and_reduction_gives_what_it_gave() -> None:
    kept, now = json.loads(GOLDEN.read_text()), cases()
    assert now.keys() == kept.keys()
    for name, case in kept.items():
        assert now[name].get("dims") == case.get("dims"), name
        got, wanted = (torch.tensor(x["numbers"], dtype=torch.float64) for x in (now[name], case))
        size = float(wanted.abs().max())
        assert got.tolist() == pytest.approx(wanted.tolist(), rel=5e-3, abs=5e-3 * size), name

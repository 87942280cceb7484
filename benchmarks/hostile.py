"""What strangers' files may hold: the odd and hostile values that `mutations.py` puts into them."""

from __future__ import annotations

import math
from typing import Any

import tiny

RAN = "CODE_RAN"
"""A file that hostile inputs try to make."""
TOUCH = f"__import__('os').system('touch {RAN}')"
NESTED = 100_000
STRINGS = ["", "x", "a" * 99_999, "../../../etc/passwd", "/etc/passwd", "\ud800", "\0", "ü" * 300, "{x}", "%s%n", "-1",
           "NaN", "1" * 5000, TOUCH, f"$(touch {RAN})", "https://a.org/x", "a/b", "a//b/c", ".", "~", "\n"]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 3, 7, 16, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30, 0.5, -0.5, 1e-300, 1e300,
           math.nan, math.inf, -math.inf]  # fmt: skip

TEMPLATES = [
    "", "{{ messages }}", "{% for %}", "{{ undefined.x }}", "{{ 1 / 0 }}", "{{ messages[5] }}",
    "{{ raise_exception('no') }}",
    "{{ 'x' * 9999999999999 }}", "{{ '%099999999999d' | format(1) }}", "{{ messages | tojson }}",
    "{{ range(10**9) | list }}",
    "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "{{ lipsum(n=1000000) }}", "{% include 'x' %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages[0]['content'][::-1] }}", "constant",
    "{{ cycler.__init__.__globals__.os.popen('touch CODE_RAN').read() }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch CODE_RAN') }}", "{{ " + "(" * 5000,
    "{{ namespace(a=1) }}{{ strftime_now('%Y') }}", "{% for m in messages %}{{ m.content }}{% endfor %}", "\ud800",
    "{{ 10 ** 10 ** 9 }}", "{{ ('x' * 1000000) | replace('x', 'y' * 1000) }}",
    "{% set x = [] %}{% for i in range(99999) %}"
    "{% for j in range(99999) %}{{ x.append('x' * 1000) or '' }}{% endfor %}{% endfor %}",
]  # fmt: skip

CONFIG: dict[str, list[Any]] = {
    "auto_map": [
        {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        {"AutoTokenizer": ["evil.Evil", None]},
    ],
    "model_type": [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gpt2",
        "kvlatent_llama",
        "kvlatent_qwen3",
        "evil",
        "gemma3",
        "bert",
    ],
    "_attn_implementation": ["kernels-community/flash-attn", "eager", "flex_attention", "evil"],
    "attn_implementation": ["kernels-community/flash-attn", "eager", "sdpa", "flash_attention_2"],
    "_experts_implementation": ["a/b"],
    "use_kernels": [True],
    "transformers_weights": ["../../x.safetensors", "evil.bin"],
    "quantization_config": [{"quant_method": x} for x in ("fp8", "bitsandbytes", "gptq", "awq", "evil", "torchao", "")],
    "dtype": ["float16", "float8_e4m3fn", "int8", "evil", "float64", TOUCH, None],
    "torch_dtype": ["float16", "evil", 3],
    "rope_parameters": [
        {"rope_type": kind, "rope_theta": theta, **more}
        for kind in ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "evil")
        for theta in (1e4, 0, -1, 1e300, None)
        for more in ({}, {"factor": 0}, {"factor": 1e300}, {"factor": 8.0}, {"short_factor": [1], "long_factor": []})
    ],
    "rope_scaling": [{"type": "linear", "factor": 2.0}, {"type": "evil"}, {"rope_type": "yarn"}, 3],
    "rope_theta": [0, -1, 1e300, None, "x"],
    "layer_types": [["evil"] * 2, ["sliding_attention"] * 2, ["full_attention"], []],
    "sliding_window": [0, -1, 1, 4, 10**9],
    "tie_word_embeddings": [True, False, "yes"],
    "attention_bias": [True],
    "mlp_bias": [True],
    "num_key_value_heads": [1, 3, 4, 0, None],
    "vocab_size": [0, 1, 319, 321, 2**31, 2**40],
    "hidden_act": ["evil", "relu", "gelu", None, TOUCH],
    "pretraining_tp": [2, 0],
    "architectures": [["Evil"], [], None, "x"],
    "use_cache": [False],
    "latent": [None, {}, [], {"preset": "best"}],
    "base_model_tp_plan": [{"x": "evil"}],
    "is_encoder_decoder": [True],
    "pad_token_id": [-1, 999, 2**40],
    "eos_token_id": [-1, 999, [0, 1], []],
    "generation_config": [{"num_beams": 4}],
    "id2label": [{"0": "x"}, 3],
    "num_labels": [-1, 10**9],
    "problem_type": ["x"],
    "output_attentions": [True],
    "return_dict": [False],
    "chunk_size_feed_forward": [7],
    "attention_dropout": [0.5, -1, "x"],
}
GENERATION: dict[str, list[Any]] = {
    "num_beams": [4, 0, -1, 10**9],
    "temperature": [0, -1, "x"],
    "do_sample": [True, "x"],
    "max_new_tokens": [0, 10**12],
    "max_length": [0, 1, 10**12],
    "stop_strings": [["x"], 3],
    "cache_implementation": ["static", "quantized", "offloaded", "evil"],
    "custom_generate": ["evil", "."],
    "eos_token_id": [[0, 1], -5, "x", [[]], 10**12, None],
    "pad_token_id": [-5, 10**12, "x", None],
    "bad_words_ids": [[[1]], [], [[]], 3],
    "forced_eos_token_id": [1],
    "assistant_early_exit": [1],
    "prompt_lookup_num_tokens": [5],
    "num_return_sequences": [3],
    "penalty_alpha": [0.6],
    "watermarking_config": [{}, {"greenlist_ratio": 9}],
    "guidance_scale": [2.0],
    "compile_config": [{"evil": 1}],
}
TOKENIZER: dict[str, list[Any]] = {
    "auto_map": [{"AutoTokenizer": ["evil.Evil", "evil.Evil"]}],
    "tokenizer_class": ["Evil", "LlamaTokenizer", "GPT2Tokenizer", "BertTokenizer", "T5Tokenizer", None, "",
    "TokenizersBackend"],
    "chat_template": [*TEMPLATES, {"default": "x"}, [{"name": "a", "template": "b"}], 3],
    "eos_token": ["<none>", None, "", {"content": "x"}, 3, ["a"]],
    "pad_token": ["<none>", None, "river"],
    "added_tokens_decoder": [{"0": {}}, {"x": {"content": "y"}}, {"999999": {"content": "big", "special": True}}, 3],
    "model_max_length": [0, -1, 1e30, "x"],
    "extra_special_tokens": [{"image": "<i>"}, ["<i>"], 3],
    "model": [{"type": "Evil"}, {"type": "BPE", "vocab": {}, "merges": []}, {"type": "Unigram", "vocab": [["x",
    0.0]]}],
    "normalizer": [{"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}, {"type": "Evil"},
                   {"type": "Replace", "pattern": {"String": ""}, "content": "xxxx"}],
    "pre_tokenizer": [None, {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
                      {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}],
    "post_processor": [{"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}],
    "decoder": [None, {"type": "Evil"}],
    "truncation": [{"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0}],
    "padding": [{"strategy": {"Fixed": 10**6}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "x"}],
}  # fmt: skip

YAML = [
    f"!!python/object/apply:os.system ['touch {RAN}']", "a: &a [x]\nb: *a", "a: 1\na: 2", "[" * NESTED, "? x", "- a",
    "%TAG",
    f"title: !!python/object/new:os.system [touch {RAN}]", "a: 2024-99-99", "a: " + "1" * 5000, "&a [*a]", "\t",
    "x: !!binary x",
    "a: .nan", "a: 1:2:3:4", "{}", "null", "\ufeff", "a: '\\ud800'", "---\n---\n", "<<: 3", "? [a]\n: b",
    "!!set {a, b}",
]  # fmt: skip

ROWS: list[Any] = [
    {"text": "river stone " * 30}, {"text": None}, {"text": 3}, {"text": ["x"]}, {"messages": []},
    {"messages": None}, {}, [], 3,
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 40}]}, {"messages": 3},
    "x", None,
    {"messages": [{"role": "user"}]}, {"messages": [{"role": 3, "content": "x"}]}, {"messages": ["x"]},
    {"messages": {"a": 1}},
    {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "x"}]}]}, {"text": "\ud800 lone"},
    {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {"messages": [[]]}, {"text": "<eos>" * 50},
    {"text": "\0"},
    {"messages": [{"role": "user", "content": [None]}]}, {"text": "a" * 300_000}, {"text": "ü" * 1000},
    {"content": "x"},
    {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, {"text": True}, {"text": {"a": "b"}},
    {"text": " "},
    {"messages": [{"role": "user", "content": 3}]}, {"messages": [None]}, {"messages": "abc"}, {"messages": [],
    "text": "x y"},
]  # fmt: skip

OPTIONS = {
    "info": ["{teacher}"], "doctor": ["{student}"], "report": ["{run}", "--out", "page.html"],
    "generate": ["{student}", "--prompt", "river", "--max-new-tokens", "2"],
    "eval": ["{student}", "--text", "{other.txt}", "--tokens", "64", "--block-size", "32", "--against", "{teacher}"],
    "bench": ["{student}", "--context", "16", "--new-tokens", "2", "--repeats", "1", "--batch", "1"],
    "plan": ["{teacher}", "--stats", "{stats}", "--budget", "0.5", "--out", "x.png"],
    "calibrate": ["{teacher}", "--text", "{other.txt}", "--tokens", "64", "--block-size", "32", "--out", "x",
                  *tiny.NEAR],
    "convert": ["{teacher}", "--text", "{other.txt}", "--tokens", "64", "--block-size", "32", "--d-qk", "8",
                "--d-vo", "8",
                "--out", "x", "--heads-per-latent", "1", "--window", "8", "--sinks", "2", "--context", "64"],
    "heal": ["{portable}", "--teacher", "{teacher}", "--text", "{other.txt}", *tiny.HEALING, "--out", "x"],
    "export": ["{portable}", "--to", "gguf", "--out", "x.gguf", "--type", "f16"],
    "run": ["{tiny.yaml}", "--out", "{run}"],
    "compress-prompt": ["{teacher}", "--prompt", "{short.txt}", "--keep", "0.5", "--stages", "2"],
    "rope-plot": ["--model", "{teacher}", "--dims", "16", "8", "--distance", "64", "--out", "x.png"],
}  # fmt: skip
MORE = {
    "generate": ["--chat"], "eval": ["--far", "--needle", "--retrieval", "--trials=1", "--limit=0", "--tasks=evil",
    "--retrieval-contexts=16"],
    "bench": ["--synthetic", "--own", "--memory=0.01", "--memory=0", "--dtypes=bfloat16", "--memory=1e300"],
    "run": ["--seed=5"],
    "plan": ["--bits=1", "--bits=16", "--memory=0.01", "--heads-per-latent=2", "--window=4", "--tokens=64"],
    "calibrate": ["--merge={stats}", "--offload", "--window=8", "--heads-per-latent=2", "--context=9",
    "--text=teacher"],
    "convert": ["--bits=2", "--bits=3", "--bits=8", "--budget=0.01", "--preset=paper", "--preset=portable",
    "--qk=evil", "--qk=fold", "--qk=partial", "--qk=select", "--qk=project", "--stats={stats}", "--budget=0.5"],
    "heal": ["--resume", "--restart", "--stream-layers", "--loss=mix", "--loss=ntp", "--kl-weight=2",
    "--temperature=0", "--learning-rate=1e9", "--eps=-1", "--clip=0", "--train=norms",
             "--lora-rank=0", "--lora-rank=10000", "--lora-alpha=-1", "--adapters=keep", "--adapters=save",
             "--batch-size=0", "--accumulate=999", "--checkpointing", "--mixed-precision=fp16",
             "--save-minutes=-1", "--save-minutes=nan", "--eval-tokens=0", "--warmup=9", "--weight-decay=nan",
             "--top-k=0", "--top-k=999", "--teacher-cache=c", "--track=evil",
             "--separate-documents", "--held-out={train.txt}", "--held-out={other.txt}", "--held-out-tokens=0",
             "--temperature-squared", "--like=paper", "--context=7"],
    "compress-prompt": ["--spread", "--protect=river", "--protect=", "--stages=0", "--keep=2"],
    "rope-plot": ["--theta=0", "--theta=nan", "--distance=0", "--dims=3", "--out=x.evil"],
    "info": ["--memory=1", "--memory=nan", "--batch=0", "--context=0", "--context=99999999999"],
    "export": ["--type=q8_0", "--type=evil", "--to=stock", "--dtype=float16"],
}  # fmt: skip

COMMON = ["--json", "--device=evil", "--device=meta", "--device=cuda", "--dtype=float16", "--seed=-1",
          "--dtype=bfloat16", "--seed=99999999999999999999", "--evil", "--device=cpu:7"]  # fmt: skip
NAMES = ["{teacher}", "{run}", "{stats}", "{teacher.gguf}", "/dev/null", "/dev/zero", "/proc/self/mem", "{tiny.yaml}",
         "/nowhere/x", "{train.txt}", "{train.txt}/x", "hf:x", "package:evil", "teacher", "smollm3"]  # fmt: skip

"""Model classes of converted models: the stock ones with latent attention in every layer."""

from __future__ import annotations

from typing import Any

from transformers import (
    Cache,
    Cohere2ForCausalLM,
    CohereForCausalLM,
    DynamicCache,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    GenerationConfig,
    Glm4ForCausalLM,
    GptOssForCausalLM,
    GraniteForCausalLM,
    LlamaForCausalLM,
    Ministral3ForCausalLM,
    MistralForCausalLM,
    MixtralForCausalLM,
    Olmo2ForCausalLM,
    Olmo3ForCausalLM,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
    Qwen3NextForCausalLM,
    SmolLM3ForCausalLM,
    StaticCache,
)

from kvlatent.errors import UserError
from kvlatent.kernels.cpu_linear import GatedFFN, is_gated
from kvlatent.model.attention import LatentAttention, attention_of, check_implementation
from kvlatent.model.cache import LatentCache, write_in_place
from kvlatent.model.compatibility import CACHE, CACHE_NAMES, check_itself, is_tested
from kvlatent.model.config import (
    KVLatentCohere2Config,
    KVLatentCohereConfig,
    KVLatentGemma2Config,
    KVLatentGemma3TextConfig,
    KVLatentGlm4Config,
    KVLatentGptOssConfig,
    KVLatentGraniteConfig,
    KVLatentLlamaConfig,
    KVLatentMinistral3Config,
    KVLatentMistralConfig,
    KVLatentMixtralConfig,
    KVLatentOlmo2Config,
    KVLatentOlmo3Config,
    KVLatentPhi3Config,
    KVLatentQwen2Config,
    KVLatentQwen3_5MoeTextConfig,
    KVLatentQwen3_5TextConfig,
    KVLatentQwen3Config,
    KVLatentQwen3MoeConfig,
    KVLatentQwen3NextConfig,
    KVLatentSmolLM3Config,
)
from kvlatent.model.families import linear_layers
from kvlatent.model.fixed_window import FixedWindowLayer
from kvlatent.model.rope import LatentRotaryEmbedding
from kvlatent.model.spec import LatentSpec
from kvlatent.model.stock_weights import split_ffn
from kvlatent.model.window_cache import WindowLayer


class KVLatentForCausalLM:
    """Mixed into a stock `…ForCausalLM`: every decoder layer gets a `LatentAttention`, the body a latent RoPE.

    Everything else (generation, tying, checkpointing, parallel plans) is the stock class's. Attention is computed in
    one way, whether transformers calls it sdpa or eager, which differ in the kind of mask alone; other implementations
    would hand over masks that it can't read.
    """

    _supports_sdpa = True
    _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = False

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        # A stock body whose own attention has no fused way refuses sdpa by name, and makes its masks all the same.
        refused_by_name = not super()._supports_sdpa  # type: ignore[misc]
        if refused_by_name:
            config._attn_implementation = "eager"
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if refused_by_name:
            config._attn_implementation = "sdpa"
        if config.latent is None:
            raise UserError(f"a {config.model_type} config needs its latent spec; convert a model to get one")
        spec = LatentSpec.from_dict(config.latent)
        if len(spec.d_qk) != config.num_hidden_layers:
            raise UserError(f"the latent spec names {len(spec.d_qk)} layers; the model has {config.num_hidden_layers}")
        check_implementation(config)
        set_spec(self, spec)
        for layer in self.model.layers:  # type: ignore[attr-defined]
            if is_gated(mlp := split_ffn(layer.mlp)):  # experts stay as they are
                layer.mlp = GatedFFN(mlp)
        self.model.register_forward_pre_hook(  # type: ignore[attr-defined]
            _give_cache, with_kwargs=True
        )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as the stock class does; with a release of transformers that wasn't tested, check what came.

        Raises:
            UserError: The check failed.
        """
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        if not is_tested():
            check_itself(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Let the cache that `generate` makes (by default, static, offloaded) be written in place."""
        given = model_kwargs.get(CACHE)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        made = model_kwargs.get(CACHE)
        if given is None and type(made) in (DynamicCache, StaticCache):
            write_in_place(made, self.config)  # type: ignore[attr-defined]

    def _get_static_cache_init_shape(self) -> None:
        """Let static caches take their shapes from the first keys and values: the config names the teacher's."""


def _give_cache(
    body: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], Any] | None:
    """Where the body is asked to cache and given no cache, give it one that grows in place.

    Raises:
        UserError: It is given the cache of another kind of model.
    """
    given = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
    if given is not None:
        if body.config.latent.get("window"):
            write_in_place(given, body.config)
        _check_cache(given, body)
    use_cache = kwargs.get("use_cache")
    wanted = body.config.use_cache if use_cache is None else use_cache
    has_window = bool(body.config.latent.get("window"))
    if not wanted or (body.training and not has_window) or len(args) > 1 or given is not None:
        return None
    others = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
    return args, others | {CACHE: LatentCache(body.config)}


def _check_cache(cache: Cache, body: PreTrainedModel) -> None:
    left_whole = body.config.latent.get("whole_layers", ())
    without = {*left_whole, *linear_layers(body.config)}
    index = next(x for x in range(len(body.layers)) if x not in without)
    held = cache.layers[index] if index < len(cache.layers) else None
    if held is not None and isinstance(held, WindowLayer | FixedWindowLayer) != bool(body.config.latent.get("window")):
        theirs = "a student with a window was given a cache without one"
        ours = "a model without a window was given the cache of a student with a window"
        has_window = isinstance(held, WindowLayer | FixedWindowLayer)
        raise UserError(f"{ours if has_window else theirs}; let the model make its cache")
    keys = getattr(held, "keys", None)
    attention = body.layers[index].self_attn
    heads, width = attention.latents, attention.cached_keys
    if keys is not None and keys.dim() == 4 and (keys.shape[1], keys.shape[-1]) != (heads, width):
        raise UserError(
            f"the cache given holds {keys.shape[1]} keys of {keys.shape[-1]} dims, where this model caches {heads} of "
            f"{width}: a cache of another model, or prefix tuning, which fills one by the config's heads and head_dim"
        )


class KVLatentLlamaForCausalLM(KVLatentForCausalLM, LlamaForCausalLM):
    """A converted Llama."""

    config_class = KVLatentLlamaConfig


class KVLatentMistralForCausalLM(KVLatentForCausalLM, MistralForCausalLM):
    """A converted Mistral."""

    config_class = KVLatentMistralConfig


class KVLatentQwen2ForCausalLM(KVLatentForCausalLM, Qwen2ForCausalLM):
    """A converted Qwen2."""

    config_class = KVLatentQwen2Config


class KVLatentQwen3ForCausalLM(KVLatentForCausalLM, Qwen3ForCausalLM):
    """A converted Qwen3."""

    config_class = KVLatentQwen3Config


class KVLatentMixtralForCausalLM(KVLatentForCausalLM, MixtralForCausalLM):
    """A converted Mixtral."""

    config_class = KVLatentMixtralConfig


class KVLatentQwen3MoeForCausalLM(KVLatentForCausalLM, Qwen3MoeForCausalLM):
    """A converted Qwen3-MoE."""

    config_class = KVLatentQwen3MoeConfig


class KVLatentMinistral3ForCausalLM(KVLatentForCausalLM, Ministral3ForCausalLM):
    """A converted Ministral 3."""

    config_class = KVLatentMinistral3Config


class KVLatentSmolLM3ForCausalLM(KVLatentForCausalLM, SmolLM3ForCausalLM):
    """A converted SmolLM3."""

    config_class = KVLatentSmolLM3Config


class KVLatentGraniteForCausalLM(KVLatentForCausalLM, GraniteForCausalLM):
    """A converted Granite."""

    config_class = KVLatentGraniteConfig


class KVLatentOlmo2ForCausalLM(KVLatentForCausalLM, Olmo2ForCausalLM):
    """A converted OLMo 2."""

    config_class = KVLatentOlmo2Config


class KVLatentOlmo3ForCausalLM(KVLatentForCausalLM, Olmo3ForCausalLM):
    """A converted OLMo 3."""

    config_class = KVLatentOlmo3Config


class KVLatentPhi3ForCausalLM(KVLatentForCausalLM, Phi3ForCausalLM):
    """A converted Phi-3 or Phi-4."""

    config_class = KVLatentPhi3Config


class KVLatentGlm4ForCausalLM(KVLatentForCausalLM, Glm4ForCausalLM):
    """A converted GLM-4."""

    config_class = KVLatentGlm4Config


class KVLatentCohereForCausalLM(KVLatentForCausalLM, CohereForCausalLM):
    """A converted Cohere."""

    config_class = KVLatentCohereConfig


class KVLatentCohere2ForCausalLM(KVLatentForCausalLM, Cohere2ForCausalLM):
    """A converted Cohere 2."""

    config_class = KVLatentCohere2Config


class KVLatentGptOssForCausalLM(KVLatentForCausalLM, GptOssForCausalLM):
    """A converted gpt-oss."""

    config_class = KVLatentGptOssConfig


class KVLatentQwen3NextForCausalLM(KVLatentForCausalLM, Qwen3NextForCausalLM):
    """A converted Qwen3-Next."""

    config_class = KVLatentQwen3NextConfig


class KVLatentQwen3_5ForCausalLM(KVLatentForCausalLM, Qwen3_5ForCausalLM):
    """A converted Qwen3.5 for text."""

    config_class = KVLatentQwen3_5TextConfig


class KVLatentQwen3_5MoeForCausalLM(KVLatentForCausalLM, Qwen3_5MoeForCausalLM):
    """A converted Qwen3.5-MoE for text."""

    config_class = KVLatentQwen3_5MoeTextConfig


class KVLatentGemma2ForCausalLM(KVLatentForCausalLM, Gemma2ForCausalLM):
    """A converted Gemma 2."""

    config_class = KVLatentGemma2Config


class KVLatentGemma3ForCausalLM(KVLatentForCausalLM, Gemma3ForCausalLM):
    """A converted Gemma 3 for text."""

    config_class = KVLatentGemma3TextConfig


MODELS: dict[str, type[PreTrainedModel]] = {
    "llama": KVLatentLlamaForCausalLM,
    "mistral": KVLatentMistralForCausalLM,
    "qwen2": KVLatentQwen2ForCausalLM,
    "qwen3": KVLatentQwen3ForCausalLM,
    "mixtral": KVLatentMixtralForCausalLM,
    "qwen3_moe": KVLatentQwen3MoeForCausalLM,
    "ministral3": KVLatentMinistral3ForCausalLM,
    "smollm3": KVLatentSmolLM3ForCausalLM,
    "granite": KVLatentGraniteForCausalLM,
    "olmo2": KVLatentOlmo2ForCausalLM,
    "olmo3": KVLatentOlmo3ForCausalLM,
    "cohere": KVLatentCohereForCausalLM,
    "cohere2": KVLatentCohere2ForCausalLM,
    "gpt_oss": KVLatentGptOssForCausalLM,
    "qwen3_next": KVLatentQwen3NextForCausalLM,
    "qwen3_5_text": KVLatentQwen3_5ForCausalLM,
    "qwen3_5_moe_text": KVLatentQwen3_5MoeForCausalLM,
    "gemma2": KVLatentGemma2ForCausalLM,
    "gemma3_text": KVLatentGemma3ForCausalLM,
    "glm4": KVLatentGlm4ForCausalLM,
    "phi3": KVLatentPhi3ForCausalLM,
}
"""Model class of converted models by the stock model_type."""


def set_spec(model: PreTrainedModel, spec: LatentSpec) -> None:
    """Give every attention of `model` a fresh `LatentAttention` shaped by `spec`, and its body the matching RoPE."""
    model.config.latent = spec.to_dict()
    for index, layer in enumerate(model.model.layers):
        if (stock := attention_of(layer)) is not None:
            layer.self_attn = LatentAttention(model.config, index, stock, spec)
    model.model.rotary_emb = LatentRotaryEmbedding.of(spec, model.config).to(model.device)

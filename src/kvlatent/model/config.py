"""Configs of converted models: the family's stock config plus `latent`, which holds `LatentSpec.to_dict()`."""

from typing import Any

from transformers import (
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
)

OF_THE_CLASS = ("model_type", "architectures", "transformers_version", "auto_map")
"""Entries of a config that say which code it is for; a model of another class doesn't take them over."""


class KVLatentLlamaConfig(LlamaConfig):
    """A converted Llama's config."""

    model_type = "kvlatent_llama"
    latent: dict[str, Any] | None = None


class KVLatentMistralConfig(MistralConfig):
    """A converted Mistral's config."""

    model_type = "kvlatent_mistral"
    latent: dict[str, Any] | None = None


class KVLatentQwen2Config(Qwen2Config):
    """A converted Qwen2's config."""

    model_type = "kvlatent_qwen2"
    latent: dict[str, Any] | None = None


class KVLatentQwen3Config(Qwen3Config):
    """A converted Qwen3's config."""

    model_type = "kvlatent_qwen3"
    latent: dict[str, Any] | None = None


class KVLatentMixtralConfig(MixtralConfig):
    """A converted Mixtral's config."""

    model_type = "kvlatent_mixtral"
    latent: dict[str, Any] | None = None


class KVLatentQwen3MoeConfig(Qwen3MoeConfig):
    """A converted Qwen3-MoE's config."""

    model_type = "kvlatent_qwen3_moe"
    latent: dict[str, Any] | None = None


class KVLatentMinistral3Config(Ministral3Config):
    """A converted Ministral 3's config."""

    model_type = "kvlatent_ministral3"
    latent: dict[str, Any] | None = None


class KVLatentSmolLM3Config(SmolLM3Config):
    """A converted SmolLM3's config."""

    model_type = "kvlatent_smollm3"
    latent: dict[str, Any] | None = None


class KVLatentGraniteConfig(GraniteConfig):
    """A converted Granite's config."""

    model_type = "kvlatent_granite"
    latent: dict[str, Any] | None = None


class KVLatentOlmo2Config(Olmo2Config):
    """A converted OLMo 2's config."""

    model_type = "kvlatent_olmo2"
    latent: dict[str, Any] | None = None


class KVLatentOlmo3Config(Olmo3Config):
    """A converted OLMo 3's config."""

    model_type = "kvlatent_olmo3"
    latent: dict[str, Any] | None = None


class KVLatentPhi3Config(Phi3Config):
    """A converted Phi-3 or Phi-4's config."""

    model_type = "kvlatent_phi3"
    latent: dict[str, Any] | None = None


class KVLatentGlm4Config(Glm4Config):
    """A converted GLM-4's config."""

    model_type = "kvlatent_glm4"
    latent: dict[str, Any] | None = None


class KVLatentCohereConfig(CohereConfig):
    """A converted Cohere's config."""

    model_type = "kvlatent_cohere"
    latent: dict[str, Any] | None = None


class KVLatentCohere2Config(Cohere2Config):
    """A converted Cohere 2's config."""

    model_type = "kvlatent_cohere2"
    latent: dict[str, Any] | None = None


class KVLatentGptOssConfig(GptOssConfig):
    """A converted gpt-oss's config."""

    model_type = "kvlatent_gpt_oss"
    latent: dict[str, Any] | None = None


class KVLatentQwen3NextConfig(Qwen3NextConfig):
    """A converted Qwen3-Next's config."""

    model_type = "kvlatent_qwen3_next"
    latent: dict[str, Any] | None = None


class KVLatentQwen3_5TextConfig(Qwen3_5TextConfig):
    """A converted Qwen3.5 for text's config."""

    model_type = "kvlatent_qwen3_5_text"
    latent: dict[str, Any] | None = None


class KVLatentQwen3_5MoeTextConfig(Qwen3_5MoeTextConfig):
    """A converted Qwen3.5-MoE for text's config."""

    model_type = "kvlatent_qwen3_5_moe_text"
    latent: dict[str, Any] | None = None


class KVLatentGemma2Config(Gemma2Config):
    """A converted Gemma 2's config."""

    model_type = "kvlatent_gemma2"
    latent: dict[str, Any] | None = None


class KVLatentGemma3TextConfig(Gemma3TextConfig):
    """A converted Gemma 3 for text's config."""

    model_type = "kvlatent_gemma3_text"
    latent: dict[str, Any] | None = None


CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": KVLatentLlamaConfig,
    "mistral": KVLatentMistralConfig,
    "qwen2": KVLatentQwen2Config,
    "qwen3": KVLatentQwen3Config,
    "mixtral": KVLatentMixtralConfig,
    "qwen3_moe": KVLatentQwen3MoeConfig,
    "ministral3": KVLatentMinistral3Config,
    "smollm3": KVLatentSmolLM3Config,
    "granite": KVLatentGraniteConfig,
    "olmo2": KVLatentOlmo2Config,
    "olmo3": KVLatentOlmo3Config,
    "cohere": KVLatentCohereConfig,
    "cohere2": KVLatentCohere2Config,
    "gpt_oss": KVLatentGptOssConfig,
    "qwen3_next": KVLatentQwen3NextConfig,
    "qwen3_5_text": KVLatentQwen3_5TextConfig,
    "qwen3_5_moe_text": KVLatentQwen3_5MoeTextConfig,
    "gemma2": KVLatentGemma2Config,
    "gemma3_text": KVLatentGemma3TextConfig,
    "glm4": KVLatentGlm4Config,
    "phi3": KVLatentPhi3Config,
}
"""Config class of converted models by the stock model_type."""

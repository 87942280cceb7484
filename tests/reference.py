"""Plain oracles: float64 loops that say what a function means, with no regard for speed."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel


def frequency_aware_exponents(d: int) -> list[int]:
    """paper.md: [d/4, d/4+2, …, <3d/4] ++ [3d/4, …, d-1]."""
    exponents = []
    e = d // 4
    while e < 3 * d // 4:
        exponents.append(e)
        e += 2
    for e in range(3 * d // 4, d):
        exponents.append(e)
    return exponents


def mean_cosine(inv_freq: list[float], x: int) -> float:
    """The stability function (1/d)·1ᵀR(x)1 at distance x."""
    return sum(math.cos(x * w) for w in inv_freq) / len(inv_freq)


def rotated(x: Tensor, position: int, inv_freq: list[float]) -> Tensor:
    """One head's vector (d,) after RoPE: pair j is the complex number x_j + i·x_{j+d/2}, turned by position·ω_j."""
    half = len(x) // 2
    first, second = [], []
    for j in range(half):
        c, s = math.cos(position * inv_freq[j]), math.sin(position * inv_freq[j])
        first.append(x[j] * c - x[half + j] * s)
        second.append(x[half + j] * c + x[j] * s)
    return torch.stack(first + second)


def causal(q_len: int, kv_len: int, window: int | None = None) -> Tensor:
    """0 where query i (aligned with the last keys) may look, -inf elsewhere: (q_len, kv_len)."""
    bias = torch.full((q_len, kv_len), -math.inf, dtype=torch.float64)
    for i in range(q_len):
        at = kv_len - q_len + i
        for j in range(at + 1):
            if window is None or at - j < window:
                bias[i, j] = 0.0
    return bias


def soft_capped(x: Tensor, cap: float | None) -> Tensor:
    """cap·tanh(x / cap), by its exponentials; None leaves it."""
    if cap is None:
        return x
    up, down = torch.exp(x / cap), torch.exp(-x / cap)
    return cap * (up - down) / (up + down)


def probabilities(
    q: Tensor, k: Tensor, *, scale: float, bias: Tensor, cap: float | None = None, sink: Tensor | None = None
) -> Tensor:
    """Softmax of one query (d,) over keys (kv_len, d), with `bias` (kv_len,) added to the logits after their cap.

    A learned logit `sink` takes its share and is left out.
    """
    seen = [j for j in range(len(k)) if bias[j] > -math.inf]
    logits = {j: soft_capped(scale * torch.dot(q, k[j]), cap) + bias[j] for j in seen}
    top = max(x.item() for x in logits.values())
    weights = {j: torch.exp(logits[j] - top) for j in seen}
    total = sum(weights.values()) + (0 if sink is None else torch.exp(sink - top))
    return torch.stack([weights[j] / total if j in weights else torch.zeros_like(total) for j in range(len(k))])


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, bias: Tensor, cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Grouped attention of (batch, heads, seq, dim) tensors; `bias` is (batch, q_len, kv_len), `sinks` (q_heads,)."""
    batch, q_heads, q_len, _ = q.shape
    group_size = q_heads // k.shape[1]
    rows = []
    for b in range(batch):
        for h in range(q_heads):
            g = h // group_size
            for i in range(q_len):
                sink = None if sinks is None else sinks[h]
                p = probabilities(q[b, h, i], k[b, g], scale=scale, bias=bias[b, i], cap=cap, sink=sink)
                rows.append(sum(p[j] * v[b, g, j] for j in range(len(p))))
    return torch.stack(rows).view(batch, q_heads, q_len, -1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight of a vector."""
    return x / torch.sqrt((x * x).mean() + eps) * weight


def latent_attention_module(module: torch.nn.Module, x: Tensor, inv_freq: list[float], bias: Tensor) -> Tensor:
    """What a float64 `LatentAttention` should give for normalised inputs `x` (batch, seq, hidden), spelt out."""

    def heads(name: str, count: int) -> list[list[list[Tensor]]]:
        projection = getattr(module, f"{name}_proj")
        out = []
        for row in x:
            by_head = []
            for h in range(count):
                width = len(projection.weight) // count
                part = slice(h * width, (h + 1) * width)
                extra = 0 if projection.bias is None else projection.bias[part]
                by_head.append([projection.weight[part] @ token + extra for token in row])
            out.append(by_head)
        return out

    def finished(name: str, count: int) -> Tensor:
        norm, head_map = getattr(module, f"{name}_norm"), getattr(module, f"{name}_map")
        out = []
        for by_head in heads(name, count):
            for h, tokens in enumerate(by_head):
                g = h // (count // module.kv_heads)
                mine = inv_freq if module.freq_index is None else [inv_freq[int(i)] for i in module.freq_index[g]]
                for position, token in enumerate(tokens):
                    if norm is not None:
                        token = rms_norm(token, norm.weight, norm.variance_epsilon)
                    if module.qk_map == "before_rope":
                        token = head_map[h].T @ token
                    token = rotated(token, position, mine)
                    if module.qk_map == "after_rope" and len(head_map) == count:
                        token = head_map[h].T @ token
                    out.append(token)
        return torch.stack(out).view(len(x), count, x.shape[1], -1)

    q, k = finished("q", module.q_heads), finished("k", module.kv_heads)
    if (m := module.heads_per_latent) > 1:  # after RoPE only
        joined = [torch.cat([k[:, m * g + i] for i in range(m)], dim=-1) for g in range(module.latents)]
        k = torch.stack([latent @ module.k_map[g] for g, latent in enumerate(joined)], dim=1)
    v = torch.stack(
        [torch.stack([torch.stack(tokens) for tokens in by_head]) for by_head in heads("v", module.latents)]
    )
    softmax = {"scale": module.scale, "cap": module.cap, "sinks": module.sinks}
    out = attention(q, k, v, bias=bias.expand(len(x), -1, -1), **softmax)
    if module.o_map is not None:
        out = torch.stack([out[:, h] @ module.o_map[h] for h in range(module.q_heads)], dim=1)
    flat = torch.stack(
        [torch.cat([out[b, h, i] for h in range(out.shape[1])]) for b in range(len(x)) for i in range(x.shape[1])]
    )
    result = flat @ module.o_proj.weight.T
    if module.o_proj.bias is not None:
        result = result + module.o_proj.bias
    return result.view(x.shape)


def moments(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, bias: Tensor, cap: float | None = None,
    sinks: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Per head, sums over queries of q qᵀ, of the key covariance under attention, and of o oᵀ."""
    batch, q_heads, seq, dim = q.shape
    kv_heads = k.shape[1]
    group_size = q_heads // kv_heads
    sums = {
        "q": torch.zeros(q_heads, dim, dim, dtype=torch.float64),
        "k": torch.zeros(kv_heads, dim, dim, dtype=torch.float64),
        "o": torch.zeros(q_heads, v.shape[-1], v.shape[-1], dtype=torch.float64),
    }
    for b in range(batch):
        for h in range(q_heads):
            g = h // group_size
            for i in range(seq):
                sink = None if sinks is None else sinks[h]
                p = probabilities(q[b, h, i], k[b, g], scale=scale, bias=bias[i], cap=cap, sink=sink)
                mean_key = sum(p[j] * k[b, g, j] for j in range(seq))
                out = sum(p[j] * v[b, g, j] for j in range(seq))
                sums["q"][h] += torch.outer(q[b, h, i], q[b, h, i])
                sums["o"][h] += torch.outer(out, out)
                for j in range(seq):
                    away = k[b, g, j] - mean_key
                    sums["k"][g] += p[j] * torch.outer(away, away) / group_size
                # A sink's logit is none of a key's: as if of a key that is zero whatever keys become.
                sums["k"][g] += (1 - p.sum()) * torch.outer(mean_key, mean_key) / group_size
    return sums


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over positions of Σ p·log(p/q), p the teacher's distribution, from logits (positions, vocab)."""
    total = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student.double() / temperature, teacher.double() / temperature, strict=True):
        log_q, log_p = s - torch.logsumexp(s, 0), t - torch.logsumexp(t, 0)
        total = total + (log_p.exp() * (log_p - log_q)).sum()
    return total / len(student)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over positions of -log p(label)."""
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(logits.double(), labels.tolist(), strict=True):
        total = total + torch.logsumexp(row, 0) - row[label]
    return total / len(labels)


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, maps: tuple[Tensor, Tensor, Tensor, Tensor], *,
    window: int, scale: float, visible: Tensor, sink: Tensor, far_bias: Tensor, cap: float | None = None,
    learned_sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Near tokens and sinks whole, far ones through maps; `visible` is (batch, seq, seq), `sink` (batch, seq), bool.

    `far_bias` (q_heads, 1) is added to far logits, after their cap; `learned_sinks` (q_heads,) have no value.

    Maps are (q_heads, head_dim, latent), (latents, joined, latent), (latents, joined, latent_v) and
    (q_heads, latent_v, head_dim). Queries that see nothing give zeros.
    """
    q_map, k_map, v_map, o_map = maps
    batch, q_heads, seq, _ = q.shape
    kv_heads, latents = k.shape[1], len(k_map)
    rows = []
    for b in range(batch):
        for h in range(q_heads):
            g = h // (q_heads // kv_heads)
            latent = g // (kv_heads // latents)
            mates = range(latent * (kv_heads // latents), (latent + 1) * (kv_heads // latents))
            for t in range(seq):
                logits, values = [], []
                for s in range(seq):
                    if not visible[b, t, s]:
                        continue
                    if t - s < window or sink[b, s]:
                        logits.append(soft_capped(scale * torch.dot(q[b, h, t], k[b, g, s]), cap))
                        values.append(v[b, g, s])
                    else:
                        key = torch.cat([k[b, m, s] for m in mates]) @ k_map[latent]
                        value = torch.cat([v[b, m, s] for m in mates]) @ v_map[latent]
                        far = soft_capped(scale * torch.dot(q[b, h, t] @ q_map[h], key), cap)
                        logits.append(far + far_bias[h, 0])
                        values.append(value @ o_map[h])
                if learned_sinks is not None:
                    logits.append(learned_sinks[h])
                    values.append(torch.zeros_like(v[b, g, 0]))
                if not logits:
                    rows.append(torch.zeros_like(v[b, g, 0]))
                    continue
                p = torch.stack(logits).softmax(0)
                rows.append((p[:, None] * torch.stack(values)).sum(0))
    return torch.stack(rows).view(batch, q_heads, seq, -1)


VLLM_CPU_HAS_FP8 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
"""Whether vLLM's CPU kernels cache fp8 here."""
VLLM_CPU_BLOCK = 128
"""Tokens of a block of vLLM's cache on a CPU."""


def vllm_tokens_per_gib(bytes_per_token: int) -> int:
    """Tokens that 1 GiB of vLLM's cache holds on a CPU, in whole blocks."""
    return 2**30 // (bytes_per_token * VLLM_CPU_BLOCK) * VLLM_CPU_BLOCK


def logits(model: PreTrainedModel, ids: Tensor, **kwargs: Tensor) -> Tensor:
    """What a model says of every next token."""
    with torch.no_grad():
        return model(ids, **kwargs).logits

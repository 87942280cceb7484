"""Linear layers of a decode step on a CPU against float64, where they are used, and that they stay `nn.Linear`."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvlatent.kernels import cpu_decode, cpu_linear
from kvlatent.kernels.cpu_linear import MOST_ROWS, GatedFFN, few_rows, fits, linear_outputs
from kvlatent.model.graft import graft

pytestmark = pytest.mark.skipif(not cpu_decode.available(), reason="no llvmlite, or another OpenMP than GNU's")
WIDE = (131, 128)
"""Outputs and inputs just large enough; a prime number of outputs, so that the last tile reaches back."""


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A layer with the given parameters, frozen."""
    layer = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, dtype=weight.dtype).requires_grad_(False)
    layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return layer


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs of every layer that the kernel got; it takes small weights too."""
    seen: list[tuple[int, ...]] = []
    kernel = few_rows

    def spy(x: Tensor, *layers: nn.Linear) -> list[Tensor]:
        seen.extend(tuple(x.shape) for _ in layers)
        return kernel(x, *layers)

    monkeypatch.setattr(cpu_linear, "few_rows", spy)
    monkeypatch.setattr(cpu_linear, "LEAST_BYTES", 0)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 4, 7, MOST_ROWS])
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_match_float64(dtype: torch.dtype, rows: int, bias: bool) -> None:
    x, weight, b = numbers(rows, 1, 128, dtype=dtype), numbers(*WIDE, dtype=dtype), numbers(131, dtype=dtype)
    (got,) = few_rows(x, linear(weight, b if bias else None))
    assert got.dtype == dtype
    wanted = F.linear(x.double(), weight.double(), b.double() if bias else None)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), wanted, rtol=2 * eps, atol=100 * eps if dtype == torch.float32 else eps)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(8, 8), (9, 4104), (1000, 64), (4099, 24), (300, 3000), (131, 396), (40, 5)]
)
def test_every_split_among_threads_gives_every_output(threads: int, outputs: int, inputs: int) -> None:
    x, weight = numbers(2, 1, inputs), numbers(outputs, inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got, *others = few_rows(x, linear(weight), linear(weight[:9]), linear(weight.flip(0)))
    finally:
        torch.set_num_threads(before)
    wanted = F.linear(x.double(), weight.double())
    for out, part in zip([got, *others], [wanted, wanted[..., :9], wanted.flip(-1)], strict=True):
        torch.testing.assert_close(out.double(), part, rtol=1e-5, atol=1e-4)


def test_inputs_that_are_not_contiguous_are_read_right() -> None:
    x = numbers(4, 3, 128)[:, 1:2]
    weight = numbers(*WIDE)
    torch.testing.assert_close(few_rows(x, linear(weight))[0], F.linear(x, weight), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_stays_with_torch() -> None:
    x, weight = numbers(2, 1, 128), numbers(*WIDE)
    assert fits(x, weight)
    assert fits(x.bfloat16(), numbers(256, 128, dtype=torch.bfloat16))
    assert fits(x, nn.Parameter(weight, requires_grad=False))
    with torch.no_grad():
        assert fits(x, nn.Parameter(weight))
    for name, (left, right) in {
        "gradients": (x, nn.Parameter(weight)),
        "gradients of the input": (x.clone().requires_grad_(), weight),
        "rows": (numbers(MOST_ROWS + 1, 1, 128), weight),
        "small": (x, weight[:30]),
        "one output": (numbers(2, 1, 2**15), numbers(1, 2**15)),
        "transposed": (x, numbers(128, 131).t()),
        "float64": (x.double(), weight.double()),
        "mixed": (x, weight.bfloat16()),
        "meta": (x.to("meta"), weight.to("meta")),
        "subclass": (x, weight.as_subclass(type("Quantized", (Tensor,), {}))),
    }.items():
        assert not fits(left, right), name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fits(x, weight)


class StockFFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(128, 160), nn.Linear(128, 160), nn.Linear(160, 128)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_a_gated_ffn_keeps_parameters_gradients_and_prefill() -> None:
    stock = StockFFN()
    own = GatedFFN(stock)
    assert list(own.state_dict()) == list(stock.state_dict())
    x, long = numbers(2, 1, 128).requires_grad_(), numbers(2, 5, 128)
    gradients = [torch.autograd.grad(ffn(x).sum(), [x, *ffn.parameters()]) for ffn in (own, stock)]
    assert all(map(torch.equal, *gradients))
    assert torch.equal(own(long), stock(long))
    with torch.no_grad():
        torch.testing.assert_close(own(x), stock(x), rtol=1e-4, atol=1e-5)


def test_layers_of_one_input_are_one_call_unless_something_wants_to_see_each() -> None:
    x, layers = numbers(3, 1, 128), [linear(numbers(*WIDE)), linear(numbers(40, 128), numbers(40))]
    wanted = [F.linear(x, layer.weight, layer.bias) for layer in layers]
    seen: list[Tensor] = []
    torch.testing.assert_close(linear_outputs(x, *layers), wanted, rtol=1e-4, atol=1e-4)
    for change in (
        lambda layer: layer.register_forward_hook(lambda module, args, out: seen.append(out)),
        lambda layer: layer.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
        lambda layer: setattr(layer, "forward", lambda x: seen.append(x) or nn.Linear.forward(layer, x)),
    ):
        first = copy.deepcopy(layers[0])
        change(first)
        seen.clear()
        torch.testing.assert_close(linear_outputs(x, first, layers[1]), wanted, rtol=1e-4, atol=1e-4)
        assert len(seen) == 1


def test_subclasses_of_linear_compute_as_they_are(calls: list[tuple[int, ...]]) -> None:
    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer, x = Twice(128, 131).requires_grad_(False), numbers(2, 1, 128)
    assert torch.equal(linear_outputs(x, layer)[0], 2 * F.linear(x, layer.weight, layer.bias))
    assert calls == []


def test_quantizers_find_every_layer_of_a_student(
    tiny_teacher: Callable[[str], PreTrainedModel], tiny_student: Callable[..., PreTrainedModel], ids: Tensor
) -> None:
    """They look for the very type; a student has as many of it as its teacher."""
    student, teacher = tiny_student("llama-biases"), tiny_teacher("llama-biases")
    plain, stock = (sum(type(module) is nn.Linear for module in model.modules()) for model in (student, teacher))
    assert plain == stock == 1 + 7 * 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(student, {nn.Linear}, dtype=torch.qint8)
    assert sum(isinstance(module, torch.ao.nn.quantized.dynamic.Linear) for module in small.modules()) == plain
    with torch.no_grad():
        got, wanted = (model(ids[:1], use_cache=False).logits for model in (small, student))
    assert torch.cosine_similarity(got.flatten(), wanted.flatten(), dim=0) > 0.98


@torch.no_grad()
def test_every_linear_layer_inside_a_decoder_layer_takes_the_kernel_in_a_decode_step(
    tiny_student: Callable[..., PreTrainedModel], ids: Tensor, calls: list[tuple[int, ...]]
) -> None:
    student = tiny_student("llama-biases")
    cache = student(ids[:3, :-1], use_cache=True).past_key_values
    assert calls == []  # a prefill has more than one position
    got = student(ids[:3, -1:], past_key_values=cache).logits[:, -1]
    assert len(calls) == 7 * 2  # q, k, v, o and three of the FFN in two layers
    assert all(shape[:2] == (3, 1) for shape in calls)
    torch.testing.assert_close(got, student(ids[:3]).logits[:, -1], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_grafted_teacher_decodes_with_the_kernel_too(
    tiny_teacher: Callable[[str], PreTrainedModel], ids: Tensor, calls: list[tuple[int, ...]]
) -> None:
    teacher = tiny_teacher("qwen2-mha-tied")
    own = graft(teacher)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    got, wanted = own.generate(ids[:2, :9], **options), teacher.generate(ids[:2, :9], **options)
    assert torch.equal(got, wanted)
    assert len(calls) == 5 * 14  # the prefill gives the first of six tokens
    assert own.lm_head.weight is own.model.embed_tokens.weight


@torch.no_grad()
def test_a_compiled_ffn_is_traced_as_plain_linears(calls: list[tuple[int, ...]], compilable: None) -> None:
    ffn, x = GatedFFN(StockFFN()), numbers(2, 1, 128)
    traced = torch.compile(ffn, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(x), ffn.down_proj(ffn.act_fn(ffn.gate_proj(x)) * ffn.up_proj(x)))
    assert calls == []

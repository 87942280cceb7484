"""Healing lowers what it should, and touches only what it may."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from healed import SEQ, STEP, config, metrics, run, same, weights
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from kvlatent.errors import UserError
from kvlatent.healing import heal as heal_module
from kvlatent.healing.adapters import ATTENTION, FFN, MAPS, with_adapters
from kvlatent.healing.config import HealConfig
from kvlatent.healing.heal import heal
from kvlatent.healing.losses import hidden_mse, kl_loss, relative_error
from kvlatent.healing.stages import Stage, in_layer_losses


def layer_errors(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return in_layer_losses(student, teacher, ids, relative=True)


def held_out_kl(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> float:
    with torch.no_grad():
        hidden, wanted = (model.model(ids).last_hidden_state.flatten(0, 1) for model in (student, teacher))
        return kl_loss(hidden, student.lm_head.weight, wanted, teacher.lm_head.weight).item()


# --- losses of the stages


@pytest.mark.parametrize("relative", [True, False])
def test_every_layer_is_fed_and_held_to_the_teachers_hidden_states(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    relative: bool,
) -> None:
    teacher, student = tiny_teacher("mistral"), tiny_student("mistral")
    states: list[Tensor] = []
    with torch.no_grad():
        for layer in teacher.model.layers:
            layer.register_forward_hook(lambda _m, args, out: states.append((args[0], out)))
        teacher(blocks[:2])
    before_and_after = list(states)
    got = in_layer_losses(student.requires_grad_(), teacher, blocks[:2], relative=relative)
    positions = torch.arange(SEQ)[None]
    distance = torch.arange(SEQ)[:, None] - torch.arange(SEQ)
    mask = ((distance >= 0) & (distance < 6)).expand(2, 1, -1, -1)
    for layer, (before, after), loss in zip(student.model.layers, before_and_after, got, strict=True):
        cos_sin = student.model.rotary_emb(before, positions)
        out = layer(before, attention_mask=mask, position_embeddings=cos_sin)
        wanted = (relative_error if relative else hidden_mse)(out, after)
        torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-6)
    got[1].backward()  # gradients stay within the layer
    assert student.model.layers[1].self_attn.q_proj.weight.grad.any()
    assert not student.model.layers[0].self_attn.q_proj.weight.grad.any()
    assert not any(layer._forward_hooks for layer in student.model.layers)


def test_a_student_of_full_dims_has_no_in_layer_error(
    tiny_teacher: Callable[[str], PreTrainedModel], tiny_student: Callable[..., PreTrainedModel], blocks: Tensor
) -> None:
    teacher = tiny_teacher("qwen3")
    assert layer_errors(tiny_student("qwen3", "best", 16, 16), teacher, blocks[:2]).max() < 1e-8


# --- what healing does


@pytest.mark.parametrize(
    ("name", "preset"),
    [("llama", "best"), ("llama", "paper"), ("qwen2-mha-tied", "paper"), ("qwen3", "best"), ("mistral", "portable")],
)
def test_stage_1_lowers_every_layers_error_on_held_out_text(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
    name: str,
    preset: str,
) -> None:
    teacher, student = tiny_teacher(name), tiny_student(name, preset)
    before = layer_errors(student, teacher, blocks[-6:])
    healed = heal(student, teacher, blocks[:-6], tmp_path / "work", config(stage1_tokens=20 * STEP, stage2_tokens=0))
    after = layer_errors(healed, teacher, blocks[-6:])
    assert (after < before).all(), (before, after)
    lines = metrics(tmp_path / "work")
    assert [line["step"] for line in lines] == list(range(20))
    assert all(len(line["layer_loss"]) == 2 and line["stage"] == 1 for line in lines)
    assert lines[0]["loss"] == pytest.approx(sum(lines[0]["layer_loss"]) / 2, rel=1e-5)
    assert lines[-1]["tokens"] == 20 * STEP


@pytest.mark.parametrize("loss", ["kl", "ntp"])
def test_stage_2_lowers_the_held_out_loss(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
    loss: str,
) -> None:
    teacher, student = tiny_teacher("llama"), tiny_student("llama")
    settings = config(loss=loss, stage1_tokens=0, stage2_tokens=20 * STEP, learning_rate=2e-3)

    def held_out(model: PreTrainedModel) -> float:
        if loss == "kl":
            return held_out_kl(model, teacher, blocks[-6:])
        with torch.no_grad():
            return model(blocks[-6:], labels=blocks[-6:]).loss.item()

    before = held_out(student)
    healed = heal(student, teacher, blocks[:-6], tmp_path / "work", settings)
    assert held_out(healed) < before
    assert [line["stage"] for line in metrics(tmp_path / "work")] == [2] * 20


def test_stage_2_after_stage_1_starts_its_own_schedule_on_the_next_blocks(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []
    forward = Stage.forward
    monkeypatch.setattr(
        Stage, "forward", lambda self, ids, **options: (seen.append(ids), forward(self, ids, **options))[1]
    )
    settings = config(stage1_learning_rate=1e-3, learning_rate=3e-4, warmup=0.0)
    heal(tiny_student("llama"), tiny_teacher("llama"), blocks, tmp_path / "work", settings)
    assert torch.equal(torch.cat(seen), blocks[:16])
    halves = [0.5 * (1 + torch.tensor(step * torch.pi / 4).cos().item()) for step in range(4)]
    expected = [1e-3 * half for half in halves] + [3e-4 * half for half in halves]
    assert [line["lr"] for line in metrics(tmp_path / "work")] == pytest.approx(expected)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    factors = [heal_module.cosine(step, total=10, warmup=4) for step in range(11)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factors[4] == 1
    assert factors[7] == pytest.approx(0.5)
    assert factors[10] == pytest.approx(0)


@pytest.mark.parametrize("train", [("attention", "maps"), ("attention", "maps", "norms")])
@pytest.mark.parametrize("name", ["llama", "qwen2-mha-tied", "qwen3"])
def test_healing_touches_only_what_it_may(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
    name: str,
    train: tuple[str, ...],
) -> None:
    teacher, student = tiny_teacher(name), tiny_student(name)
    before, teacher_before = weights(student), weights(teacher)
    healed = heal(student, teacher, blocks, tmp_path / "work", config(train=train, learning_rate=1e-3))
    assert healed is student and not healed.training
    assert same(weights(teacher), teacher_before)
    after = weights(healed)
    assert after.keys() == before.keys()  # LoRA is gone
    assert not any(isinstance(module, LoraLayer) for module in healed.modules())
    for parameter_name, value in after.items():
        trained = {*ATTENTION, *MAPS, *FFN} & set(parameter_name.split("."))
        trains = "norms" in train if "norm" in parameter_name else bool(trained)
        assert torch.equal(value, before[parameter_name]) != trains, parameter_name
    assert (healed.lm_head.weight is healed.model.embed_tokens.weight) == name.endswith("tied")


def test_without_lora_the_ffn_stays(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
) -> None:
    student = tiny_student("llama")
    before = weights(student)
    healed = weights(heal(student, tiny_teacher("llama"), blocks, tmp_path / "work", config(lora_rank=0)))
    for name, value in before.items():
        assert torch.equal(healed[name], value) == ("self_attn" not in name), name


def test_trained_norms_survive_saving(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    byte_tokenizer: Any,
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    from kvlatent.model.checkpoints import save_checkpoint

    student = tiny_student("qwen3")
    start = weights(student)
    healed = heal(
        student, tiny_teacher("qwen3"), blocks, tmp_path / "work", config(train=("attention", "maps", "norms"))
    )
    save_checkpoint(healed, byte_tokenizer, tmp_path / "model", record={})
    loaded = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32))
    assert same(loaded, weights(healed))
    for name in (
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.self_attn.k_norm.weight",
    ):
        assert not torch.equal(loaded[name], start[name])


def test_lora_merge_keeps_the_logits(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unmerged: list[Tensor] = []
    finish = heal_module.finished

    def compare(trained: torch.nn.Module, *options: Any) -> PreTrainedModel:
        assert sum(isinstance(module, LoraLayer) for module in trained.modules()) == 3 * 2
        with torch.no_grad():
            unmerged.append(trained.eval()(blocks[:4]).logits)
        return finish(trained, *options)

    monkeypatch.setattr(heal_module, "finished", compare)
    student = tiny_student("llama")
    down = student.model.layers[0].mlp.down_proj.weight.clone()
    healed = heal(student, tiny_teacher("llama"), blocks, tmp_path / "work", config(learning_rate=5e-3))
    with torch.no_grad():
        torch.testing.assert_close(healed(blocks[:4]).logits, unmerged[0], rtol=0, atol=1e-4)
    assert (healed.model.layers[0].mlp.down_proj.weight - down).abs().max() > 1e-4


# --- watching, and what is left in the end


def test_held_out_perplexity_is_measured_on_the_way_and_tensorboard_is_told(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from kvlatent.evaluation.perplexity import perplexity

    settings = config(eval_tokens=2 * STEP, learning_rate=1e-3)
    models = tiny_student("llama"), tiny_teacher("llama")
    work = tmp_path / "work"
    healed = heal(*models, blocks[:-6], work, settings, held_out=blocks[-6:], track=["tensorboard"])
    lines = metrics(work)
    assert [line["step"] for line in lines if "held_out_perplexity" in line] == [1, 3, 1, 3]
    wanted = perplexity(healed, blocks[-6:], text_bytes=100, batch_size=2).perplexity
    assert lines[-1]["held_out_perplexity"] == pytest.approx(wanted, rel=1e-4)
    assert all(line["peak_memory_bytes"] > 1e7 for line in lines)
    (events,) = (file.parent for file in (work / "tracked").glob("events*"))
    told = EventAccumulator(str(events)).Reload()
    assert [event.value for event in told.Scalars("stage2/loss")] == pytest.approx(
        [line["loss"] for line in lines if line["stage"] == 2]
    )
    unwatched = heal(tiny_student("llama"), tiny_teacher("llama"), blocks[:-6], tmp_path / "unwatched", settings)
    assert same(weights(unwatched), weights(healed))


def test_experts_get_no_adapters(tiny_student: Callable[..., PreTrainedModel]) -> None:
    trained = with_adapters(tiny_student("qwen3_next"), config())  # whose second layer has a shared expert too
    found = {name for name, module in trained.named_modules() if isinstance(module, LoraLayer)}
    assert found == {f"base_model.model.model.layers.0.mlp.{name}" for name in FFN}


@pytest.mark.parametrize("how", ["keep", "save"])
def test_adapters_can_be_kept_apart(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
    how: str,
) -> None:
    from peft import PeftModel

    def run(how: str) -> PreTrainedModel:
        settings = config(adapters=how, learning_rate=5e-3)
        return heal(tiny_student("llama"), tiny_teacher("llama"), blocks, tmp_path / how, settings)

    merged, healed = run("merge"), run(how)
    assert not any(isinstance(module, LoraLayer) for module in healed.modules())
    down = [model.model.layers[0].mlp.down_proj.weight for model in (healed, tiny_student("llama"), merged)]
    assert torch.equal(down[0], down[1]) == (how == "keep")
    assert torch.equal(down[0], down[2]) == (how == "save")
    assert not (tmp_path / "merge" / "adapters").exists()
    base = healed if how == "keep" else copy.deepcopy(healed)
    if how == "save":
        for layer, start in zip(base.model.layers, tiny_student("llama").model.layers, strict=True):
            layer.mlp.load_state_dict(start.mlp.state_dict())
    adapted = PeftModel.from_pretrained(base, str(tmp_path / how / "adapters"))
    with torch.no_grad():
        torch.testing.assert_close(adapted(blocks[:2]).logits, merged(blocks[:2]).logits, rtol=1e-4, atol=1e-4)


# --- refused


def test_an_absent_tracker_or_fp16_on_a_cpu_is_refused(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = tiny_student("llama"), tiny_teacher("llama")
    with pytest.raises(UserError, match=r"tracker paper is not installed; there are: .*tensorboard"):
        heal(*models, blocks, tmp_path / "work", config(), track=["paper"])
    with pytest.raises(UserError, match="fp16 needs an accelerator"):
        heal(*models, blocks, tmp_path / "work", config(mixed_precision="fp16"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="can't save DeepSpeed's state; FSDP2 shards the same"):
        heal(*models, blocks, tmp_path / "work", config())


def test_resuming_with_other_settings_or_text_is_refused(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
) -> None:
    models = tiny_teacher, tiny_student
    run(*models, blocks, tmp_path / "work", config())
    with pytest.raises(UserError, match=r"other settings \(learning_rate\)"):
        run(*models, blocks, tmp_path / "work", config(learning_rate=1e-3), resume=True)
    with pytest.raises(UserError, match="begun with other text"):
        run(*models, blocks.flip(0), tmp_path / "work", config(), resume=True)


def test_too_little_text_is_refused_before_anything_is_written(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match="healing needs 16 blocks of 16 tokens; the text gives 15"):
        run(tiny_teacher, tiny_student, blocks[:15], tmp_path / "work", config())
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_loss_that_is_not_finite_names_stage_and_step(
    tiny_teacher: Callable[[str], PreTrainedModel],
    tiny_student: Callable[..., PreTrainedModel],
    blocks: Tensor,
    tmp_path: Path,
    stage: int,
) -> None:
    student = tiny_student("llama")
    student.model.embed_tokens.weight.data[1] = torch.nan  # only stage 2 sees the student's embedding
    teacher = tiny_teacher("llama")
    if stage == 1:
        teacher.model.embed_tokens.weight.data[1] = torch.nan
    text = torch.full((16, SEQ), 2)
    text[4 if stage == 1 else 12] = 1
    with pytest.raises(UserError, match=f"the loss is nan at stage {stage}, step 2 .*lower the learning rate"):
        heal(student, teacher, text, tmp_path / "work", config())


# --- settings


def test_paper_settings_are_the_papers() -> None:
    train, distill = HealConfig.for_preset("paper", loss="ntp"), HealConfig.for_preset("paper", loss="kl")
    assert (train.learning_rate, distill.learning_rate, distill.temperature) == (2e-5, 2e-7, 10.0)
    for settings in (train, distill):
        assert (settings.lora_rank, settings.lora_alpha, settings.eps, settings.weight_decay) == (256, 512, 2e-4, 0.01)
        assert (settings.warmup, settings.clip, settings.batch_size) == (0.0, None, 8)
        assert settings.train == ("attention", "maps", "norms")
        assert settings.stage1_loss == "mse"


def test_any_lora_rank_keeps_the_papers_ratio_of_alpha() -> None:
    assert HealConfig.for_preset("paper", lora_rank=16).lora_alpha == 32
    assert HealConfig.for_preset("best", lora_rank=16, lora_alpha=5).lora_alpha == 5
    assert HealConfig.for_preset("best", lora_rank=None) == HealConfig()


def test_the_teacher_is_neither_trained_nor_saved(
    tiny_teacher: Callable[[str], PreTrainedModel], tiny_student: Callable[..., PreTrainedModel]
) -> None:
    student = tiny_student("llama")
    stage = Stage(student, student, tiny_teacher("llama"), config())
    assert {id(p) for p in stage.parameters()} == {id(p) for p in student.parameters()}
    assert len(copy.deepcopy(stage.state_dict())) == len(student.state_dict())

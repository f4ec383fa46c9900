"""The trainer on tiny random models: what is trained, resuming, accumulation, bad input."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainingArguments

import gateskip
from gateskip.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DataError,
    TrainingError,
    UnsupportedError,
)
from gateskip.execution.api import dense
from gateskip.skipping.state import state_of
from gateskip.training import Collator, GateSkipTrainer, GateSkipTrainingConfig, make_dataset
from gateskip.training.recipe import last_checkpoint
from models import gated, random_ids, with_table


def model_for_training(**options: Any) -> Any:
    return with_table(gated(compensation="low_rank", **options))


def data(rows: int = 16) -> Any:
    lengths = [9 + (5 * i) % 14 for i in range(rows)]
    dataset = make_dataset([random_ids(1, n, seed=i)[0] for i, n in enumerate(lengths)])
    for i, sample in enumerate(dataset.samples):  # labels start in the middle of a row
        sample.scored[: 2 + i % 4] = False
    return dataset


def trainer(
    model: Any, folder: Path, config: dict[str, Any] | None = None, **arguments: Any
) -> GateSkipTrainer:
    defaults: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    options = {"budget_start": 0.7, "budget_end": 0.7} | (config or {})
    return GateSkipTrainer(
        model,
        TrainingArguments(str(folder), **(defaults | arguments)),
        train_dataset=data(),
        gateskip_args=GateSkipTrainingConfig(**options),
    )


def snapshot(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def moved(before: dict[str, Tensor], model: Any) -> set[str]:
    return {n for n, p in model.named_parameters() if n in before and not torch.equal(before[n], p)}


GATES = {"backbone": "frozen", "train_gates": True, "train_compensation": False, "penalty": 0.1}


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (GATES, {"gate"}),
        ({"backbone": "frozen"}, {"compensation"}),
        ({"backbone": "full", "train_compensation": False}, {"backbone"}),
        ({"backbone": "full", "train_gates": True}, {"backbone", "gate", "compensation"}),
        ({"backbone": "lora"}, {"lora", "compensation"}),
        ({"backbone": "full", "arm": "control"}, {"backbone"}),
        ({"backbone": "lora", "arm": "control"}, {"lora"}),
    ],
)
def test_what_is_named_is_trained_and_nothing_else(
    tmp_path: Path, config: dict[str, Any], kinds: set[str]
) -> None:
    run = trainer(model_for_training(), tmp_path, config)
    before = snapshot(run.model)
    run.train()

    def kind(name: str) -> str:
        if ".skip_gate." in name:
            return "gate"
        if ".skip_compensation." in name:
            return "compensation"
        return "lora" if ".lora_" in name else "backbone"

    assert {kind(name) for name in moved(before, run.model)} == kinds


def test_tokens_are_really_skipped_while_training(tmp_path: Path) -> None:
    """Rows that enter an MLP's projections are those of the log's skip rate."""
    run = trainer(model_for_training(), tmp_path, {"backbone": "full"}, max_steps=1)
    rows: list[int] = []
    for layer in run.model.model.layers:
        layer.mlp.up_proj.register_forward_hook(
            lambda _m, args, _o: rows.append(args[0].reshape(-1, args[0].shape[-1]).shape[0])
        )
    run.train()
    (entry,) = [e for e in run.state.log_history if "loss" in e]
    valid = run.tokens_seen * len(run.model.model.layers)
    assert 0.05 < entry["skip_rate_mlp"] < 0.95
    assert sum(rows) == pytest.approx(valid * (1 - entry["skip_rate_mlp"]), abs=0.5)
    assert entry["budget"] == pytest.approx(0.7)


def test_resuming_repeats_the_uninterrupted_run(tmp_path: Path) -> None:
    config = {
        "backbone": "lora", "train_gates": True, "penalty": 0.1, "schedule": "sampled",
        "budget_start": 1.0, "budget_end": 0.6, "distill": 0.5, "calibrate_every": 2,
    }  # fmt: skip

    def run(folder: str, stop: int | None) -> GateSkipTrainer:
        made = GateSkipTrainer(
            model_for_training(),
            TrainingArguments(
                str(tmp_path / folder), max_steps=6, per_device_train_batch_size=4,
                learning_rate=1e-2, logging_steps=1, save_steps=3, report_to=[], use_cpu=True,
                disable_tqdm=True, adam_beta2=0.95,
            ),
            train_dataset=data(),
            gateskip_args=GateSkipTrainingConfig(**config),
            calibration_data=[random_ids(1, 100, seed=i)[0] for i in range(12)],
        )  # fmt: skip
        if stop is not None:
            original = made.training_step

            def step(*args: Any, **kwargs: Any) -> Any:
                if made.state.global_step == stop:
                    raise KeyboardInterrupt
                return original(*args, **kwargs)

            made.training_step = step  # type: ignore[method-assign]
        return made

    whole = run("whole", None)
    whole.train()
    first = run("parts", 4)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    checkpoint = last_checkpoint(tmp_path / "parts")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-3"
    second = run("parts", None)
    second.train(resume_from_checkpoint=str(checkpoint))
    losses = [e["loss"] for e in whole.state.log_history if "loss" in e]
    again = [e["loss"] for e in second.state.log_history if "loss" in e]
    assert again == losses
    for (name, a), (_, b) in zip(
        whole.model.named_parameters(), second.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    assert state_of(whole.model).policy == state_of(second.model).policy


def test_i11_accumulation_gives_the_same_gradients(tmp_path: Path) -> None:
    config = GATES | {"train_compensation": True, "backbone": "full"}
    gradients = []
    for batch, accumulate in ((8, 1), (2, 4)):
        run = trainer(
            model_for_training(), tmp_path, config, max_steps=1, max_grad_norm=0.0,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, optim="sgd",
            learning_rate=1.0, train_sampling_strategy="sequential",
        )  # fmt: skip
        before = snapshot(run.model)
        run.train()
        gradients.append({n: before[n] - p.detach() for n, p in run.model.named_parameters()})
    for name, gradient in gradients[0].items():
        scale = float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(gradients[1][name] / scale, gradient / scale, atol=1e-3, rtol=0)


def test_chunked_loss_is_the_models_own(tmp_path: Path) -> None:
    run = trainer(model_for_training(), tmp_path, {"backbone": "full"})
    batch = Collator()([run.train_dataset[i] for i in range(4)])
    items = (batch["labels"][:, 1:] != -100).sum()
    run.model.train()
    found = run.compute_loss(run.model, dict(batch), num_items_in_batch=items)
    with gateskip.budget(run.model, compute=0.7):
        expected = run.model(**batch, num_items_in_batch=items).loss
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backbone", ["lora", "full"])
def test_the_teacher_is_the_model_before_training(tmp_path: Path, backbone: str) -> None:
    model = model_for_training()
    ids = random_ids(2, 12)
    with torch.no_grad(), dense(model):
        expected = model.model(ids).last_hidden_state
    run = trainer(model, tmp_path, {"backbone": backbone, "distill": 0.5})
    run.train()
    assert torch.equal(run._causal_loss.taught({"input_ids": ids}), expected)
    entry = next(e for e in run.state.log_history if "distillation" in e)
    assert entry["loss"] == pytest.approx(
        0.5 * entry["cross_entropy"] + 0.5 * entry["distillation"], abs=1e-4
    )


@pytest.mark.parametrize("backbone", ["lora", "full"])
def test_the_teacher_is_the_model_itself_at_full_compute(tmp_path: Path, backbone: str) -> None:
    model = model_for_training()
    options = {"backbone": backbone, "distill": 0.5, "teacher": "itself"}
    run = trainer(model, tmp_path, options)
    ids = random_ids(2, 12)
    before = run._causal_loss.taught({"input_ids": ids})
    run.train()
    assert run._causal_loss.teacher is None
    with torch.no_grad(), dense(model):
        now = model.model(ids).last_hidden_state
    found = run._causal_loss.taught({"input_ids": ids})
    assert torch.equal(found, now)
    assert not torch.allclose(found, before, atol=1e-3)


def test_trained_policy_decides_alike_in_training_prefill_and_decoding(tmp_path: Path) -> None:
    from gateskip.execution.api import trace
    from models import through_cache

    run = trainer(model_for_training(), tmp_path, {"backbone": "full", "train_gates": True})
    run.train()
    model, ids = run.finish(), random_ids(2, 16, seed=9)
    ones = torch.ones_like(ids)
    positions = (ones.cumsum(-1) - 1).contiguous()
    seen = []
    with gateskip.budget(model, compute=0.7):
        with trace(model) as a:  # as in training: with a graph, no cache
            model(ids, attention_mask=ones, use_cache=False)
        with torch.no_grad():
            with trace(model) as b:
                model(ids, attention_mask=ones)
            with trace(model) as c:
                through_cache(model, ids, ones, positions, 1)
    for t in (a, b, c):
        seen.append({k: torch.cat(parts, 1) for k, parts in t.keep.items()})
    for other in seen[1:]:
        for key, keep in seen[0].items():
            assert torch.equal(other[key], keep), key


@pytest.mark.parametrize("backbone", ["lora", "full"])
def test_save_and_load_what_was_trained(tmp_path: Path, backbone: str) -> None:
    run = trainer(model_for_training(), tmp_path / "run", {"backbone": backbone})
    base = copy.deepcopy(gateskip.detach(model_for_training()))
    run.train()
    ids = random_ids(2, 12)
    with torch.no_grad(), gateskip.budget(run.model, compute=0.7):
        live = run.model.eval()(ids).logits
    model = run.finish()
    with torch.no_grad(), gateskip.budget(model, compute=0.7):
        merged = model(ids).logits
    torch.testing.assert_close(merged, live, atol=1e-4, rtol=1e-4)
    assert not any("lora" in n for n, _ in model.named_modules())
    for attempt in range(2):  # what was loaded can be saved again
        folder = tmp_path / f"saved{attempt}"
        gateskip.save(model, folder)
        model = gateskip.load(folder, base=copy.deepcopy(base))
        with torch.no_grad(), gateskip.budget(model, compute=0.7):
            torch.testing.assert_close(model(ids).logits, merged, atol=1e-5, rtol=1e-5)


def test_storage_in_bfloat16_keeps_gates_in_float32(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = trainer(model_for_training(), tmp_path / "run", {"backbone": "lora"})
    run.train()
    gateskip.save(run.finish(), tmp_path / "saved", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "saved" / "gateskip_model.safetensors")
    changes = [t.dtype for name, t in tensors.items() if name.startswith("merged.")]
    assert changes
    assert set(changes) == {torch.bfloat16}
    assert all(t.dtype == torch.float32 for n, t in tensors.items() if ".skip_gate." in n)


def test_a_second_training_adds_to_the_first(tmp_path: Path) -> None:
    model = model_for_training()
    base = copy.deepcopy(gateskip.detach(model_for_training()))
    for seed in (0, 1):
        run = trainer(model, tmp_path / "run", {"backbone": "lora"}, seed=seed)
        run.train()
        model = run.finish()
    gateskip.save(model, tmp_path / "saved")
    loaded = gateskip.load(tmp_path / "saved", base=base)
    ids = random_ids(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_own_learning_rates(tmp_path: Path) -> None:
    config = {
        "backbone": "full", "train_gates": True, "gate_learning_rate": 0.5,
        "compensation_learning_rate": 0.25,
    }  # fmt: skip
    run = trainer(model_for_training(), tmp_path, config)
    optimizer = run.create_optimizer()
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in run.model.named_parameters():
        wanted = 0.5 if ".skip_gate." in name else 0.25 if ".skip_comp" in name else 1e-2
        assert rates[id(parameter)] == wanted, name


def test_without_thresholds_it_warns_and_skips_nothing(tmp_path: Path) -> None:
    model = gated(compensation="low_rank")
    with pytest.warns(UserWarning, match="no thresholds"):
        run = trainer(model, tmp_path, {"backbone": "full"}, max_steps=1)
    run.train()
    (entry,) = [e for e in run.state.log_history if "loss" in e]
    assert entry["skip_rate"] == 0.0
    assert entry["budget"] == 1.0


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    run = trainer(
        model_for_training(), tmp_path, {"backbone": "full"}, save_strategy="steps", save_steps=2,
        logging_nan_inf_filter=False,
    )  # fmt: skip
    original = run._causal_loss

    def loss(*args: Any) -> Tensor:
        found = original(*args)
        return found * float("nan") if run.state.global_step == 3 else found

    run._causal_loss = loss  # type: ignore[assignment]
    with pytest.raises(TrainingError, match=r"loss is nan at step 3.*checkpoint-2"):
        run.train()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_resuming_with_other_options_is_refused(tmp_path: Path) -> None:
    run = trainer(
        model_for_training(), tmp_path, {"backbone": "full"}, save_strategy="steps", save_steps=2
    )
    run.train()
    checkpoint = str(tmp_path / "checkpoint-2")
    other = trainer(model_for_training(), tmp_path, {"backbone": "full", "distill": 0.5})
    with pytest.raises(CheckpointError, match=r"distill=0\.0"):
        other.train(resume_from_checkpoint=checkpoint)
    gates = trainer(
        with_table(gated(compensation="low_rank", kind="vector")), tmp_path, {"backbone": "full"}
    )
    with pytest.raises(CheckpointError, match="kind"):
        gates.train(resume_from_checkpoint=checkpoint)


def test_an_incomplete_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step, text in ((2, '{"global_step": 2}'), (4, '{"glob')):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(text)
        (folder / "gateskip_training.json").write_text(json.dumps({}))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert last_checkpoint(tmp_path / "none") is None


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="floor"):
        trainer(model_for_training(), tmp_path, {"budget_end": 0.1})
    with pytest.raises(ConfigError, match="calibration_data"):
        trainer(model_for_training(), tmp_path, {"calibrate_every": 2})
    with pytest.raises(ConfigError, match="nothing is trained"):
        trainer(with_table(gated()), tmp_path, {"backbone": "frozen"})
    rows = [{"prompt": "a b c", "completion": "d"}]
    assert len(make_dataset(rows, _Words(), max_length=8)) == 1
    with pytest.raises(DataError, match="no usable row"):
        make_dataset(rows, _Words(), max_length=2)


class _Words:
    """A tokenizer of words."""

    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [3 + len(word) for word in text.split()]}


def test_the_teachers_own_head_is_used(tmp_path: Path) -> None:
    """A backbone trained in full moves the LM head; the teacher keeps the old one."""
    model = model_for_training()
    frozen = copy.deepcopy(model)
    run = trainer(model, tmp_path, {"backbone": "full", "distill": 1.0}, max_steps=3)
    run.train()
    batch = Collator()([run.train_dataset[i] for i in range(4)])
    chosen = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        with dense(frozen):
            wanted = frozen(**batch).logits[:, :-1][chosen].log_softmax(-1)
        with gateskip.budget(model, compute=0.7):
            got = model(**batch).logits[:, :-1][chosen].log_softmax(-1)
    expected = (wanted.exp() * (wanted - got)).sum(-1).mean()
    model.train()
    torch.testing.assert_close(run.compute_loss(model, dict(batch)), expected, atol=1e-4, rtol=1e-3)


def test_distillation_where_it_would_be_ignored_is_refused(tmp_path: Path) -> None:
    from transformers import Trainer

    from gateskip.training import GateSkipMixin

    class Other(GateSkipMixin, Trainer):  # type: ignore[misc]
        pass

    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(UnsupportedError, match="distill"):
        Other(
            model_for_training(), arguments, train_dataset=data(),
            gateskip_args=GateSkipTrainingConfig(budget_end=0.7, distill=0.5),
        )  # fmt: skip
    with pytest.raises(UnsupportedError, match="distill"):
        trainer(model_for_training(), tmp_path, {"distill": 0.5}, label_smoothing_factor=0.1)


def test_a_gradient_that_is_no_number_changes_nothing(tmp_path: Path) -> None:
    run = trainer(model_for_training(), tmp_path, {"backbone": "full"})
    run.model.model.layers[1].mlp.up_proj.weight.register_hook(lambda g: g * float("inf"))
    before = snapshot(run.model)
    with pytest.raises(TrainingError, match="gradient's norm"):
        run.train()
    assert moved(before, run.model) == set()


@pytest.mark.parametrize("extra", [{}, {"decision_gradient": 0.5, "cost_weight": 0.5}])
def test_previous_keys_and_values_train(tmp_path: Path, extra: dict[str, Any]) -> None:
    config = {"backbone": "full", "train_gates": True} | extra
    run = trainer(model_for_training(kv_source="previous"), tmp_path, config, max_steps=2)
    run.train()
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    entry = next(e for e in run.state.log_history if "loss" in e)
    assert entry["skip_rate"] > 0.05
    if extra:
        assert 0 < entry["expected_cost"] < 1.01


def test_grouping_by_length_resumes_inside_the_second_epoch(tmp_path: Path) -> None:
    def run(folder: str) -> GateSkipTrainer:
        return trainer(
            model_for_training(), tmp_path / folder, {"backbone": "full"}, max_steps=7,
            save_strategy="steps", save_steps=6, train_sampling_strategy="group_by_length",
        )  # fmt: skip

    whole = run("a")
    whole.train()
    again = run("a")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    a, b = ([e["loss"] for e in r.state.log_history if "loss" in e] for r in (whole, again))
    assert a == b


def test_seeds_seed_lora(tmp_path: Path) -> None:
    def start(seed: int) -> Tensor:
        torch.rand(seed + 1)  # whatever ran before does not matter
        run = trainer(model_for_training(), tmp_path, {"backbone": "lora"}, seed=seed)
        return run.model.model.layers[0].mlp.up_proj.lora_A["default"].weight.detach()

    assert torch.equal(start(3), start(3))
    assert not torch.equal(start(3), start(4))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_users_own_lora_is_trained_and_several_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = model_for_training()
    inject_adapter_in_model(LoraConfig(r=3, target_modules=["q_proj"]), model)
    run = trainer(model, tmp_path, {"backbone": "lora", "train_compensation": False})
    before = snapshot(run.model)
    run.train()
    names = moved(before, run.model)
    assert names
    assert all(".q_proj.lora_" in n for n in names)
    inject_adapter_in_model(
        LoraConfig(r=3, target_modules=["q_proj"]), model, adapter_name="second"
    )
    with pytest.raises(UnsupportedError, match="several adapters"):
        run.finish()


def test_a_trained_base_is_not_trained_twice_by_loading(tmp_path: Path) -> None:
    base = gateskip.detach(model_for_training())
    run = trainer(model_for_training(), tmp_path / "run", {"backbone": "lora"})
    run.train()
    gateskip.save(run.finish(), tmp_path / "saved")
    model = gateskip.load(tmp_path / "saved", base=base)
    ids = random_ids(2, 12)
    gateskip.detach(model)
    with pytest.raises(CheckpointError, match="afresh"):
        gateskip.load(tmp_path / "saved", base=model)
    gateskip.attach(model)
    gateskip.save(model, tmp_path / "again")
    fresh = gateskip.load(tmp_path / "again", base=gateskip.detach(model_for_training()))
    with torch.no_grad(), dense(model), dense(fresh):
        torch.testing.assert_close(fresh(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_lora_after_lora_resumes(tmp_path: Path) -> None:
    first = trainer(model_for_training(), tmp_path / "first", {"backbone": "lora"})
    first.train()
    gateskip.save(first.finish(), tmp_path / "saved")

    def second() -> GateSkipTrainer:
        base = gateskip.detach(model_for_training())
        return trainer(
            gateskip.load(tmp_path / "saved", base=base), tmp_path / "second",
            {"backbone": "lora"}, save_strategy="steps", save_steps=2,
        )  # fmt: skip

    whole = second()
    whole.train()
    again = second()
    again.train(resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-2"))
    a, b = ([e["loss"] for e in r.state.log_history if "loss" in e] for r in (whole, again))
    assert a == b


def test_dense_around_training_is_refused(tmp_path: Path) -> None:
    run = trainer(model_for_training(), tmp_path, {"backbone": "full"})
    with dense(run.model):
        with dense(run.model):
            assert not run.model.model._forward_pre_hooks
        assert not run.model.model._forward_pre_hooks
        with pytest.raises(UnsupportedError, match="dense"):
            run.train()
    assert len(run.model.model._forward_pre_hooks) == 1


def test_masked_and_compacted_decisions_have_the_same_gradients(tmp_path: Path) -> None:
    config = {"backbone": "full", "train_gates": True, "decision_gradient": 0.5}
    found = []
    for mode in ("masked", "compacted"):
        run = trainer(model_for_training(), tmp_path, config)
        batch = Collator()([run.train_dataset[i] for i in range(4)])
        run.model.train()
        with gateskip.execution(run.model, mode):
            run.compute_loss(run.model, batch).backward()
        found.append({n: p.grad for n, p in run.model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        scale = float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(found[1][name] / scale, gradient / scale, atol=2e-3, rtol=0)


def test_evaluation_is_at_one_budget(tmp_path: Path) -> None:
    run = trainer(
        model_for_training(), tmp_path,
        {"backbone": "full", "schedule": "sampled", "budget_start": 1.0, "budget_end": 0.6},
    )  # fmt: skip
    losses = set()
    for step in range(3):
        run.state.global_step = step
        losses.add(run.evaluate(data(8))["eval_loss"])
    assert len(losses) == 1


def test_collator_pads_right_and_labels_only_what_counts() -> None:
    rows = make_dataset([random_ids(1, 4)[0], random_ids(1, 6)[0]])
    rows.samples[0].scored[:2] = False
    batch = Collator(9)([rows[0], rows[1]])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert batch["input_ids"][0, 4:].tolist() == [9, 9]
    assert batch["labels"][0].tolist() == [
        -100,
        -100,
        *rows.samples[0].ids[2:].tolist(),
        -100,
        -100,
    ]


def test_a_teacher_without_a_share_of_the_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="distill=0"):
        GateSkipTrainingConfig(teacher="itself")


def test_a_step_that_skips_nobody_changes_no_compensation(tmp_path: Path) -> None:
    options = {"backbone": "frozen", "budget_start": 1.0, "budget_end": 1.0}
    run = trainer(model_for_training(), tmp_path, options, max_steps=2, weight_decay=0.0)
    before = snapshot(run.model)
    run.train()
    assert not moved(before, run.model)


def test_lora_says_where_there_is_nothing_to_take(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gpt2 has none"):
        trainer(with_table(gated("gpt2", compensation="low_rank")), tmp_path, {"backbone": "lora"})

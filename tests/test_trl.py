"""ForestLogprobs: TRL's losses, metrics and gradients, with the tokens that a group shares forwarded once."""

import copy
import logging

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from backprompt import LM, Text, UnsupportedModelError
from backprompt.integrations.trl import ForestLogprobs, ForestStates
from tiny_models import build
from tiny_tokenizers import byte_level_bpe

pytestmark = [  # of TRL's own code and of transformers
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]

PROMPTS = ["the cat sat on", "Review: the film was great, the ending"]
GROUP = 4


class ForestGRPO(ForestLogprobs, GRPOTrainer):
    pass


class ForestDPO(ForestStates, DPOTrainer):
    pass


class ForestRLOO(ForestLogprobs, RLOOTrainer):
    pass


def count_e(completions, **others):
    return [float(completion.count("e")) for completion in completions]


def make_trainer(kind, folder, model="llama", lora=False, seed=0, change=None, **options):
    config = GRPOConfig if issubclass(kind, GRPOTrainer) else RLOOConfig
    tokenizer = byte_level_bpe()
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(1)
    built = build(model, seed=seed)
    built.config.pad_token_id = built.config.eos_token_id = tokenizer.pad_token_id
    built.generation_config.pad_token_id = built.generation_config.eos_token_id = tokenizer.pad_token_id
    if change is not None:
        built = change(built)
    return kind(
        built,
        reward_funcs=count_e,
        args=config(
            str(folder),
            per_device_train_batch_size=2 * GROUP,
            num_generations=GROUP,
            max_completion_length=6,
            max_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            seed=3,
            disable_tqdm=True,
            **{"gradient_checkpointing": False, "beta": 0.0, **options},
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False) if lora else None,
    )


def batch_of(trainer):
    """Two groups behind prompts of different lengths, padded on the left; completions padded on the right."""
    tokenizer = trainer.processing_class
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS for _ in range(GROUP)]
    draw = torch.Generator().manual_seed(0)
    width, kept, pad = max(map(len, prompts)), 6, tokenizer.pad_token_id
    input_ids = torch.full((len(prompts), width + kept), pad)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        length = 1 + row % kept
        input_ids[row, width - len(ids) : width] = torch.tensor(ids)
        input_ids[row, width : width + length] = torch.randint(2, 100, (length,), generator=draw)
        mask[row, width - len(ids) : width + length] = 1
    return input_ids, mask, kept


def gradients_of(trainer, method, input_ids, mask, kept):
    """Log-probabilities and entropies by a method of the trainer, and the gradients of a loss of both."""
    model = trainer.model
    model.zero_grad()
    logprobs, entropies, aux_loss = method(trainer, model, input_ids, mask, kept, compute_entropy=True)
    assert aux_loss is None
    weights = torch.linspace(0.5, 1.5, logprobs.numel()).view_as(logprobs)
    ((logprobs + 0.1 * entropies) * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logprobs.detach(), entropies.detach(), gradients


@pytest.mark.parametrize(("kind", "own_kind"), [(ForestGRPO, GRPOTrainer), (ForestRLOO, RLOOTrainer)])
@pytest.mark.parametrize("lora", [False, True])
def test_logprobs_entropies_and_gradients_are_the_trainers_own(kind, own_kind, lora, tmp_path):
    trainer = make_trainer(kind, tmp_path, lora=lora, temperature=0.7)
    batch = batch_of(trainer)
    logprobs, entropies, gradients = gradients_of(trainer, kind._get_per_token_logps_and_entropies, *batch)
    plain = own_kind._get_per_token_logps_and_entropies
    own_logprobs, own_entropies, own_gradients = gradients_of(trainer, plain, *batch)
    torch.testing.assert_close(logprobs, own_logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, own_entropies, atol=1e-5, rtol=1e-5)
    assert gradients
    assert gradients.keys() == own_gradients.keys()
    for name, gradient in own_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert not trainer.forest_refusals


def test_adapters_that_transformers_has_added_are_trained(tmp_path):
    """Such a model has a `peft_config`, and is no model of peft."""

    def adapted(model):
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        return model

    trainer = make_trainer(ForestGRPO, tmp_path, change=adapted)
    batch = batch_of(trainer)
    logprobs, _, gradients = gradients_of(trainer, ForestGRPO._get_per_token_logps_and_entropies, *batch)
    own_logprobs, _, own_gradients = gradients_of(trainer, GRPOTrainer._get_per_token_logps_and_entropies, *batch)
    torch.testing.assert_close(logprobs, own_logprobs, atol=1e-5, rtol=1e-5)
    assert all("lora" in name for name in gradients)
    for name, gradient in own_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert not trainer.forest_refusals


@pytest.mark.parametrize("has_graph", [False, True])
def test_a_batch_size_bounds_what_is_forwarded_at_once(has_graph, tmp_path, monkeypatch):
    trainer = make_trainer(ForestGRPO, tmp_path)
    input_ids, mask, kept = batch_of(trainer)
    with torch.set_grad_enabled(has_graph):
        expected, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, input_ids, mask, kept)
        forwarded = count_embedded(monkeypatch)
        found, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, input_ids, mask, kept, batch_size=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(forwarded) > 1
    assert max(forwarded) <= input_ids.shape[1]


def count_embedded(monkeypatch):
    """A list that the number of tokens of each pass is appended to."""
    forwarded = []
    own = torch.nn.functional.embedding
    monkeypatch.setattr(
        torch.nn.functional, "embedding", lambda ids, *args: (forwarded.append(ids.numel()), own(ids, *args))[1]
    )
    return forwarded


def test_each_distinct_token_is_forwarded_once(tmp_path, monkeypatch):
    trainer = make_trainer(ForestGRPO, tmp_path)
    input_ids, mask, kept = batch_of(trainer)
    trainer._get_per_token_logps_and_entropies(trainer.model, input_ids[:1], mask[:1], kept)  # the probe embeds, too
    trainer._metrics["eval"].clear()
    forwarded = count_embedded(monkeypatch)
    trainer._get_per_token_logps_and_entropies(trainer.model, input_ids, mask, kept)
    rows = [tuple(ids[keep.bool()].tolist()) for ids, keep in zip(input_ids, mask, strict=True)]
    distinct = {row[:stop] for row in rows for stop in range(1, len(row))}
    assert sum(forwarded) == len(distinct)
    assert trainer._metrics["eval"]["forest/tokens_forwarded"] == [len(distinct)]
    assert trainer._metrics["eval"]["forest/tokens_given"] == [int(mask.sum())]


@pytest.mark.parametrize(
    "options", [{}, {"beta": 0.1}, {"beta": 0.1, "num_iterations": 2}, {"gradient_checkpointing": True}]
)
def test_a_run_has_the_losses_and_the_weights_of_a_run_without(options, tmp_path):
    runs = []
    for kind in (GRPOTrainer, ForestGRPO):
        trainer = make_trainer(kind, tmp_path / kind.__name__, lora="beta" in options, **options)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        runs.append((log, dict(trainer.model.named_parameters())))
    (plain_log, plain), (log, ours) = runs
    assert len(log) == len(plain_log) == 2
    for before, after in zip(plain_log, log, strict=True):
        for name in ("loss", "grad_norm", "entropy", "reward", "kl", "clip_ratio/region_mean"):
            assert after.get(name) == (pytest.approx(before[name], rel=1e-3, abs=1e-6) if name in before else None), (
                name
            )
        assert after["forest/tokens_forwarded"] < after["forest/tokens_given"]
    for name, parameter in plain.items():
        torch.testing.assert_close(ours[name], parameter, atol=1e-3, rtol=1e-4)  # of steps of 1e-2


def test_the_adapters_reference_is_the_model_without_it(tmp_path):
    trainer = make_trainer(ForestGRPO, tmp_path, lora=True, beta=0.1)
    input_ids, mask, kept = batch_of(trainer)
    with torch.no_grad(), trainer.model.disable_adapter():
        ours, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, input_ids, mask, kept)
        plain, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(trainer, trainer.model, input_ids, mask, kept)
    with torch.no_grad():
        adapted, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, input_ids, mask, kept)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    assert (adapted - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"compute_aux_loss": True}, "balancing loss"),
        ({"token_type_ids": "ones"}, "token_type_ids"),
    ],
)
def test_calls_beyond_the_forest_go_to_the_trainers_own_method(given, words, tmp_path, caplog, monkeypatch):
    trainer = make_trainer(ForestGRPO, tmp_path)
    input_ids, mask, kept = batch_of(trainer)
    given = {name: torch.ones_like(input_ids) if value == "ones" else value for name, value in given.items()}
    seen = []
    monkeypatch.setattr(
        GRPOTrainer,
        "_get_per_token_logps_and_entropies",
        lambda self, model, *args, **kwargs: seen.append(kwargs) or (None, None, None),
    )
    with caplog.at_level(logging.WARNING, "backprompt.integrations.trl"):
        for _ in range(2):
            trainer._get_per_token_logps_and_entropies(trainer.model, input_ids, mask, kept, **given)
    assert len(seen) == 2
    assert given.items() <= seen[0].items()
    assert len(caplog.records) == 1
    assert words in caplog.text
    assert len(trainer.forest_refusals) == 1


def prompted(model):
    return get_peft_model(model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    ("change", "num_columns", "words"), [(prompted, 20, "virtual tokens"), (None, 140, "rows are longer than")]
)
def test_batches_that_the_forest_refuses_go_to_the_trainers_own_method(change, num_columns, words, tmp_path):
    trainer = make_trainer(ForestGRPO, tmp_path, change=change)
    for num_rows in (2, 3):
        input_ids = torch.randint(2, 100, (num_rows, num_columns))
        batch = input_ids, torch.ones_like(input_ids), 6
        ours, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, *batch)
        plain, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(trainer, trainer.model, *batch)
        assert torch.equal(ours, plain)
    assert len(trainer.forest_refusals) == 1
    assert words in trainer.forest_refusals[0]


def test_an_unsupported_model_trains_as_before(tmp_path, caplog):
    trainer = make_trainer(ForestGRPO, tmp_path, model="bloom")
    with caplog.at_level(logging.WARNING, "backprompt.integrations.trl"):
        ours, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, *batch_of(trainer))
    plain, _, _ = GRPOTrainer._get_per_token_logps_and_entropies(trainer, trainer.model, *batch_of(trainer))
    assert torch.equal(ours, plain)
    assert "attention" in caplog.text


def test_gradients_pass_through_ddp(tmp_path):
    """Gradients of a process group are averaged by hooks of DDP, which see nothing of a call past DDP's forward."""
    trainer = make_trainer(ForestGRPO, tmp_path)
    batch = batch_of(trainer)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(trainer.model)
        reduced = []
        wrapped.register_comm_hook(None, lambda state, bucket: reduced.append(1) or _done(bucket.buffer()))
        logprobs, _, _ = trainer._get_per_token_logps_and_entropies(wrapped, *batch)
        logprobs.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert reduced


def _done(tensor):
    future = torch.futures.Future()
    future.set_result(tensor)
    return future


@pytest.mark.parametrize("is_wrapped_by_accelerate", [False, True])
def test_an_lm_of_a_trainers_model_has_the_models_own_numbers(is_wrapped_by_accelerate, tmp_path):
    """TRL and accelerate put wrappers around the forward method of the one model, which a copy must not follow."""
    trainer = make_trainer(ForestGRPO, tmp_path, temperature=0.5)
    expected = build("llama")(torch.tensor([[5, 6, 7]])).logits[0, -1]
    if is_wrapped_by_accelerate:
        AcceleratorState._reset_state()
        Accelerator(mixed_precision="bf16", cpu=True).prepare_model(trainer.model)
        AcceleratorState._reset_state()
    lm = LM(trainer.model, trainer.processing_class)
    torch.testing.assert_close(Text.from_tokens([5, 6, 7], lm).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_forward_method_that_somebody_else_replaced_is_not_left_out():
    model = build("llama")
    own = model.forward
    model.forward = lambda *args, **kwargs: _halved(own(*args, **kwargs))
    with pytest.raises(UnsupportedModelError):
        _ = Text.from_tokens([5, 6, 7], LM(model, byte_level_bpe())).logits


def _halved(output):
    output.logits = output.logits / 2
    return output


# DPO

PAIRS = [
    ("the cat sat on", " the mat", " a hat of felt"),
    ("Review: the film was great, the ending", " wasn't", " was"),
]


def make_pairs_trainer(kind, folder, lora, change=None, **options):
    tokenizer = byte_level_bpe()
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(1)
    model = build("llama")
    model.config.pad_token_id = model.config.eos_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = tokenizer.pad_token_id
    if change is not None:
        model = change(model)
    return kind(
        model,
        ref_model=None if lora else build("llama", seed=1),
        args=DPOConfig(
            str(folder),
            per_device_train_batch_size=2,
            max_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            gradient_checkpointing=False,
            **options,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in PAIRS]
        ),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False) if lora else None,
    )


@pytest.mark.parametrize("options", [{"lora": True}, {"lora": False}, {"lora": True, "precompute_ref_log_probs": True}])
def test_dpo_has_its_losses_metrics_and_weights(options, tmp_path):
    runs = []
    for kind in (DPOTrainer, ForestDPO):
        trainer = make_pairs_trainer(kind, tmp_path / kind.__name__, **options)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        runs.append((trainer, log, dict(trainer.model.named_parameters())))
    (_, plain_log, plain), (forest, log, ours) = runs
    assert len(log) == len(plain_log) == 2
    for before, after in zip(plain_log, log, strict=True):
        for name in before.keys() - {"step_time"}:
            assert after[name] == pytest.approx(before[name], rel=1e-3, abs=1e-5), name
        assert after["forest/tokens_forwarded"] < after["forest/tokens_given"]
    for name, parameter in plain.items():
        torch.testing.assert_close(ours[name], parameter, atol=1e-3, rtol=1e-4)  # of steps of 1e-2
    assert not forest.forest_refusals


@pytest.mark.parametrize(
    "make",
    [lambda folder: make_trainer(ForestGRPO, folder), lambda folder: make_pairs_trainer(ForestDPO, folder, False)],
)
def test_a_copy_of_the_model_computes_with_its_own_weights(make, tmp_path):
    model = make(tmp_path).model
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.layers[0].self_attn.v_proj.weight.mul_(3)
    ids = torch.tensor([[5, 6, 7]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False, "labels": ids}
    before, found = (given(**batch, fused_lm_head=True).log_probs for given in (model, copied))
    assert (found - before).abs().max() > 1e-3
    loaded = build("llama")
    loaded.load_state_dict(copied.state_dict())
    expected = loaded(ids).logits.log_softmax(-1)[0, [0, 1], [6, 7]]
    torch.testing.assert_close(found.flatten()[:2], expected, atol=1e-5, rtol=1e-5)


def test_a_body_that_somebody_else_has_wrapped_is_not_left_out(tmp_path):
    def wrap(model):
        own = model.model.forward

        def halved(*args, **kwargs):
            output = own(*args, **kwargs)
            output.last_hidden_state = output.last_hidden_state / 2
            return output

        model.model.forward = halved
        return model

    ids = torch.tensor([[5, 6, 7]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False, "labels": ids}
    plain, ours = (
        make_pairs_trainer(kind, tmp_path, False, change=wrap).model(**batch, fused_lm_head=True).log_probs
        for kind in (DPOTrainer, ForestDPO)
    )
    assert torch.equal(ours, plain)


def test_a_trainer_without_the_method_is_refused():
    class Wrong(ForestLogprobs, DPOTrainer):
        pass

    with pytest.raises(TypeError, match="ForestStates"):
        Wrong(build("llama"))


@pytest.mark.parametrize(("trainer", "mixin"), [(GRPOTrainer, ForestLogprobs), (DPOTrainer, ForestStates)])
def test_a_mixin_behind_its_trainer_is_refused(trainer, mixin):
    with pytest.raises(TypeError, match=rf"names {trainer.__name__} before .*Name the mixin first"):
        type("Wrong", (trainer, mixin), {})

    class Own:
        pass

    class Trainer(Own, mixin, trainer):
        pass

    type("Further", (Trainer,), {})


@pytest.mark.parametrize("where", ["args.use_liger_kernel", "accelerator.state.parallelism_config"])
def test_liger_and_sequence_parallelism_go_to_the_trainers_own_method(where, tmp_path, monkeypatch):
    trainer = make_trainer(ForestGRPO, tmp_path)
    holder, name = trainer, where
    while "." in name:
        first, name = name.split(".", 1)
        holder = getattr(holder, first)
    monkeypatch.setattr(holder, name, True, raising=False)
    trainer._get_per_token_logps_and_entropies(trainer.model, *batch_of(trainer))
    (reason,) = trainer.forest_refusals
    assert name in reason

"""What UEGRTrainer does with the Trainer's arguments: under recipe "plain" it is the Trainer itself, loss for loss, or it says why not."""

import contextlib
import dataclasses
import inspect
import pathlib
import re

import pytest
import torch
from torch import nn

import uegr_kernels as uk

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from test_frameworks import weights  # noqa: E402
from transformers.training_args import OptimizerNames  # noqa: E402

from uegr_kernels.integrations.transformers import UEGRTrainer  # noqa: E402

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 30}


def bert(**config):
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **{"num_labels": 3} | config))


def vit():
    """Its loss is divided by num_items_in_batch, where BERT's model takes that number and leaves it aside."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))


class Net(nn.Module):
    """A module of one's own, which returns what `gives` says."""

    def __init__(self, gives="dict", loss=nn.functional.cross_entropy):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body, self.drop = nn.Embedding(30, 8), nn.Linear(8, 3), nn.Dropout(0.2)
        self.gives, self.loss = gives, loss

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.body(self.drop(self.embedding(input_ids).mean(1)))
        if self.gives == "tuple":
            return (logits,) if labels is None else (self.loss(logits, labels), logits)
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}


class Named(Net):
    """A module whose labels have another name, which the Trainer finds in the signature."""

    def forward(self, input_ids, attention_mask=None, own_label=None):
        return super().forward(input_ids, attention_mask, own_label)


def rows(n=12, label=lambda i: torch.tensor(i % 3), name="labels"):
    generator = torch.Generator().manual_seed(7)
    words = torch.randint(1, 30, (n, 5), generator=generator)
    return [{"input_ids": words[i], "attention_mask": torch.ones(5, dtype=torch.long), name: label(i)} for i in range(n)]


def pictures(n=12, label=lambda i: torch.tensor(i % 3)):
    pixels = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    return [{"pixel_values": pixels[i], "labels": label(i)} for i in range(n)]


def arguments(folder, **more):
    given = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2, "weight_decay": 0.1}
    given |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 1}
    return transformers.TrainingArguments(output_dir=str(folder), **given | more)


def ours(folder, model, recipe="plain", dataset=None, embedding=None, recipe_options=None, kind=UEGRTrainer, given=None, **more):
    options = {"recipe": recipe, "embedding": embedding, "recipe_options": recipe_options} | (given or {})
    model = {} if model is None else {"model": model}
    return kind(**model, args=arguments(folder, **more), train_dataset=rows() if dataset is None else dataset, **options)


def logged(run, *names):
    return [[entry[name] for name in names] for entry in run.state.log_history if "loss" in entry]


def both(folder, model, dataset=None, given=None, embedding=None, recipe_options=None, **more):
    """Trains the same model with the Trainer and with recipe "plain"; the losses, gradients' norms and weights must be the same."""
    dataset = rows() if dataset is None else dataset
    theirs = transformers.Trainer(model=model(), args=arguments(folder, **more), train_dataset=dataset, **(given or {}))
    theirs.train()
    mine = model()
    place = embedding(mine) if embedding else None
    run = ours(folder, mine, dataset=dataset, embedding=place, recipe_options=recipe_options, given=given, **more)
    run.train()
    names = ("loss", "grad_norm", "learning_rate")
    torch.testing.assert_close(torch.tensor(logged(run, *names)), torch.tensor(logged(theirs, *names)), rtol=1e-5, atol=1e-6)
    pairs = zip(run.model.named_parameters(), theirs.model.parameters(), strict=True)
    for (name, mine), other in pairs:
        if not name.endswith(("key.bias", "k_proj.bias")):  # its gradient is 0 but for rounding, which some optimizers blow up
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=name)
    assert len(logged(run)) == run.state.max_steps
    return run, theirs


IGNORED = lambda i: torch.tensor(-100 if i % 4 == 1 else i % 3)  # noqa: E731
ACCUMULATED = {"gradient_accumulation_steps": 2}
SAME = {
    "as it is": (bert, rows(), {}),
    "regression by the configuration": (lambda: bert(num_labels=1), rows(label=lambda i: torch.tensor(i / 7)), {}),
    "regression of two": (
        lambda: bert(num_labels=2, problem_type="regression"),
        rows(label=lambda i: torch.tensor([i / 7, -i / 9])),
        {},
    ),
    "labels [N, 1]": (bert, rows(label=lambda i: torch.tensor([i % 3])), {}),
    "ignored labels": (bert, rows(label=IGNORED), {}),
    "label smoothing": (bert, rows(label=IGNORED), {"label_smoothing_factor": 0.3}),
    "pictures": (vit, pictures(), {}),
    # 10 rows in batches of 4, two or three batches a step: an epoch's last step has fewer batches, and fewer rows
    "a partial group, means": (Net, rows(10), ACCUMULATED),
    "a partial batch, means": (Net, rows(10), {"gradient_accumulation_steps": 3}),
    "a partial group, counted": (vit, pictures(10), ACCUMULATED),
    "a partial batch, counted": (vit, pictures(10), {"gradient_accumulation_steps": 3}),
    "ignored labels, counted": (vit, pictures(label=IGNORED), ACCUMULATED),
    "label smoothing, counted": (bert, rows(10, label=IGNORED), ACCUMULATED | {"label_smoothing_factor": 0.3}),
    "counted by process": (vit, pictures(10), ACCUMULATED | {"average_tokens_across_devices": False}),
    "without clipping": (bert, rows(), {"max_grad_norm": 0.0}),
    "with much clipping": (bert, rows(), {"max_grad_norm": 0.01}),
    "bfloat16": (bert, rows(), {"bf16": True}),
    "activation checkpointing": (bert, rows(), {"activation_checkpointing": True}),
    "neftune": (bert, rows(), {"neftune_noise_alpha": 5.0}),
    "a schedule": (bert, rows(), {"lr_scheduler_type": "cosine", "warmup_steps": 2}),
    "an emptied cache": (bert, rows(), {"torch_empty_cache_steps": 1}),
    "a found batch size": (bert, rows(), {"auto_find_batch_size": True}),
    "sgd": (bert, rows(), {"optim": "sgd", "optim_args": "momentum=0.9"}),
    "adafactor": (bert, rows(), {"optim": "adafactor"}),
    "a module with dicts": (Net, rows(), {}),
    "a module with tuples": (lambda: Net("tuple"), rows(), {}),
    "a module with another name": (Named, rows(name="own_label"), {"remove_unused_columns": False}),
}


@pytest.mark.parametrize("case", SAME)
def test_plain_is_the_trainer(tmp_path, case):
    model, dataset, more = SAME[case]
    both(tmp_path, model, dataset, embedding=lambda model: getattr(model, "embedding", None), **more)


def t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, num_labels=3, pad_token_id=0, eos_token_id=29, decoder_start_token_id=0)
    return transformers.T5ForSequenceClassification(config)


def bart():
    torch.manual_seed(0)
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))}
    config = transformers.BartConfig(
        **sides, vocab_size=30, d_model=16, num_labels=3, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=29
    )
    return transformers.BartForSequenceClassification(config)


@pytest.mark.parametrize("model", [t5, bart])
def test_encoder_decoders_with_the_encoders_embedding(tmp_path, model):
    ended = [row | {"input_ids": torch.cat([row["input_ids"][:4].clamp(2, 28), torch.tensor([29])])} for row in rows()]
    both(tmp_path, model, ended, embedding=lambda model: model.get_encoder().get_input_embeddings())
    run = ours(tmp_path, model(), "uegr", ended, embedding="transformer.encoder.embed_tokens" if model is t5 else "model.encoder.embed_tokens")
    run.train()
    assert all(adversarial > 0 for (adversarial,) in logged(run, "adversarial_loss"))
    with pytest.raises(ValueError, match=r"pass the encoder's, embedding=model.get_encoder\(\).get_input_embeddings\(\)"):
        ours(tmp_path, model())


def outcome(function):
    try:
        return function()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_every_optim_is_the_trainers_but_torchs_adamw(tmp_path, name):
    more = {"optim": name, "optim_target_modules": ["classifier"]}
    theirs = outcome(transformers.Trainer(model=bert(), args=arguments(tmp_path, **more)).create_optimizer)
    run = ours(tmp_path, bert(), **more)
    mine = outcome(run.create_optimizer)
    if name in ("adamw_torch", "adamw_torch_fused"):
        assert type(mine) is uk.SelectiveAdamW and mine.defaults["keep_probability"] == 1.0
        assert [group["weight_decay"] for group in mine.param_groups] == [group["weight_decay"] for group in theirs.param_groups] == [0.1, 0]
    elif isinstance(theirs, tuple):
        assert mine == theirs  # the package that is missing
    else:
        assert type(mine) is type(theirs) and mine.defaults == theirs.defaults


class Modes(torch.optim.SGD):
    """Steps in train mode only, as schedule-free optimizers do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mode, self.seen = "eval", []

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"

    def step(self, closure=None):
        self.seen.append(self.mode)
        return super().step(closure)


def test_an_optimizer_with_modes_is_in_train_mode_when_it_steps(tmp_path):
    more = {"eval_strategy": "steps", "eval_steps": 1}
    given = {"optimizer_cls_and_kwargs": (Modes, {"lr": 0.1}), "eval_dataset": rows(4)}
    run, theirs = both(tmp_path, bert, given=given, **more)
    assert run.optimizer.optimizer.seen == theirs.optimizer.optimizer.seen == ["train"] * 3
    evaluated = [[entry["eval_loss"] for entry in r.state.log_history if "eval_loss" in entry] for r in (run, theirs)]
    assert len(evaluated[0]) == 3 and evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)


@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam"])
def test_schedule_free_optimizers(tmp_path, name):
    pytest.importorskip("schedulefree")
    both(tmp_path, bert, optim=name, lr_scheduler_type="constant")


def test_an_optimizer_and_a_schedule_of_ones_own(tmp_path):
    found = {}
    for kind in (transformers.Trainer, UEGRTrainer):
        model = bert()
        optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        more = {"recipe": "plain"} if kind is UEGRTrainer else {}
        run = kind(model=model, args=arguments(tmp_path), train_dataset=rows(), optimizers=(optimizer, scheduler), **more)
        run.train()
        assert run.optimizer.optimizer is optimizer
        found[kind] = torch.tensor(logged(run, "loss", "learning_rate"))
    torch.testing.assert_close(found[UEGRTrainer], found[transformers.Trainer], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_evaluation_and_prediction_are_the_trainers(tmp_path, smoothing):
    more = {"label_smoothing_factor": smoothing, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    given = {"eval_dataset": rows(8), "compute_metrics": lambda p: {"first": float(p.predictions[0, 0])}}
    given["preprocess_logits_for_metrics"] = lambda logits, labels: logits * 2
    run, theirs = both(tmp_path, bert, given=given, **more)
    found = [
        [[entry["eval_loss"], entry["eval_first"]] for entry in r.state.log_history if "eval_loss" in entry] + [list(r.predict(rows(3))[2].values())[:1]]
        for r in (run, theirs)
    ]
    assert len(found[0]) == 5
    for mine, other in zip(*found, strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


def test_a_compiled_model(tmp_path):
    """Also where it was called, and compiled, before the recipe was there, and with a second recipe on the same object."""
    more = {"eval_strategy": "steps", "eval_steps": 2}
    compiled = more | {"torch_compile": True, "torch_compile_backend": "eager"}
    given = {"eval_dataset": rows(4)}
    both(tmp_path, Net, given=given, embedding=lambda model: model.embedding, **compiled)
    found = []
    for options in (compiled, more):
        model = Net()
        run = ours(tmp_path, model, "at", embedding=model.embedding, given=given, **options)
        run.evaluate()
        run.train()
        run.train()
        found.append(weights(model))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)

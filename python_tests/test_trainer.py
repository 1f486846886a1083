"""What UEGRTrainer does with the Trainer's arguments: under recipe "plain" it is the Trainer
itself, loss for loss, or it says why not.
"""

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

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 30,
}


def bert(**config):
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZES, **{"num_labels": 3} | config)
    )


def vit():
    """Gives a model whose loss is divided by num_items_in_batch, where BERT's model takes that
    number and leaves it aside.
    """
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    )


class Net(nn.Module):
    """Returns, as a module of one's own, what `gives` says."""

    def __init__(self, gives="dict", loss=nn.functional.cross_entropy):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body, self.drop = nn.Embedding(30, 8), nn.Linear(8, 3), nn.Dropout(0.2)
        self.gives, self.loss = gives, loss

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.body(self.drop(self.embedding(input_ids).mean(1)))
        if self.gives == "tuple":
            return (logits,) if labels is None else (self.loss(logits, labels), logits)
        return (
            {"logits": logits}
            if labels is None
            else {"loss": self.loss(logits, labels), "logits": logits}
        )


class Named(Net):
    """Has labels with another name, which the Trainer finds in the signature."""

    def forward(self, input_ids, attention_mask=None, own_label=None):
        return super().forward(input_ids, attention_mask, own_label)


def rows(n=12, label=lambda i: torch.tensor(i % 3), name="labels"):
    generator = torch.Generator().manual_seed(7)
    words = torch.randint(1, 30, (n, 5), generator=generator)
    return [
        {"input_ids": words[i], "attention_mask": torch.ones(5, dtype=torch.long), name: label(i)}
        for i in range(n)
    ]


def pictures(n=12, label=lambda i: torch.tensor(i % 3)):
    pixels = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    return [{"pixel_values": pixels[i], "labels": label(i)} for i in range(n)]


def arguments(folder, **more):
    given = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
    }
    given |= {
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    return transformers.TrainingArguments(output_dir=str(folder), **given | more)


def ours(
    folder,
    model,
    recipe="plain",
    dataset=None,
    embedding=None,
    recipe_options=None,
    kind=UEGRTrainer,
    given=None,
    **more,
):
    options = {"recipe": recipe, "embedding": embedding, "recipe_options": recipe_options} | (
        given or {}
    )
    model = {} if model is None else {"model": model}
    return kind(
        **model,
        args=arguments(folder, **more),
        train_dataset=rows() if dataset is None else dataset,
        **options,
    )


def logged(run, *names):
    return [[entry[name] for name in names] for entry in run.state.log_history if "loss" in entry]


def both(folder, model, dataset=None, given=None, embedding=None, recipe_options=None, **more):
    """Trains the same model with the Trainer and with recipe "plain"; the losses, gradients'
    norms and weights must be the same.
    """
    dataset = rows() if dataset is None else dataset
    theirs = transformers.Trainer(
        model=model(), args=arguments(folder, **more), train_dataset=dataset, **(given or {})
    )
    theirs.train()
    mine = model()
    place = embedding(mine) if embedding else None
    run = ours(
        folder,
        mine,
        dataset=dataset,
        embedding=place,
        recipe_options=recipe_options,
        given=given,
        **more,
    )
    run.train()
    names = ("loss", "grad_norm", "learning_rate")
    torch.testing.assert_close(
        torch.tensor(logged(run, *names)),
        torch.tensor(logged(theirs, *names)),
        rtol=1e-5,
        atol=1e-6,
    )
    pairs = zip(run.model.named_parameters(), theirs.model.parameters(), strict=True)
    for (name, mine), other in pairs:
        # its gradient is 0 but for rounding, which some optimizers blow up
        if not name.endswith(("key.bias", "k_proj.bias")):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=name)
    assert len(logged(run)) == run.state.max_steps
    return run, theirs


IGNORED = lambda i: torch.tensor(-100 if i % 4 == 1 else i % 3)  # noqa: E731
ACCUMULATED = {"gradient_accumulation_steps": 2}
SAME = {
    "as it is": (bert, rows(), {}),
    "regression by the configuration": (
        lambda: bert(num_labels=1),
        rows(label=lambda i: torch.tensor(i / 7)),
        {},
    ),
    "regression of integers": (lambda: bert(num_labels=1), rows(label=torch.tensor), {}),
    "regression of two": (
        lambda: bert(num_labels=2, problem_type="regression"),
        rows(label=lambda i: torch.tensor([i / 7, -i / 9])),
        {},
    ),
    "labels [N, 1]": (bert, rows(label=lambda i: torch.tensor([i % 3])), {}),
    "ignored labels": (bert, rows(label=IGNORED), {}),
    "label smoothing": (bert, rows(label=IGNORED), {"label_smoothing_factor": 0.3}),
    "pictures": (vit, pictures(), {}),
    # 10 rows in batches of 4, two or three batches a step: an epoch's last step has fewer batches,
    # and fewer rows
    "a partial group, means": (Net, rows(10), ACCUMULATED),
    "a partial batch, means": (Net, rows(10), {"gradient_accumulation_steps": 3}),
    "a partial group, counted": (vit, pictures(10), ACCUMULATED),
    "a partial batch, counted": (vit, pictures(10), {"gradient_accumulation_steps": 3}),
    "ignored labels, counted": (vit, pictures(label=IGNORED), ACCUMULATED),
    "label smoothing, counted": (
        bert,
        rows(10, label=IGNORED),
        ACCUMULATED | {"label_smoothing_factor": 0.3},
    ),
    "counted by process": (
        vit,
        pictures(10),
        ACCUMULATED | {"average_tokens_across_devices": False},
    ),
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
    both(
        tmp_path, model, dataset, embedding=lambda model: getattr(model, "embedding", None), **more
    )


def t5():
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 30,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
    }
    config = transformers.T5Config(
        **sizes, num_labels=3, pad_token_id=0, eos_token_id=29, decoder_start_token_id=0
    )
    return transformers.T5ForSequenceClassification(config)


def bart():
    torch.manual_seed(0)
    sides = {
        f"{side}_{name}": n
        for side in ("encoder", "decoder")
        for name, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    }
    config = transformers.BartConfig(
        **sides,
        vocab_size=30,
        d_model=16,
        num_labels=3,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=29,
    )
    return transformers.BartForSequenceClassification(config)


@pytest.mark.parametrize("model", [t5, bart])
def test_encoder_decoders_with_the_encoders_embedding(tmp_path, model):
    ended = [
        row | {"input_ids": torch.cat([row["input_ids"][:4].clamp(2, 28), torch.tensor([29])])}
        for row in rows()
    ]
    both(tmp_path, model, ended, embedding=lambda model: model.get_encoder().get_input_embeddings())
    run = ours(
        tmp_path,
        model(),
        "uegr",
        ended,
        embedding="transformer.encoder.embed_tokens"
        if model is t5
        else "model.encoder.embed_tokens",
    )
    run.train()
    assert all(adversarial > 0 for (adversarial,) in logged(run, "adversarial_loss"))
    with pytest.raises(
        ValueError,
        match=r"pass the encoder's, "
        r"embedding=model.get_encoder\(\).get_input_embeddings\(\)",
    ):
        ours(tmp_path, model())


def outcome(function):
    try:
        return function()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_every_optim_is_the_trainers_but_torchs_adamw(tmp_path, name):
    more = {"optim": name, "optim_target_modules": ["classifier"]}
    theirs = outcome(
        transformers.Trainer(model=bert(), args=arguments(tmp_path, **more)).create_optimizer
    )
    run = ours(tmp_path, bert(), **more)
    mine = outcome(run.create_optimizer)
    if name in ("adamw_torch", "adamw_torch_fused"):
        assert type(mine) is uk.SelectiveAdamW and mine.defaults["keep_probability"] == 1.0
        assert (
            [group["weight_decay"] for group in mine.param_groups]
            == [group["weight_decay"] for group in theirs.param_groups]
            == [0.1, 0]
        )
    elif isinstance(theirs, tuple):
        # the package that is missing
        assert mine == theirs
    else:
        assert type(mine) is type(theirs) and mine.defaults == theirs.defaults


def test_options_of_a_selection_inside_the_optimizer(tmp_path):
    options = {"recipe_options": {"target": "update"}}
    run = ours(tmp_path, bert(), "uegr", **options, max_steps=1)
    run.train()
    assert {group["target"] for group in run.optimizer.param_groups} == {"update"}
    sgd = {"optimizer_cls_and_kwargs": (uk.SelectiveSGD, {"lr": 0.1})}
    ours(tmp_path, bert(), "child_tuning_f", **options, given=sgd)
    with pytest.raises(ValueError, match="target='update' needs an optimizer's state"):
        ours(tmp_path, bert(), "uegr", **options, optim="sgd")


def test_a_further_process_saves_what_is_its_own(tmp_path, monkeypatch):
    run = ours(tmp_path, bert(), "uegr")
    state = run._attach(run.model).state_dict()
    run._saved = run.state.global_step, tmp_path
    monkeypatch.setattr(transformers.TrainingArguments, "process_index", 1)
    run._save_recipe()
    run._detach()
    saved = torch.load(tmp_path / "recipe_1.pt")
    assert saved.keys() == {"adaptive_dropout"} < state.keys()


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
    evaluated = [
        [entry["eval_loss"] for entry in r.state.log_history if "eval_loss" in entry]
        for r in (run, theirs)
    ]
    assert len(evaluated[0]) == 3 and evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)


@pytest.mark.parametrize(
    "name", ["schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam"]
)
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
        run = kind(
            model=model,
            args=arguments(tmp_path),
            train_dataset=rows(),
            optimizers=(optimizer, scheduler),
            **more,
        )
        run.train()
        assert run.optimizer.optimizer is optimizer
        found[kind] = torch.tensor(logged(run, "loss", "learning_rate"))
    torch.testing.assert_close(
        found[UEGRTrainer], found[transformers.Trainer], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_evaluation_and_prediction_are_the_trainers(tmp_path, smoothing):
    more = {
        "label_smoothing_factor": smoothing,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": True,
    }
    given = {
        "eval_dataset": rows(8),
        "compute_metrics": lambda p: {"first": float(p.predictions[0, 0])},
    }
    given["preprocess_logits_for_metrics"] = lambda logits, labels: logits * 2
    run, theirs = both(tmp_path, bert, given=given, **more)
    found = [
        [
            [entry["eval_loss"], entry["eval_first"]]
            for entry in r.state.log_history
            if "eval_loss" in entry
        ]
        + [list(r.predict(rows(3))[2].values())[:1]]
        for r in (run, theirs)
    ]
    assert len(found[0]) == 5
    for mine, other in zip(*found, strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


BEST = {"max_steps": 9, "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1}


def test_training_again_on_the_same_object(tmp_path):
    """The best checkpoint is an early one and the others are gone: nothing of the first run
    may lead the second one to them.
    """
    worse = [{**row, "labels": (row["labels"] + 1) % 3} for row in rows()]
    more = BEST | {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "learning_rate": 0.05,
    }
    run = ours(tmp_path, bert(), "roast", given={"eval_dataset": worse}, **more)
    run.train()
    best = pathlib.Path(run.state.best_model_checkpoint)
    assert best.name != "checkpoint-9" and not (tmp_path / "checkpoint-9").exists()
    saved = transformers.BertForSequenceClassification.from_pretrained(best)
    torch.testing.assert_close(weights(run.model), weights(saved), rtol=0, atol=0)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 9 and hooks(run.model) == 0
    run.train()
    assert run.state.global_step == 9 and run.recipe is None


def test_a_second_training_begins_a_recipe_of_its_own(tmp_path):
    more = {"save_strategy": "epoch", "max_steps": 3}
    run = ours(tmp_path / "0", bert(), "roast", **more)
    seen = []
    attach = run._attach
    run._attach = lambda model: (attach(model), seen.append(run.recipe))
    run.train()
    first = torch.load(tmp_path / "0" / "checkpoint-3" / "recipe.pt")
    run.args.output_dir = str(tmp_path / "1")
    run.train()
    assert seen[0] is not seen[1] and seen[0]._runner.closed and seen[1]._runner.closed
    second = torch.load(tmp_path / "1" / "checkpoint-3" / "recipe.pt")
    assert first.keys() == second.keys() and first["epoch"] == second["epoch"] == 1
    assert (
        torch.load(tmp_path / "0" / "checkpoint-3" / "recipe.pt")["seed"]
        == first["seed"]
        != second["seed"]
    )


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_recipe_is_closed_whatever_ends_the_training(tmp_path, stop):
    class Stops(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise stop("here")

    before = bert()
    names = [(name, type(module)) for name, module in before.named_modules()]
    run = ours(tmp_path, before, "uegr", given={"callbacks": [Stops()]})
    with pytest.raises(stop, match="here"):
        run.train()
    assert run.recipe is None and hooks(run.model) == 0
    assert [(name, type(module)) for name, module in run.model.named_modules()] == names
    run.remove_callback(Stops)
    run.train()
    assert run.state.global_step == 3 and hooks(run.model) == 0


def test_construction_draws_nothing_and_leaves_the_model(tmp_path):
    model = bert()
    names = [(name, id(module)) for name, module in model.named_modules()]
    for recipe in uk.recipes.NAMES:
        ours(tmp_path, model, recipe)
        after = torch.get_rng_state()
        transformers.Trainer(model=model, args=arguments(tmp_path))
        assert torch.equal(torch.get_rng_state(), after)
        assert (
            hooks(model) == 0
            and [(name, id(module)) for name, module in model.named_modules()] == names
        )


def test_a_search_over_hyperparameters(tmp_path, monkeypatch):
    """A stand-in for optuna with two trials: each begins its own model and recipe, and leaves
    the other's checkpoint alone.
    """
    import transformers.hyperparameter_search
    import transformers.trainer

    class Trial:
        def __init__(self, number):
            self.number, self.params = number, {"learning_rate": 0.01 * (number + 1)}

    left = {}

    class Backend:
        def ensure_available(self):
            pass

        def run(self, trainer, n_trials, direction, **kwargs):
            for number in range(n_trials):
                trainer.train(trial=Trial(number))
                left[number] = (
                    tmp_path / f"run-{number}" / "checkpoint-3" / "recipe.pt"
                ).read_bytes()
                assert trainer.args.learning_rate == 0.01 * (number + 1)

    named = transformers.trainer.HPSearchBackend.OPTUNA
    monkeypatch.setitem(transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS, named, Backend)
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    more = {"save_strategy": "epoch"}
    run = ours(tmp_path, None, "roast", given={"model_init": lambda: bert()}, **more)
    run.hyperparameter_search(hp_space=lambda trial: trial.params, n_trials=2, backend="optuna")
    assert (tmp_path / "run-0" / "checkpoint-3" / "recipe.pt").read_bytes() == left[0]
    alone = ours(
        tmp_path / "alone",
        None,
        "roast",
        given={"model_init": lambda: bert()},
        **more | {"learning_rate": 0.02},
    )
    alone.train()
    torch.testing.assert_close(weights(run.model), weights(alone.model), rtol=0, atol=0)


def test_model_init_and_an_embedding_by_its_name(tmp_path):
    run = ours(tmp_path, None, "at", embedding="embedding", given={"model_init": lambda: Net()})
    run.train()
    first = weights(run.model)
    run.train()
    assert torch.equal(weights(run.model), first)
    with pytest.raises(
        ValueError,
        match="embedding='embeddings' is no module of Net; use one of embedding, body, drop",
    ):
        ours(tmp_path, Net(), embedding="embeddings")
    with pytest.raises(TypeError, match="embedding is a int"):
        ours(tmp_path, Net(), embedding=3)
    with pytest.raises(ValueError, match=r"Net has no get_input_embeddings\(\); pass embedding="):
        ours(tmp_path, Net())


class OwnLoss(UEGRTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        raise AssertionError("not to be called")


class OwnStep(UEGRTrainer):
    def training_step(self, *args, **kwargs):
        return 2 * super().training_step(*args, **kwargs)


def several_labels():
    return bert(problem_type="multi_label_classification")


def tokens():
    torch.manual_seed(0)
    return transformers.BertForTokenClassification(transformers.BertConfig(**SIZES, num_labels=3))


def answers():
    return transformers.BertForQuestionAnswering(transformers.BertConfig(**SIZES))


class Needs(Net):
    def forward(self, input_ids, labels, attention_mask=None):
        return super().forward(input_ids, attention_mask, labels)


class Two(Net):
    def forward(self, input_ids, attention_mask=None, labels=None, other_labels=None):
        return super().forward(input_ids, attention_mask, labels)


REFUSED = {
    "compute_loss": (
        bert,
        {"kind": OwnLoss},
        "OwnLoss overrides compute_loss, which a recipe would never call",
    ),
    "compute_loss_func": (
        bert,
        {"given": {"compute_loss_func": lambda *args, **kwargs: None}},
        "compute_loss_func has no say",
    ),
    "several labels": (
        several_labels,
        {},
        "problem_type='multi_label_classification' is trained with a sigmoid",
    ),
    "tokens": (
        tokens,
        {},
        "BertForTokenClassification's loss is ForTokenClassification, and recipes train logits",
    ),
    "two positions": (answers, {}, "BertForQuestionAnswering's loss is ForQuestionAnswering"),
    "ddp_static_graph": (
        bert,
        {"ddp_static_graph": True},
        "ddp_static_graph=True wants one forward and one backward",
    ),
    "two smoothings": (
        bert,
        {"label_smoothing_factor": 0.1, "recipe_options": {"label_smoothing": 0.2}},
        "differ; give one",
    ),
    "smoothed regression": (
        lambda: bert(num_labels=1),
        {"label_smoothing_factor": 0.1},
        "means nothing for task='regression'",
    ),
    "labels needed": (Needs, {}, "Needs.forward cannot be called without 'labels'"),
    "two labels": (
        Two,
        {},
        r"label_names=\['labels', 'other_labels'\]: a recipe takes one tensor "
        r"of labels",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_recipe_cannot_honour_is_refused_at_construction(tmp_path, case):
    model, how, words = REFUSED[case]
    for recipe in ("plain", "uegr"):
        model_ = model()
        with pytest.raises(ValueError, match=words):
            ours(tmp_path, model_, recipe, embedding=getattr(model_, "embedding", None), **how)
        assert hooks(model_) == 0


@pytest.mark.parametrize("size", ["cp_size", "sp_size", "tp_size"])
def test_parallelism_within_a_sample_is_refused(tmp_path, monkeypatch, size):
    accelerate = pytest.importorskip("accelerate", "1.12")
    args = arguments(tmp_path)
    args.parallelism_config = accelerate.ParallelismConfig(**{size: 2})
    with pytest.raises(
        ValueError, match=f"parallelism_config has {size}=2: (context|sequence|tensor) parallelism"
    ):
        UEGRTrainer(model=bert(), args=args, train_dataset=rows())
    run = ours(tmp_path, bert())
    # the launcher's
    monkeypatch.setattr(type(run.accelerator), "parallelism_config", args.parallelism_config)
    with pytest.raises(ValueError, match=f"parallelism_config has {size}=2"):
        run.train()


def test_data_parallel_is_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="n_gpu=2: nn.DataParallel"):
        UEGRTrainer(model=bert(), args=args, train_dataset=rows())


def test_optimizers_that_step_in_the_backward_are_refused(tmp_path, monkeypatch):
    for name, package in (
        ("lomo", "lomo"),
        ("galore_adamw_layerwise", "galore_torch"),
        ("apollo_adamw_layerwise", "apollo_torch"),
    ):
        # the package is missing: the Trainer says so when the optimizer is made
        ours(tmp_path, bert(), optim=name)
        monkeypatch.setattr(f"transformers.utils.import_utils.is_{package}_available", lambda: True)
        with pytest.raises(ValueError, match=f"optim='{name}' steps while a backward runs"):
            ours(tmp_path, bert(), optim=name)


def test_what_changed_since_construction_is_refused_when_training_begins(tmp_path):
    run = ours(tmp_path, bert())
    run.model.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="multi_label_classification"):
        run.train()
    run = ours(tmp_path, bert())
    run.compute_loss = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="overrides compute_loss"):
        run.train()


def test_a_step_of_ones_own_is_called(tmp_path):
    found = []
    for kind in (OwnStep, UEGRTrainer):
        run = ours(tmp_path, bert(), kind=kind)
        run.train()
        found.append(torch.tensor(logged(run, "loss")))
    torch.testing.assert_close(found[0], 2 * found[1])


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("model", [Net, vit])
def test_a_subclass_says_whether_its_loss_is_scaled(tmp_path, scaled, model):
    found = []
    for kind in (transformers.Trainer, UEGRTrainer):
        said = type("Said", (kind,), {"loss_is_scaled_for_ga": scaled})
        net = model()
        more = (
            {"recipe": "plain", "embedding": getattr(net, "embedding", None)}
            if kind is UEGRTrainer
            else {}
        )
        data = rows(10) if model is Net else pictures(10)
        run = said(model=net, args=arguments(tmp_path, **ACCUMULATED), train_dataset=data, **more)
        run.train()
        found.append(torch.tensor(logged(run, "loss", "grad_norm")))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_ray_tunes_checkpoints_hold_the_recipe(tmp_path):
    class Tunes(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                run._tune_save_checkpoint(str(tmp_path / "tune"))

    run = ours(tmp_path, bert(), "roast", given={"callbacks": [Tunes()]})
    run.train()
    resumed = ours(tmp_path / "on", bert(), "roast")
    resumed.train(resume_from_checkpoint=str(tmp_path / "tune" / "checkpoint-2"))
    state = torch.load(tmp_path / "tune" / "checkpoint-2" / "recipe.pt")
    assert state["recipe"] == "RoAST" and resumed.state.global_step == 3


def sharp(logits, labels):
    return nn.functional.cross_entropy(3 * logits, labels)


@pytest.mark.parametrize("gives", ["dict", "tuple"])
def test_a_loss_of_the_models_own_is_not_dropped(tmp_path, gives):
    model = Net(gives, loss=sharp)
    run = ours(tmp_path, model, embedding=model.embedding)
    with pytest.raises(
        ValueError,
        match="Net's own loss of the first batch is .* the recipe would drop the model's",
    ):
        run.train()
    assert hooks(model) == 0 and all(module.training for module in model.modules())
    said = ours(
        tmp_path, model, embedding=model.embedding, recipe_options={"task": "classification"}
    )
    said.train()
    assert said.state.global_step == 3


def test_multi_hot_labels_are_not_taken_for_probabilities(tmp_path):
    """No problem_type is set, and Transformers' model goes by the labels' dtype."""
    hot = rows(label=lambda i: torch.tensor([i % 2, 1, i % 3 > 0]).float())
    model = bert()
    with pytest.raises(ValueError, match="problem_type 'multi_label_classification'"):
        ours(tmp_path, model, dataset=hot).train()
    assert model.config.problem_type is None
    ours(tmp_path, model, dataset=hot, recipe_options={"task": "classification"}).train()


def test_labels_that_are_not_there(tmp_path):
    nameless = [{"input_ids": row["input_ids"]} for row in rows()]
    with pytest.raises(ValueError, match=r"the batch has no 'labels' but \['input_ids'\]"):
        ours(tmp_path, bert(), dataset=nameless).train()
    with pytest.raises(ValueError, match="the batch has no 'target'"):
        ours(tmp_path, bert(), label_names=["target"], remove_unused_columns=False).train()
    target = [{**row, "target": row["labels"]} for row in rows()]
    model = Two()
    named = ours(tmp_path, model, dataset=target, embedding=model.embedding, label_names=["labels"])
    named.train()


def test_a_checkpoint_without_a_recipe_says_so(tmp_path):
    more = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    theirs = transformers.Trainer(
        model=bert(), args=arguments(tmp_path, **more), train_dataset=rows()
    )
    theirs.train()
    run = ours(tmp_path / "on", bert(), "roast", **more)
    with pytest.warns(UserWarning, match="recipe.pt is not there: the recipe begins afresh"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_table_of_arguments_is_whole():
    page = (pathlib.Path(__file__).parent.parent / "docs" / "trainer.md").read_text()
    lines = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = [name for line in lines for name in re.findall(r"`(\w+)`", line)]
    fields = [field.name for field in dataclasses.fields(transformers.TrainingArguments)]
    parameters = [
        name
        for name in inspect.signature(transformers.Trainer.__init__).parameters
        if name != "self"
    ]
    assert sorted(named) == sorted(set(fields + parameters))

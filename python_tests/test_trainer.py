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

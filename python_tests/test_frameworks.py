"""The optimizer where people train: Transformers' Trainer, Accelerate and Lightning, on a tiny
model built here, with no network.
"""

import warnings

import pytest
import torch

import uegr_kernels as uk

OPTIONS = {"lr": 1e-2, "threshold": 0.3, "seed": 5}


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(1, 30, (6,), generator=generator)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones(6, dtype=torch.long),
            "labels": ids.sum() % 2,
        }


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 30,
    }
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**sizes, num_labels=2)
    )


def trainer(folder, model, **kwargs):
    transformers = pytest.importorskip("transformers")
    arguments = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "save_steps": 3,
        "max_grad_norm": 1.0,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 1,
        "use_cpu": True,
    } | kwargs.pop("arguments", {})
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**arguments),
        train_dataset=Sentences(),
        **kwargs,
    )


def weights(model):
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    "arguments",
    [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}],
    ids=lambda a: next(iter(a), "plain"),
)
def test_trainer_resumes_exactly(tmp_path, arguments):
    pytest.importorskip("accelerate")
    how = {"optimizer_cls_and_kwargs": (uk.SelectiveAdamW, OPTIONS), "arguments": arguments}
    through = trainer(tmp_path / "whole", bert(), **how)
    through.train()
    resumed = trainer(tmp_path / "again", bert(), **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert isinstance(getattr(resumed.optimizer, "optimizer", resumed.optimizer), uk.SelectiveAdamW)
    assert torch.equal(weights(through.model), weights(resumed.model))
    assert not torch.equal(weights(through.model), weights(bert()))


def test_trainer_takes_an_optimizer_and_a_scheduler(tmp_path):
    pytest.importorskip("accelerate")
    ours, theirs = bert(), bert()
    neutral = {"normalization": "constant", "keep_probability": 1.0}
    for model, optimizer in (
        (ours, uk.SelectiveAdamW(ours.parameters(), lr=1e-2, **neutral)),
        (theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2)),
    ):
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)
        trainer(tmp_path, model, optimizers=(optimizer, scheduler)).train()
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision):
    accelerate = pytest.importorskip("accelerate")
    model = torch.nn.Linear(4, 2)
    torch.nn.init.constant_(model.weight, 0.1)
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
    )
    optimizer = uk.SelectiveAdamW(model.parameters(), **OPTIONS)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for i in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.full((3, 4), 1.0 + i)).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    inner = accelerator.unwrap_model(model)
    assert [optimizer.state[p]["step"].item() for p in inner.parameters()] == [2.0, 2.0]
    assert not torch.equal(inner.weight, torch.full_like(inner.weight, 0.1))
    accelerate.state.AcceleratorState._reset_state(True)


def lightning_module():
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(
                torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
            )

        def training_step(self, batch):
            return torch.nn.functional.cross_entropy(
                self.net(batch["input_ids"].float() / 30), batch["labels"]
            )

        def configure_optimizers(self):
            return uk.SelectiveAdamW(self.parameters(), **OPTIONS)

    return Module()


# of few workers, no logger and other advice
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_clips_and_resumes_exactly(tmp_path, precision):
    lightning = pytest.importorskip("lightning")
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
    }

    def fit(module, epochs, **kwargs):
        fitted = lightning.Trainer(
            max_epochs=epochs,
            precision=precision,
            gradient_clip_val=0.5,
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            **quiet,
        )
        fitted.fit(module, torch.utils.data.DataLoader(Sentences(), batch_size=8), **kwargs)
        return fitted

    through, half, resumed = lightning_module(), lightning_module(), lightning_module()
    fit(through, 2)
    fit(half, 1).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, 2, ckpt_path=str(tmp_path / "half.ckpt"), weights_only=False)
    assert torch.equal(weights(through), weights(resumed))
    assert not torch.equal(weights(half), weights(resumed))


# Adaptive dropout in Transformers' models

SIZES = {"vocab_size": 40, "num_labels": 3}
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
} | SIZES
DROPS = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
FAMILIES = {
    "Bert": SMALL,
    "Roberta": SMALL,
    "Albert": SMALL | {"embedding_size": 8} | DROPS,
    "Electra": SMALL | {"embedding_size": 8},
    "Deberta": SMALL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "DebertaV2": SMALL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "XLNet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32} | SIZES,
    "DistilBert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32} | SIZES,
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0} | SIZES,
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_uegr_trains_with_adaptive_dropout(family, attention):
    """At texts of varying length: all rates move but those of attention's probabilities, and
    of XLNet's two widths, which are plain.
    """
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    config._attn_implementation = (
        attention
        if family in ("Bert", "Roberta", "Albert", "Electra", "DistilBert", "GPT2")
        else "eager"
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    keys = model.state_dict().keys()
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    optimizer = uk.SelectiveAdamW(model.parameters(), lr=1e-3)
    # XLNet has the length as the first axis inside: as many texts as words, one pass at a time.
    recipe = uk.recipes.uegr(
        model,
        model.get_input_embeddings(),
        optimizer,
        passes_at_once=1 if family == "XLNet" else None,
    )
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for length in (5, 7, 6, 9):
            ids = torch.randint(1, 40, (length if family == "XLNet" else 4, length))
            optimizer.zero_grad()
            losses = recipe.backward(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                torch.randint(3, (len(ids),)),
            )
            recipe.before_step()
            optimizer.step()
            assert all(loss.isfinite() for loss in losses.values())
    assert model.state_dict().keys() == keys
    states = recipe.state_dict()["adaptive_dropout"]
    twice = [f"transformer.layer.{i}.ff.dropout" for i in range(2)] if family == "XLNet" else []
    assert [name for name, state in states.items() if state[2].any()] == twice
    assert [
        name for name in twice if sum(str(each.message).startswith(name) for each in warned) == 1
    ] == twice
    assert sum("last axis" in str(each.message) for each in warned) == len(twice)
    still = {name for name, state in states.items() if not state[0].any()} - set(twice)
    # with four axes, or unused
    assert len(still) < len(dropouts) / 2 and all(not states[name].numel() for name in still), still
    assert all(state.isfinite().all() for state in states.values())
    recipe.close()
    assert [module for module in model.modules() if type(module) is torch.nn.Dropout] == dropouts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_features", [None, 16])
def test_from_pretrained(tmp_path, num_features, dtype):
    """Of a plain checkpoint, whose model has no norms, and of its own; also saved before the
    first call.
    """
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**SMALL)

    class Adaptive(transformers.BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            assert uk.replace_dropout(self, num_features=num_features) == 8

    def train(model):
        model.train()
        for _ in range(3):
            model(torch.randint(1, 40, (4, 6)), labels=torch.tensor([0, 1, 0, 2])).loss.backward()
        assert (
            model.dropout.gradient_norm.dtype == torch.float32 and model.dropout.gradient_norm.all()
        )
        assert model.dropout.gradient_norm.isfinite().all()

    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "plain")
    model, found = Adaptive.from_pretrained(
        tmp_path / "plain", output_loading_info=True, dtype=dtype
    )
    assert not found["unexpected_keys"] and all(
        key.endswith("._extra_state") for key in found["missing_keys"]
    )
    x = torch.ones(200, 16)
    assert abs((model.dropout.train()(x) == 0).float().mean() - 0.1) < 0.03
    model.save_pretrained(tmp_path / "new")
    train(Adaptive.from_pretrained(tmp_path / "new", dtype=dtype))
    train(model)
    model.save_pretrained(tmp_path / "own")
    again, found = Adaptive.from_pretrained(tmp_path / "own", output_loading_info=True, dtype=dtype)
    assert not any(found.values()), found
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items()
    )
    train(again)


def test_a_checkpoint_in_the_midst_of_uegr_is_the_plain_models(tmp_path):
    model = bert()
    recipe = uk.recipes.uegr(model, model.get_input_embeddings())
    ids = torch.randint(1, 30, (4, 6))
    recipe.backward({"input_ids": ids}, torch.tensor([0, 1, 0, 1]))
    model.save_pretrained(tmp_path)
    loaded, found = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)

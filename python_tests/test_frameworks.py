"""The optimizer where people train: Transformers' Trainer, Accelerate and Lightning, on a tiny model built here, with no network."""

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
        return {"input_ids": ids, "attention_mask": torch.ones(6, dtype=torch.long), "labels": ids.sum() % 2}


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 30}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=2))


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
    return transformers.Trainer(model=model, args=transformers.TrainingArguments(**arguments), train_dataset=Sentences(), **kwargs)


def weights(model):
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


@pytest.mark.parametrize("arguments", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=lambda a: next(iter(a), "plain"))
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
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
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
            self.net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))

        def training_step(self, batch):
            return torch.nn.functional.cross_entropy(self.net(batch["input_ids"].float() / 30), batch["labels"])

        def configure_optimizers(self):
            return uk.SelectiveAdamW(self.parameters(), **OPTIONS)

    return Module()


@pytest.mark.filterwarnings("ignore")  # of few workers, no logger and other advice
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_clips_and_resumes_exactly(tmp_path, precision):
    lightning = pytest.importorskip("lightning")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}

    def fit(module, epochs, **kwargs):
        fitted = lightning.Trainer(
            max_epochs=epochs, precision=precision, gradient_clip_val=0.5, default_root_dir=tmp_path, enable_checkpointing=False, **quiet
        )
        fitted.fit(module, torch.utils.data.DataLoader(Sentences(), batch_size=8), **kwargs)
        return fitted

    through, half, resumed = lightning_module(), lightning_module(), lightning_module()
    fit(through, 2)
    fit(half, 1).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, 2, ckpt_path=str(tmp_path / "half.ckpt"), weights_only=False)
    assert torch.equal(weights(through), weights(resumed))
    assert not torch.equal(weights(half), weights(resumed))

"""UEGRTrainer: every recipe inside Transformers' Trainer, on a tiny model built here, with no
network.
"""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

import uegr_kernels as uk

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from test_frameworks import Sentences, bert, weights  # noqa: E402
from test_trainer import Net, both, ours, rows  # noqa: E402

from uegr_kernels.integrations.transformers import UEGRTrainer  # noqa: E402
from uegr_kernels.recipes import RECIPES  # noqa: E402


def trainer(folder, recipe="uegr", model=None, dataset=None, **kwargs):
    arguments = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "logging_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 1,
        "use_cpu": True,
    } | kwargs.pop("arguments", {})
    return UEGRTrainer(
        model=bert() if model is None else model,
        args=transformers.TrainingArguments(**arguments),
        train_dataset=Sentences() if dataset is None else dataset,
        recipe=recipe,
        **kwargs,
    )


@pytest.mark.parametrize("recipe", uk.recipes.NAMES)
def test_every_recipe_trains_and_resumes_exactly(tmp_path, recipe):
    through = trainer(
        tmp_path / "whole",
        recipe,
        arguments={"num_train_epochs": 2, "max_steps": -1, "save_steps": 6},
    )
    through.train()
    resumed = trainer(
        tmp_path / "again",
        recipe,
        arguments={"num_train_epochs": 2, "max_steps": -1, "save_steps": 6},
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert torch.equal(weights(through.model), weights(resumed.model))
    assert not torch.equal(weights(through.model), weights(bert()))
    assert not any(module._forward_hooks for module in through.model.modules())


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
        {"max_grad_norm": 0.0},
        {"gradient_accumulation_steps": 2, "bf16": True},
    ],
    ids=lambda a: "-".join(a),
)
def test_uegr_resumes_exactly_under(tmp_path, arguments):
    through = trainer(tmp_path / "whole", arguments=arguments)
    through.train()
    resumed = trainer(tmp_path / "again", arguments=arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(weights(through.model), weights(resumed.model))


def test_losses_and_the_share_are_logged(tmp_path):
    run = trainer(tmp_path, recipe_options={"epsilon": 0.5, "threshold": 0.05})
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert (
            entry["clean_loss"] > 0 and entry["adversarial_loss"] > 0 and entry["divergence"] >= 0
        )
        assert 0.1 < entry["share_selected"] < 1
        assert "epoch" in entry and "learning_rate" in entry
    assert type(run.optimizer.optimizer) is uk.SelectiveAdamW


def test_plain_is_transformers_own_trainer(tmp_path):
    """With one loss, one pass and the neutral selection, clipping included."""
    neutral = {"lr": 1e-2, "normalization": "constant", "keep_probability": 1.0}
    arguments = {"max_grad_norm": 0.2, "learning_rate": 1e-2}
    ours = trainer(
        tmp_path / "ours",
        "plain",
        arguments=arguments,
        optimizer_cls_and_kwargs=(uk.SelectiveAdamW, neutral),
    )
    model = bert()
    theirs = transformers.Trainer(
        model=model,
        args=ours.args,
        train_dataset=Sentences(),
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 1e-2}),
    )
    for run in (ours, theirs):
        torch.manual_seed(5)
        run.train()
    torch.testing.assert_close(weights(ours.model), weights(model), rtol=1e-4, atol=1e-6)


def test_accumulated_batches_are_one_larger_batch(tmp_path):
    """Transformers' own Trainer adds them up for this model: it takes the loss for one that is
    divided already.
    """
    found = []
    for size, accumulated in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        arguments = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulated,
            "max_steps": 1,
            "max_grad_norm": 0.0,
        }
        run = trainer(tmp_path, "plain", arguments=arguments, recipe_options={"dropout": 0.0})
        run.train()
        found.append(
            (run.state.log_history[0].get("grad_norm"), run.state.log_history[-1]["train_loss"])
        )
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_fp16_autocast_with_a_scaler(tmp_path, monkeypatch, clip):
    """The recipe sees gradients without the scaler's factor, clipped or not; Accelerate itself
    takes fp16 on a GPU alone.
    """
    seen = []
    for factor in (2.0, 2048.0):
        run = trainer(tmp_path, "child_tuning_f", arguments={"max_grad_norm": clip, "max_steps": 2})
        run.accelerator.native_amp, run.accelerator.scaler = (
            True,
            torch.amp.GradScaler("cpu", init_scale=factor),
        )
        monkeypatch.setitem(run.accelerator.state._shared_state, "_mixed_precision", "fp16")
        attach = run._attach

        def watched(run=run):
            seen.append(
                torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])
            )

        def attached(model, run=run, attach=attach, watched=watched):
            attach(model)
            run.recipe.before_step = watched

        run._attach = attached
        run.train()
        # steps through the scaler, none of them skipped
        assert run.accelerator.scaler._growth_tracker.item() == 2
    for one, other in zip(seen[:2], seen[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=1e-3 * one.abs().max().item())


def test_recipes_without_a_selective_update_have_plain_adamw(tmp_path):
    found = {}
    for recipe in ("r_at", "r_at_su", "plain"):
        run = trainer(tmp_path, recipe, arguments={"learning_rate": 1e-2})
        run.train()
        found[recipe] = run
        shares = [
            entry["share_selected"] for entry in run.state.log_history if "share_selected" in entry
        ]
        assert shares and all((share < 1) == (recipe == "r_at_su") for share in shares)
    assert not torch.equal(weights(found["r_at"].model), weights(found["r_at_su"].model))
    sgd = trainer(tmp_path, "plain", arguments={"optim": "sgd"})
    sgd.train()
    assert type(sgd.optimizer.optimizer) is torch.optim.SGD


def test_label_smoothing_is_the_recipes(tmp_path):
    runs = [
        trainer(tmp_path, "plain", arguments={"label_smoothing_factor": factor, "max_steps": 2})
        for factor in (0.0, 0.4)
    ]
    for run in runs:
        torch.manual_seed(2)
        run.train()
    assert not torch.equal(*(weights(run.model) for run in runs))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("recipe", ["child_tuning_d", "roast"])
def test_a_recipe_that_looks_first_is_shown_the_whole_training_set_once(
    tmp_path, monkeypatch, recipe, stream
):
    seen, prepare = [], RECIPES[recipe].prepare

    def watched(self, batches):
        batches = list(batches)
        seen.append([len(labels) for _, labels in batches])
        prepare(self, batches)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(Sentences())

    monkeypatch.setattr(RECIPES[recipe], "prepare", watched)
    dataset = Stream() if stream else Sentences()
    run = trainer(tmp_path, recipe, dataset=dataset, arguments={"max_steps": 3})
    run.train()
    assert [sum(each) for each in seen] == ([] if stream else [len(Sentences())])
    assert stream or max(seen[0]) == run.args.per_device_train_batch_size


@pytest.mark.parametrize("recipe", ["child_tuning_d", "roast"])
def test_a_run_that_stops_within_an_epoch_goes_on_as_one_that_did_not(tmp_path, recipe):
    arguments = {"lr_scheduler_type": "constant", "save_steps": 3, "max_steps": 9}
    through = trainer(tmp_path / "whole", recipe, arguments=arguments)
    through.train()
    trainer(tmp_path / "half", recipe, arguments=arguments | {"max_steps": 3}).train()
    resumed = trainer(tmp_path / "again", recipe, arguments=arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-3"))
    assert torch.equal(weights(through.model), weights(resumed.model))


def test_wrong_arguments(tmp_path):
    with pytest.raises(
        ValueError, match="recipe='adversarial' is not a recipe; use one of 'plain'"
    ):
        trainer(tmp_path, "adversarial")
    with pytest.raises(TypeError, match="epsilo"):
        trainer(tmp_path, recipe_options={"epsilo": 1.0})
    with pytest.raises(TypeError, match="no argument 'epsilon'; .* recipe_options={'epsilon': "):
        trainer(tmp_path, epsilon=1.0)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=1"):
        trainer(tmp_path, "free_at", arguments={"gradient_accumulation_steps": 2})
    with pytest.raises(ValueError, match="compute_loss_func has no say"):
        trainer(tmp_path, compute_loss_func=lambda *args, **kwargs: None)
    nameless = [{"input_ids": torch.ones(3, dtype=torch.long), "attention_mask": torch.ones(3)}] * 4
    with pytest.raises(ValueError, match="no 'labels'"):
        trainer(tmp_path, dataset=nameless, arguments={"remove_unused_columns": False}).train()


WORKER = """
import sys, torch, transformers
sys.path.insert(0, sys.argv[1])
from test_frameworks import Sentences, bert, weights
from uegr_kernels.integrations.transformers import UEGRTrainer
torch.set_num_threads(1)
arguments = transformers.TrainingArguments(
    output_dir=sys.argv[2], max_steps=4, per_device_train_batch_size=4,
    gradient_accumulation_steps=int(sys.argv[3]), save_steps=2, report_to=[],
    disable_tqdm=True, seed=1, use_cpu=True, ddp_backend="gloo", ddp_find_unused_parameters=False,
)
run = UEGRTrainer(
    model=bert(), args=arguments, train_dataset=Sentences(),
    recipe="uegr", recipe_options={"dropout": [0.1, 0.3]},
)
run.train(resume_from_checkpoint=sys.argv[4] if len(sys.argv) > 4 else None)
wrapped = type(run.model_wrapped).__name__
assert wrapped == "DistributedDataParallel" or torch.distributed.get_world_size() == 2
torch.save(weights(run.model), f"{sys.argv[2]}/weights-{arguments.process_index}.pt")
"""


def run_on_two(folder, *more, script=WORKER):
    folder.mkdir()
    worker = folder / "worker.py"
    worker.write_text(script)
    here = pathlib.Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        str(worker),
        str(here),
        str(folder),
        *more,
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"weights-{rank}.pt") for rank in (0, 1)]


def test_two_processes_stay_alike_and_resume_exactly(tmp_path):
    first, second = run_on_two(tmp_path / "whole", "2")
    assert torch.equal(first, second) and not torch.equal(first, weights(bert()))
    resumed, _ = run_on_two(tmp_path / "again", "2", str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(first, resumed)


PLAIN = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_trainer import ACCUMULATED, IGNORED, Net, both, pictures, rows, vit, weights
torch.set_num_threads(1)
ignored = pictures(20, label=IGNORED)
for model, dataset, more in (
    (Net, rows(20), {}),
    (vit, pictures(20), {}),
    (vit, ignored, {}),
    (vit, ignored, {"average_tokens_across_devices": False}),
):
    place = lambda model: getattr(model, "embedding", None)
    more |= ACCUMULATED | {"ddp_backend": "gloo"}
    run, _ = both(sys.argv[2], model, dataset, embedding=place, **more)
    assert type(run.model_wrapped).__name__ == "DistributedDataParallel"
torch.save(weights(run.model), f"{sys.argv[2]}/weights-{run.args.process_index}.pt")
"""


def test_plain_is_the_trainer_on_two_processes(tmp_path):
    """Labels counted over both, by process, or not at all; the last step of an epoch has fewer
    batches.
    """
    first, second = run_on_two(tmp_path / "plain", script=PLAIN)
    assert torch.equal(first, second)


def test_a_compiled_model(tmp_path):
    """Also where it was called, and compiled, before the recipe was there, and with a second
    recipe on the same object.
    """
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


def test_a_lightning_module(tmp_path):
    """The module of docs/integrations.md, for two epochs."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net = torch.nn.Sequential(
                torch.nn.Embedding(30, 8), torch.nn.Flatten(), torch.nn.Linear(48, 2)
            )
            self.recipe = uk.recipes.uegr(self.net, self.net[0], epsilon=0.1)

        def training_step(self, batch):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            losses = self.recipe.backward(batch["input_ids"], batch["labels"])
            optimizer.step()
            self.log_dict(losses)

        def configure_optimizers(self):
            return uk.SelectiveAdamW(self.parameters(), lr=1e-2, seed=0)

    torch.manual_seed(0)
    module = Module()
    before = weights(module.net)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    fitted = lightning.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, default_root_dir=tmp_path, **quiet
    )
    fitted.fit(module, torch.utils.data.DataLoader(Sentences(), batch_size=8))
    assert fitted.callback_metrics["divergence"] >= 0 and not torch.equal(
        weights(module.net), before
    )


def test_uegrs_adaptive_dropout_is_the_recipes_own(tmp_path):
    """The model has nn.Dropout before and after training, and in every checkpoint."""
    import safetensors.torch

    through = trainer(tmp_path)
    dropouts = [module for module in through.model.modules() if type(module) is torch.nn.Dropout]
    assert len(dropouts) == 5
    through.train()
    assert [
        module for module in through.model.modules() if type(module) is torch.nn.Dropout
    ] == dropouts
    saved = safetensors.torch.load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert saved.keys() == bert().state_dict().keys()
    state = torch.load(tmp_path / "checkpoint-2" / "recipe.pt", weights_only=True)[
        "adaptive_dropout"
    ]
    assert len(state) == 5 and state["dropout"].shape == (3, 16) and state["dropout"][0].all()

"""Any recipe inside Transformers' Trainer."""

import pathlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from .. import recipes
from ..analysis.selection import share_selected
from ..selective import SelectiveAdamW

SELECTIVE = ("uegr", "r_at_su", "child_tuning_f")  # whose update is a selection; the others' is AdamW's
NEUTRAL = {"normalization": "constant", "keep_probability": 1.0}
STATE = "recipe.pt"  # in a checkpoint's folder


class UEGRTrainer(Trainer):
    """Transformers' Trainer whose batches are a recipe's: accumulation, autocast, clipping, DDP and checkpoints are the Trainer's.

    recipe          a name of `uk.recipes.NAMES`
    recipe_options  its options by name
    embedding       the module whose output is perturbed; None: the model's get_input_embeddings(). For a model that takes pixels, whose
                    one floating input is perturbed itself, pass embedding=False

    The optimizer is SelectiveAdamW with the arguments' learning rate, betas, epsilon and weight decay, which selects in the recipes of a
    selective update (uegr, r_at_su, child_tuning_f) and is AdamW in the others; `optimizers=`, `optim=` or
    `optimizer_cls_and_kwargs=(uk.SelectiveAdamW, {"lr": ..., "threshold": ...})` gives another. Batches hold "labels".
    Logs, beside the loss, the recipe's losses (L_st is `clean_loss`, L_adv `adversarial_loss`, L_div `divergence`), averaged over the
    batches since the last log, and `share_selected`, of the step before the log. A checkpoint carries the recipe's state: a resumed run
    equals the one that was not interrupted.
    Raises ValueError for an unknown recipe; TypeError or ValueError for wrong options, before training.
    """

    def __init__(
        self,
        *args: Any,
        recipe: str = "uegr",
        recipe_options: dict[str, Any] | None = None,
        embedding: nn.Module | bool | None = None,
        **kwargs: Any,
    ) -> None:
        if recipe not in recipes.NAMES:
            raise ValueError(f"recipe={recipe!r} is not a recipe; use one of {', '.join(map(repr, recipes.NAMES))}")
        self.recipe_name, self.recipe_options, self.embedding = recipe, dict(recipe_options or {}), embedding
        self.recipe: Any = None
        self._recipe_state: pathlib.Path | None = None  # to be loaded once the recipe is there
        self._saved = -1, pathlib.Path()  # the last checkpoint's step, and the recipe's file in it
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"n_gpu={self.args.n_gpu}: nn.DataParallel splits a batch behind the recipe's back; launch with torchrun instead"
            )
        if recipe == "free_at" and (self.args.gradient_accumulation_steps > 1 or self.args.fp16):
            raise ValueError("recipe='free_at' steps the optimizer itself; set gradient_accumulation_steps=1, and bf16 rather than fp16")
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func has no say in a recipe's loss; leave it out, or use recipe_options")
        if self.args.label_smoothing_factor:
            self.recipe_options.setdefault("label_smoothing", self.args.label_smoothing_factor)
        with torch.random.fork_rng():
            self._build_recipe(self.model, self.optimizer).close()  # raises for wrong options
        self.add_callback(_AroundTheStep(self))

    def get_optimizer_cls_and_kwargs(self, args: Any, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
        if not args.optim.startswith("adamw_torch"):
            theirs: tuple[Any, dict[str, Any]] = Trainer.get_optimizer_cls_and_kwargs(args, model)
            return theirs
        options = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        return SelectiveAdamW, options | ({} if self.recipe_name in SELECTIVE else NEUTRAL)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One batch: the recipe's passes fill .grad. Returns the loss divided by the number of accumulated batches, as the Trainer's."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        if "labels" not in inputs:
            raise ValueError(f"the batch has no 'labels' but {sorted(inputs)}; give the dataset's labels that name")
        if self.recipe is None or self.recipe.model is not model:
            self._attach(model)
        labels = inputs.pop("labels")
        accumulated = self.current_gradient_accumulation_steps
        scaler = self.accelerator.scaler
        share = torch.ones((), device=labels.device) / accumulated
        with self.compute_loss_context_manager():
            losses = self.recipe.backward(inputs, labels, scale=scaler.scale(share) if scaler is not None else share)
        for name, loss in losses.items():
            self._add(name, loss)
        total: Tensor = losses["loss"].detach() / accumulated
        return total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            names = [name for name in self._sums if name != "loss"]
            means = [self._sums[name].to(self.args.device, torch.float32) / self._counts[name] for name in names]
            if names:  # over all processes, as the loss
                logs |= dict(zip(names, self.accelerator.reduce(torch.stack(means), "mean").tolist(), strict=True))
            self._sums, self._counts = {}, {}
        super().log(logs, *args, **kwargs)

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def _build_recipe(self, model: Any, optimizer: Any) -> Any:
        embedding = self.embedding
        if embedding is None:
            embedding = self.accelerator.unwrap_model(model).get_input_embeddings()
        return getattr(recipes, self.recipe_name)(model, embedding or None, optimizer, **self.recipe_options)

    def _attach(self, model: nn.Module) -> None:
        """The recipe for the model as it is trained, wrapped or not."""
        if self.recipe is not None:
            self.recipe.close()
        with torch.random.fork_rng():  # a resumed run, whose random state is restored by now, draws no seed of its own
            self.recipe = self._build_recipe(model, self.optimizer)
        if self._recipe_state is not None:
            self.recipe.load_state_dict(torch.load(self._recipe_state, weights_only=True, map_location="cpu"))
            self._recipe_state = None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self._saved = self.state.global_step, pathlib.Path(output_dir, STATE)
        self._save_recipe()

    def _save_recipe(self) -> None:
        """Writes the recipe's state into the last checkpoint, where that is of the present step."""
        step, path = self._saved
        if self.args.should_save and self.recipe is not None and step == self.state.global_step:
            aside = path.with_suffix(".tmp")
            torch.save(self.recipe.state_dict(), aside)
            aside.replace(path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        found = pathlib.Path(checkpoint, STATE) if checkpoint is not None else None
        self._recipe_state = found if found is not None and found.exists() else None
        if self._recipe_state is not None:
            self._attach(self.model_wrapped)  # a recipe with parameters of its own has them in the optimizer that was saved
        super()._load_optimizer_and_scheduler(checkpoint)


class _AroundTheStep(TrainerCallback):
    """Hands the recipe the moments around the optimizer's step."""

    def __init__(self, trainer: UEGRTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.recipe.before_step()  # the Trainer has unscaled: it takes the gradients' norm in every step

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.recipe.after_step()
        if self._logs_next(args, state):
            share = share_selected(self.trainer.optimizer)
            if share is not None:
                self.trainer._add("share_selected", torch.tensor(share))

    def _logs_next(self, args: Any, state: Any) -> bool:
        step = state.global_step + 1
        if args.logging_strategy == "epoch":
            return bool(step % max(1, state.max_steps // max(1, state.num_train_epochs)) == 0)
        return bool((step == 1 and args.logging_first_step) or (state.logging_steps > 0 and step % state.logging_steps == 0))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._sums, self.trainer._counts = {}, {}

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.recipe is not None and abs(state.epoch - round(state.epoch)) < 1e-6:  # not where a run stops within an epoch
            with torch.random.fork_rng():  # a run resumed at this step has the random state that was saved
                self.trainer.recipe.epoch_end()
            self.trainer._save_recipe()  # a checkpoint of the epoch's last step is written before its end

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.recipe is not None:
            self.trainer.recipe.close()
            self.trainer.recipe = None

"""Runs the recipes inside Transformers' Trainer."""

import inspect
import pathlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForSequenceClassificationLoss
from transformers.trainer_pt_utils import LabelSmoother
from transformers.utils import import_utils, is_datasets_available, is_sagemaker_mp_enabled

from ..analysis import share_selected
from ..bistage import BiStage
from ..divergence import uegr_loss
from ..recipes import RECIPES, Recipe
from ..selective import SelectiveAdamW, SelectiveSGD

# of a SelectiveAdamW that is AdamW
NEUTRAL = {"normalization": "constant", "keep_probability": 1.0}
# the Trainer's names of AdamW
ADAMW = ("adamw_torch", "adamw_torch_fused")
# in a checkpoint's folder
STATE = "recipe.pt"
# Optimizers that step while a backward runs, and the package each needs, whose absence the Trainer
# reports itself.
STEP_IN_BACKWARD = {
    "lomo": "lomo",
    "adalomo": "lomo",
    "galore_adamw_layerwise": "galore_torch",
    "galore_adamw_8bit_layerwise": "galore_torch",
    "galore_adafactor_layerwise": "galore_torch",
    "apollo_adamw_layerwise": "apollo_torch",
}


class UEGRTrainer(Trainer):
    """Trains as Transformers' Trainer does, with a recipe's batches; accumulation, autocast,
    clipping, DDP and checkpoints are the Trainer's.

    recipe          a name of `uk.recipes.NAMES`
    recipe_options  its options by name
    embedding       the module whose output is perturbed, or its name in the model (with
                    model_init); None: the model's get_input_embeddings(). For a model that takes
                    pixels, whose one floating input is perturbed itself, pass embedding=False

    optim="adamw_torch" and "adamw_torch_fused" (the default) mean SelectiveAdamW with the
    arguments' learning rate, betas, epsilon and weight decay, which selects in the recipes of a
    selective update (uegr, r_at_su, child_tuning_f) and is AdamW in the others. Any other `optim`,
    `optimizers=` and `optimizer_cls_and_kwargs=(uk.SelectiveAdamW, {"lr": ..., "threshold": ...})`
    give what they give in the Trainer. A batch holds "labels", or what label_names calls them; the
    recipe's loss is taken of the model's logits, with task="regression" where the model's
    configuration says so, and with label_smoothing_factor. Accumulated batches count as one larger
    batch. docs/trainer.md lists what becomes of every argument. Logs, beside the loss, the recipe's
    losses (L_st is `clean_loss`, L_adv `adversarial_loss`, L_div `divergence`), averaged over the
    batches since the last log, and `share_selected`, of the step before the log. A checkpoint
    carries the recipe's state: a resumed run equals the one that was not interrupted. Every call of
    `train` begins a recipe and closes it; one that looks at the data first (child_tuning_d, roast)
    is shown the training set before the first step, unless that is a stream. Raises ValueError for
    an unknown recipe, and for what a recipe cannot honour: an overridden compute_loss,
    compute_loss_func, models for several labels or for tokens, ddp_static_graph, nn.DataParallel,
    DeepSpeed, context, sequence and tensor parallelism, optimizers that step in the backward, a
    backend that cannot serve on the device; TypeError or ValueError for wrong options. All of it at
    construction, and once more when training begins. The first batch raises ValueError where the
    model's own loss is another one than the recipe's.
    """

    def __init__(
        self,
        *args: object,
        recipe: str = "uegr",
        recipe_options: Mapping[str, object] | None = None,
        embedding: nn.Module | str | bool | None = None,
        **kwargs: object,
    ) -> None:
        if recipe not in RECIPES:
            raise ValueError(
                f"recipe={recipe!r} is not a recipe; use one of {', '.join(map(repr, RECIPES))}"
            )
        if not (embedding is None or embedding is False or isinstance(embedding, nn.Module | str)):
            raise TypeError(
                f"embedding is a {type(embedding).__name__}; pass a module of the "
                "model, its name, None or False"
            )
        self.recipe_name, self.recipe_options, self.embedding = (
            recipe,
            dict(recipe_options or {}),
            embedding,
        )
        self.recipe: Recipe | None = None
        self._forget()
        trainers = inspect.signature(Trainer)
        for name in kwargs:
            if name not in trainers.parameters:
                raise TypeError(
                    f"{type(self).__name__} has no argument {name!r}; a recipe's options go into "
                    f"recipe_options={{{name!r}: ...}}"
                )
        given = trainers.bind_partial(*args, **kwargs).arguments
        self._check_arguments(given.get("args"), given.get("compute_loss_func"))
        super().__init__(*args, **kwargs)
        self._check_model()
        with torch.random.fork_rng():
            # The recipe itself is the check: what it refuses is a matter of this model, embedding
            # and optimizer too.
            built = self._build_recipe(self.model, self._optimizer_to_check())
            built.close()
        reason = built.why_not(self.args.device)
        if reason is not None:
            raise ValueError(f"recipe_options backend={built.backend!r}: {reason}")
        self.add_callback(_AroundTheStep(self))

    def _check_arguments(self, args: TrainingArguments | None, compute_loss_func: object) -> None:
        """Raises for what no recipe can honour, as far as it stands in the arguments."""
        if getattr(self.compute_loss, "__func__", None) is not Trainer.compute_loss:
            raise ValueError(
                f"{type(self).__name__} overrides compute_loss, which a recipe would never call: "
                "its loss is of the model's logits and labels; leave it out, use recipe_options, "
                "or train with transformers.Trainer"
            )
        if compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func has no say in a recipe's loss; leave it out, or "
                "use recipe_options"
            )
        if args is None:
            return
        self._check_parallelism(getattr(args, "parallelism_config", None))
        if args.ddp_static_graph:
            raise ValueError(
                "ddp_static_graph=True wants one forward and one backward a step, and "
                "recipes make several; leave it out"
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"n_gpu={args.n_gpu}: nn.DataParallel splits a batch behind the "
                "recipe's back; launch with torchrun instead"
            )
        if args.deepspeed:
            raise ValueError(
                "deepspeed has a backward of its own, which recipes do not call; use DDP or FSDP"
            )
        optim = getattr(args.optim, "value", args.optim)
        package = STEP_IN_BACKWARD.get(optim)
        if package is not None and getattr(import_utils, f"is_{package}_available")():
            raise ValueError(
                f"optim={optim!r} steps while a backward runs, and a recipe has "
                "several backwards a step; use another"
            )
        if RECIPES[self.recipe_name].steps_itself and (
            args.gradient_accumulation_steps > 1 or args.fp16
        ):
            raise ValueError(
                f"recipe={self.recipe_name!r} steps the optimizer itself; set "
                "gradient_accumulation_steps=1, and bf16 rather than fp16"
            )
        smoothing = self.recipe_options.get("label_smoothing", args.label_smoothing_factor)
        if args.label_smoothing_factor and smoothing != args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor} and recipe_options' "
                f"label_smoothing={smoothing} differ; give one"
            )

    def _check_parallelism(self, config: object) -> None:
        for short, name in (("cp", "context"), ("sp", "sequence"), ("tp", "tensor")):
            if getattr(config, f"{short}_enabled", False):
                size = getattr(config, f"{short}_size", None)
                raise ValueError(
                    f"parallelism_config has {short}_size={size}: {name} parallelism gives a "
                    "process part of a sample's embedding or model, and perturbations are of whole "
                    "samples; use DDP or FSDP"
                )

    def _check_model(self) -> None:
        """Raises for what no recipe can honour, as far as the model or the launcher brings it."""
        if self.is_deepspeed_enabled or is_sagemaker_mp_enabled():
            raise ValueError(
                "DeepSpeed and SageMaker's model parallelism have a backward of their "
                "own; use DDP or FSDP"
            )
        self._check_parallelism(getattr(self.accelerator, "parallelism_config", None))
        model = self._unwrapped(self.model)
        if (getattr(model, "_tp_size", None) or 1) > 1:
            raise ValueError(
                f"the model is sharded in {model._tp_size} by tensor parallelism; use DDP or FSDP"
            )
        problem = getattr(getattr(model, "config", None), "problem_type", None)
        if problem == "multi_label_classification":
            raise ValueError(
                f"problem_type={problem!r} is trained with a sigmoid for each label, and recipes "
                "have one softmax over the classes, or regression; use transformers.Trainer, or "
                "another problem_type"
            )
        loss = getattr(model, "loss_type", None)
        if (
            LOSS_MAPPING.get(loss, ForSequenceClassificationLoss)
            is not ForSequenceClassificationLoss
        ):
            raise ValueError(
                f"{type(model).__name__}'s loss is {loss}, and recipes train logits [N, C], one "
                "row for each sample; use a model for sequence classification or regression, or "
                "transformers.Trainer"
            )
        if self.label_smoother is not None and type(self.label_smoother) is not LabelSmoother:
            raise ValueError(
                f"label_smoother is a {type(self.label_smoother).__name__}, which no "
                "recipe calls; use label_smoothing_factor"
            )
        if len(self.label_names) > 1:
            raise ValueError(
                f"label_names={self.label_names}: a recipe takes one tensor of labels; name it in "
                "TrainingArguments(label_names=[...])"
            )
        for name in {"labels", *self.label_names} & inspect.signature(
            type(model).forward
        ).parameters.keys():
            if (
                inspect.signature(type(model).forward).parameters[name].default
                is inspect.Parameter.empty
            ):
                raise ValueError(
                    f"{type(model).__name__}.forward cannot be called without {name!r}, as recipes "
                    "call it; give it the default None, "
                    "with which the model returns logits and no loss"
                )

    def get_optimizer_cls_and_kwargs(
        self, args: TrainingArguments, model: nn.Module | None = None
    ) -> tuple[type, dict[str, object]]:
        """Returns SelectiveAdamW where the arguments name torch's AdamW, else the Trainer's own
        choice.
        """
        if args.optim not in ADAMW:
            theirs: tuple[type, dict[str, object]] = Trainer.get_optimizer_cls_and_kwargs(
                args, model
            )
            return theirs
        options = {
            "lr": args.learning_rate,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
        }
        selects = RECIPES[self.recipe_name].selects_update
        return SelectiveAdamW, options | ({} if selects else NEUTRAL)

    def _optimizer_to_check(self) -> torch.optim.Optimizer | None:
        """Returns the optimizer; where the Trainer is to make one that selects, another of its
        class and options, of no weight of the model's.
        """
        given: torch.optim.Optimizer | None = self.optimizer
        chosen = self.optimizer_cls_and_kwargs
        if chosen is None and self.args.optim in ADAMW:
            chosen = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if given is not None or chosen is None:
            return given
        kind, options = chosen
        if not (isinstance(kind, type) and issubclass(kind, SelectiveAdamW | SelectiveSGD)):
            return None
        return kind(**options | {"params": [nn.Parameter(torch.zeros(1))]})

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Runs one batch: the recipe's passes fill .grad. Returns the loss, as much of it as the
        batch has in the accumulated ones.
        """
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            # schedule-free optimizers hold two sets of weights
            self.optimizer.train()
        inputs, labels, name = self._taken_apart(inputs)
        recipe = self.recipe
        if recipe is None or recipe.model is not model:
            recipe = self._attach(model)
        share = self._share(labels, num_items_in_batch)
        scaler = self.accelerator.scaler
        with self.compute_loss_context_manager():
            if not self._compared:
                self._compare_losses(model, inputs, name, labels)
            losses = recipe.backward(
                inputs, labels, scale=scaler.scale(share) if scaler is not None else share
            )
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        for key, loss in losses.items():
            self._add(key, loss)
        total: Tensor = losses["loss"].detach() * share
        return total

    def _taken_apart(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor, str]:
        """Returns a batch's inputs, its labels as a recipe takes them, and the labels' name."""
        inputs = dict(self._prepare_inputs(batch))
        name = self._label_name(inputs)
        labels = inputs.pop(name)
        if labels.dim() == 2 and labels.shape[1] == 1 and not labels.is_floating_point():
            # as Transformers' models do
            labels = labels.view(-1)
        if (
            not labels.is_floating_point()
            and self._options(self._unwrapped(self.model)).get("task") == "regression"
        ):
            # as a squared error does
            labels = labels.float()
        return inputs, labels, name

    def _batches_in_order(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Yields the training set once, in its order, as (inputs, labels); draws nothing."""
        rows, collate = self.train_dataset, self.data_collator
        if is_datasets_available() and isinstance(rows, sys.modules["datasets"].Dataset):
            rows = self._remove_unused_columns(rows, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        size = self.args.per_device_train_batch_size
        for first in range(0, len(rows), size):
            some = [rows[i] for i in range(first, min(first + size, len(rows)))]
            inputs, labels, _ = self._taken_apart(collate(some))
            yield inputs, labels

    def _label_name(self, batch: Mapping[str, object]) -> str:
        names = (
            self.label_names if self.args.label_names is not None else ["labels", *self.label_names]
        )
        found = next((name for name in names if isinstance(batch.get(name), Tensor)), None)
        if found is None:
            raise ValueError(
                f"the batch has no {names[0]!r} but {sorted(batch)}; give the dataset's labels "
                "that name, or name them in TrainingArguments(label_names=[...])"
            )
        return str(found)

    def _share(self, labels: Tensor, items: Tensor | int | None) -> Tensor:
        """Returns what the batch's loss counts for in the accumulated batches', as in
        Trainer.training_step and compute_loss.

        The Trainer gives a model whose forward takes **kwargs the number of labels in all of them,
        to divide a sum by.
        """
        share = torch.ones((), device=labels.device)
        counted = items if self.model_accepts_loss_kwargs else None
        if counted is not None:
            # as the Trainer counts, whatever the recipe's ignore_index
            share = labels.ne(-100).sum() / counted
            if self.args.average_tokens_across_devices:
                share = share * self.accelerator.num_processes
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        return (
            share
            if (counted is not None if scaled is None else scaled)
            else share / self.current_gradient_accumulation_steps
        )

    @torch.no_grad()
    def _compare_losses(
        self, model: nn.Module, inputs: Mapping[str, object], name: str, labels: Tensor
    ) -> None:
        """Raises where the model computes another loss from the labels than the recipe, which never
        asks for it.

        Not where the Trainer does not ask for it either (label smoothing), or recipe_options say
        what the labels are.
        """
        self._compared = True
        plain = self._unwrapped(model)
        said = self.label_smoother is not None or not {"task", "ignore_index"}.isdisjoint(
            self.recipe_options
        )
        if said or name not in inspect.signature(type(plain).forward).parameters:
            return
        modes = [(module, module.training) for module in model.modules()]
        config = getattr(plain, "config", None)
        problem = getattr(config, "problem_type", None)
        with torch.random.fork_rng():
            try:
                output = (model if self.is_fsdp_enabled else plain.eval())(
                    **inputs, **{name: labels}
                )
            finally:
                for module, training in modes:
                    module.training = training
        theirs, logits = _loss_and_logits(output)
        if theirs is None or logits is None or theirs.numel() != 1 or logits.dim() != 2:
            return
        task = self._options(plain).get("task", BiStage.task)
        ours = uegr_loss(logits, None, labels, task=task)
        if torch.isclose(theirs.to(ours).reshape(()), ours, rtol=0.02, atol=1e-3, equal_nan=True):
            return
        found = getattr(config, "problem_type", None)
        if config is not None and found != problem:
            config.problem_type = problem
        raise ValueError(
            f"{type(plain).__name__}'s own loss of the first batch is {theirs.item():.4g}"
            + (f" (problem_type {found!r})" if found is not None else "")
            + f", and the recipe's, of the same logits and labels, {ours.item():.4g}: the recipe "
            "would drop the model's. Use "
            "transformers.Trainer; or, to train on the recipe's, say what the labels are, as in "
            "recipe_options={'task': 'classification'}"
        )

    def _inner_training_loop(self, *args: object, **kwargs: object) -> object:
        """Trains once, with one recipe: what an earlier one left is forgotten, and the model is
        itself again, whatever happens.
        """
        # again: a trial or the user may have changed them since
        self._check_arguments(self.args, self.compute_loss_func)
        self._check_model()
        self._forget()
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            self._detach()

    def _load_best_model(self) -> None:
        # the weights go into the user's model, without what the recipe has put there
        self._detach()
        super()._load_best_model()

    def _forget(self) -> None:
        # to be loaded once the recipe is there
        self._recipe_state: pathlib.Path | None = None
        # the last checkpoint's step and folder
        self._saved = -1, pathlib.Path()
        self._compared = False
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def log(self, logs: dict[str, float], *args: object, **kwargs: object) -> None:
        """Adds the recipe's losses to the Trainer's log."""
        if "loss" in logs:
            names = [name for name in self._sums if name != "loss"]
            means = [
                self._sums[name].to(self.args.device, torch.float32) / self._counts[name]
                for name in names
            ]
            # over all processes, as the loss
            if names:
                logs |= dict(
                    zip(
                        names,
                        self.accelerator.reduce(torch.stack(means), "mean").tolist(),
                        strict=True,
                    )
                )
            self._sums, self._counts = {}, {}
        super().log(logs, *args, **kwargs)

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def _unwrapped(self, model: nn.Module) -> nn.Module:
        plain: nn.Module = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return plain

    def _options(self, model: nn.Module) -> dict[str, Any]:
        """Returns the recipe's options, with what arguments and the model's configuration say."""
        said: dict[str, object] = {}
        if self.label_smoother is not None:
            said["label_smoothing"] = self.label_smoother.epsilon
        config = getattr(model, "config", None)
        problem, outputs = (
            getattr(config, "problem_type", None),
            getattr(config, "num_labels", None),
        )
        if problem == "regression" or (problem is None and outputs == 1):
            said["task"] = "regression"
        return said | self.recipe_options

    def _build_recipe(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Recipe:
        plain = self._unwrapped(model)
        embedding = _embedding(plain, self.embedding)
        return RECIPES[self.recipe_name](model, embedding, optimizer, **self._options(plain))

    def _attach(self, model: nn.Module) -> Recipe:
        """Builds and returns the recipe for the model as it is trained, wrapped or not."""
        self._detach()
        # a resumed run, whose random state is restored by now, draws no seed of its own
        with torch.random.fork_rng():
            recipe = self.recipe = self._build_recipe(model, self.optimizer)
        if self._recipe_state is not None:
            state = torch.load(self._recipe_state, weights_only=True, map_location="cpu")
            own = self._own_file(self._recipe_state.parent)
            if own.exists():
                state |= torch.load(own, weights_only=True, map_location="cpu")
            recipe.load_state_dict(state)
            self._recipe_state = None
        return recipe

    def _detach(self) -> None:
        if self.recipe is not None:
            self.recipe.close()
            self.recipe = None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self._saved = self.state.global_step, pathlib.Path(output_dir)
        # a process may be here before the one that saves the model
        self._saved[1].mkdir(parents=True, exist_ok=True)
        self._save_recipe()

    def _tune_save_checkpoint(self, checkpoint_dir: str) -> None:
        super()._tune_save_checkpoint(checkpoint_dir)
        self._saved = (
            self.state.global_step,
            pathlib.Path(checkpoint_dir, f"checkpoint-{self.state.global_step}"),
        )
        self._save_recipe()

    def _save_recipe(self) -> None:
        """Writes the recipe's state into the last checkpoint, where that is of the present
        step and still there.
        """
        step, folder = self._saved
        if self.recipe is None or step != self.state.global_step or not folder.is_dir():
            return
        state = self.recipe.state_dict()
        if self.args.should_save:
            _write(state, folder / STATE)
        # process 1's is in recipe_1.pt
        own = {name: state[name] for name in self.recipe.kept_by_each_process if name in state}
        if own and self.args.process_index > 0:
            _write(own, self._own_file(folder))

    def _own_file(self, folder: pathlib.Path) -> pathlib.Path:
        return folder / f"recipe_{self.args.process_index}.pt"

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        found = pathlib.Path(checkpoint, STATE) if checkpoint is not None else None
        self._recipe_state = found if found is not None and found.exists() else None
        if self._recipe_state is not None:
            # a recipe with parameters of its own has them in the optimizer that was saved
            self._attach(self.model_wrapped)
        elif found is not None:
            warnings.warn(
                f"{found} is not there: the recipe begins afresh with the checkpoint's weights",
                stacklevel=2,
            )
        super()._load_optimizer_and_scheduler(checkpoint)


class _AroundTheStep(TrainerCallback):
    """Hands the recipe the moments around the optimizer's step."""

    def __init__(self, trainer: UEGRTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if self.trainer.recipe is not None:
            # the Trainer has unscaled: it takes the gradients' norm in every step
            self.trainer.recipe.before_step()

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        if self.trainer.recipe is not None:
            self.trainer.recipe.after_step()
        if self._logs_next(args, state):
            share = share_selected(self.trainer.optimizer)
            if share is not None:
                self.trainer._add("share_selected", torch.tensor(share))

    def _logs_next(self, args: TrainingArguments, state: TrainerState) -> bool:
        step = state.global_step + 1
        if args.logging_strategy == "epoch":
            return bool(step % max(1, state.max_steps // max(1, state.num_train_epochs)) == 0)
        return bool(
            (step == 1 and args.logging_first_step)
            or (state.logging_steps > 0 and step % state.logging_steps == 0)
        )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        # a resumed run has it
        if self.trainer.recipe is None:
            self.trainer._attach(self.trainer.model_wrapped)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        trainer = self.trainer
        # a stream cannot be looked through before it is trained on
        stream = isinstance(trainer.train_dataset, IterableDataset)
        if state.global_step == 0 and trainer.recipe is not None and not stream:
            trainer.recipe.prepare(trainer._batches_in_order())

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        # not where a run stops within an epoch
        if self.trainer.recipe is not None and abs(state.epoch - round(state.epoch)) < 1e-6:
            # a run resumed at this step has the random state that was saved
            with torch.random.fork_rng():
                self.trainer.recipe.epoch_end()
            # a checkpoint of the epoch's last step is written before its end
            self.trainer._save_recipe()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self.trainer._detach()


def _write(state: dict[str, object], path: pathlib.Path) -> None:
    """Writes the file whole, or leaves the old one."""
    aside = path.with_suffix(".tmp")
    torch.save(state, aside)
    aside.replace(path)


def _embedding(model: Any, given: nn.Module | str | bool | None) -> nn.Module | None:
    """Returns the module to perturb, None for the input itself; raises ValueError, saying what to
    pass, where the model does not tell.
    """
    name = type(model).__name__
    if given is False:
        return None
    if isinstance(given, str):
        modules: dict[str, nn.Module] = dict(model.named_modules())
        if given not in modules:
            raise ValueError(
                f"embedding={given!r} is no module of {name}; use one of "
                f"{', '.join(filter(None, modules))}"
            )
        return modules[given]
    if isinstance(given, nn.Module):
        return given
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder, which has two embeddings; pass the encoder's, "
            "embedding=model.get_encoder().get_input_embeddings()"
        )
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        found = None
    if found is None:
        raise ValueError(
            f"{name} has no get_input_embeddings(); pass embedding=, the module whose output is "
            "perturbed (such as model.embedding) "
            "or its name, or embedding=False to perturb the one floating input itself"
        )
    embedding: nn.Module = found
    return embedding


def _loss_and_logits(output: object) -> tuple[Tensor | None, Tensor | None]:
    """Returns what a model that was given labels returned, as the Trainer reads it: a dict's "loss"
    and "logits", or a tuple's first two.
    """
    if isinstance(output, Mapping):
        return output.get("loss"), output.get("logits")
    if (
        isinstance(output, tuple)
        and len(output) > 1
        and all(isinstance(value, Tensor) for value in output[:2])
    ):
        return output[0], output[1]
    return None, None

"""SelectiveAdamW and SelectiveSGD: the optimizers that users build, and their step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd import forward_ad
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from ..core import checks, memory, shards
from . import op
from .batch import Batch, Group, Scopes
from .cached_step import CachedStep, CheckedOptions
from .options import AdamWOptions, Selection, SGDOptions, StepOptions, agreed_seed, options_of
from .state import (
    Packed,
    check_batch,
    check_parameter,
    complete,
    placed,
    restore,
    unpack,
    without_none,
)

# of the state's layout; a key of every group
FORMAT = 1


def _number_or_tensor(value: float | Tensor) -> tuple[float, Tensor | None]:
    """Returns an option as the operators take it: a number, or 0.0 and a tensor."""
    return (0.0, value) if isinstance(value, Tensor) else (float(value), None)


class SelectiveOptimizer(Optimizer):
    """Holds what SelectiveAdamW and SelectiveSGD share: groups, seed, streams, states, checkpoints.
    Not built by itself.
    """

    operator: op.SteppingOperator[...]
    # options of this optimizer's own that are numbers
    numbers: tuple[str, ...]
    # what every group has, a loaded one too
    fixed: ClassVar[dict[str, object]] = {}
    # options that are True or False
    flags: tuple[str, ...] = ("maximize", "capturable", "differentiable", "foreach", "fused")
    _cached_step: CachedStep | None
    # of the parameters whose memory was looked at last
    _places: memory.Places | None
    # by key of the state
    _packed: dict[str, Packed]
    _scopes: Scopes

    def __init__(
        self,
        params: ParamsT,
        # options that the two have not alike
        own: Mapping[str, object],
        *,
        threshold: float,
        sharpness: float,
        normalization: str,
        direction: str,
        scope: str,
        statistics: str,
        rescale: bool,
        min_probability: float,
        keep_probability: float,
        target: str,
        maximize: bool,
        foreach: bool | None,
        capturable: bool,
        differentiable: bool,
        fused: bool | None,
        state_dtype: torch.dtype | None,
        seed: int | None,
        backend: str,
    ):
        defaults: dict[str, object] = {
            **own,
            "threshold": threshold,
            "sharpness": sharpness,
            "normalization": normalization,
            "direction": direction,
            "scope": scope,
            "statistics": statistics,
            "rescale": rescale,
            "min_probability": min_probability,
            "keep_probability": keep_probability,
            "target": target,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "state_dtype": state_dtype,
            **self.fixed,
        }
        checks.backend(backend)
        if seed is not None:
            seed = checks.signed_seed(seed) % 2**64
        self.backend = backend
        self._forget()
        # drawn here and not agreed on with the other ranks yet
        self._drawn_seed: int | None = None
        self._check(defaults)
        super().__init__(params, {**defaults, "seed": seed, "format": FORMAT})
        if fused:
            self._step_supports_amp_scaling = True

    def _forget(self) -> None:
        """Drops what is known of tensors and states from earlier steps."""
        self._cached_step, self._packed, self._places, self._scopes = None, {}, None, Scopes()

    def _check(self, group: Mapping[str, Any]) -> None:
        """Raises what is wrong with a group's options, in torch's own words where torch has
        the option.
        """
        lr = group["lr"]
        for name in ("lr", "weight_decay", *self.numbers):
            value = group[name]
            if (
                type(value) not in checks.PLAIN
                and not isinstance(value, Tensor)
                and not checks.is_number(value)
            ):
                raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give a number")
        for name in self.flags:
            value = group[name]
            if type(value) is not bool and not (value is None and name in ("foreach", "fused")):
                checks.flag(name, value)
        if isinstance(lr, Tensor):
            if not lr.is_floating_point():
                raise TypeError(
                    f"lr={lr!r} is {lr.dtype}; give a number, or a tensor of floating point"
                )
            if lr.numel() != 1:
                raise ValueError("Tensor lr must be 1-element")
        if not 0.0 <= lr:
            raise ValueError(f"Invalid learning rate: {lr}")
        for name in ("lr", "weight_decay", *self.numbers):
            value = group[name]
            if not isinstance(value, Tensor) and abs(checks.plain(value)) > checks.LARGEST:
                raise ValueError(f"{name}={value} is out of range; give a finite number")
        if not 0.0 <= group["weight_decay"]:
            raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
        if group["fused"] and group["differentiable"]:
            raise RuntimeError("`fused` does not support `differentiable`")
        if group["fused"] and group["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if group["differentiable"] and self.backend not in ("auto", "reference"):
            raise RuntimeError(
                f"differentiable=True runs on the reference only, not on backend={self.backend!r}; "
                "use backend='auto'"
            )
        if group["state_dtype"] not in (None, torch.bfloat16):
            raise ValueError(
                f"state_dtype={group['state_dtype']!r} is not supported; use None or torch.bfloat16"
            )
        Selection.of_group(group)

    def _moments(self, group: Group) -> tuple[str, ...]:
        """Returns the group's moment keys, in the operator's order."""
        raise NotImplementedError

    def _update(self, batch: Batch, common: StepOptions) -> object:
        """Calls the optimizer's operator; returns its plan."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, object]) -> None:
        """Adds a group of parameters, as torch's optimizers do, once its options are checked."""
        if isinstance(param_group, dict):
            self._check(self.defaults | param_group)
            if param_group.get("seed") is not None:
                param_group = param_group | {
                    "seed": checks.signed_seed(param_group["seed"]) % 2**64
                }
        super().add_param_group(param_group)
        self._settle_seed()

    def _settle_seed(self) -> None:
        """Gives a seed to the groups that have none: one drawn from torch's default CPU
        generator where something is random, else 0.
        """
        if self.defaults["seed"] is None and any(
            Selection.of_group(group).random or group["state_dtype"] for group in self.param_groups
        ):
            # a fake tensor has no value to draw
            with unset_fake_temporarily():
                drawn = int(torch.randint(-(2**63), 2**63 - 1, (), device="cpu"))
            self.defaults["seed"] = self._drawn_seed = drawn % 2**64
        for group in self.param_groups:
            group["seed"] = (self.defaults["seed"] or 0) if group["seed"] is None else group["seed"]

    def _agree_on_seed(self) -> None:
        """Makes rank 0's drawn seed everyone's, once; a given or loaded one is not sent."""
        drawn, self._drawn_seed = self._drawn_seed, None
        if drawn is None:
            return
        seed = self.defaults["seed"] = agreed_seed(drawn)
        for group in self.param_groups:
            group["seed"] = seed if group["seed"] == drawn else group["seed"]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one step (Algorithm 1, lines 10-13) and returns the closure's loss, if one is
        given.

        Sparse gradients and complex or integer parameters are refused, where torch.optim steps some
        of them. Raises before anything has changed: RuntimeError for a sparse gradient and for a
        tensor with a forward-mode tangent, TypeError for what is not floating point, ValueError for
        a gradient or state of another shape than its parameter (RuntimeError where it came by
        `.data` or in place after a step) and for a bad option. On the meta device and under
        FakeTensorMode the states are made and nothing is computed; fused=True refuses the meta
        device, as torch does.
        """
        with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if torch.compiler.is_compiling():
                self._run(self._traced_batches())
                return loss
            # before anything can raise: every rank takes part
            self._agree_on_seed()
            if forward_ad._current_level >= 0:
                self._refuse_tangents()
            # comes back with the step taken
            cached, self._cached_step = self._cached_step, None
            batch = self._batch_again(cached) if cached else None
            if cached and batch:
                self._update_all([batch])
                batch.forget_gradients()
                self._cached_step = cached
            else:
                self._cached_step = self._step_anew()
            return loss

    def _refuse_tangents(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        given = [*params, *(p.grad for p in params if p.grad is not None)]
        checks.refuse_transforms(
            f"the step of {type(self).__name__}", given, "step outside of forward mode"
        )

    def _batch_again(self, cached: CachedStep) -> Batch | None:
        """Returns the batch of a cached step with the gradients of now, ready to be stepped; None
        where anything else may differ. Changes nothing but the cached step.
        """
        batch, group = cached.batch, cached.batch.group
        needed, grads = self._needed(group), list[Tensor]()
        if cached.why_not(self.param_groups, self.state, needed, grads) is not None:
            return None
        if cached.options is None or not cached.options.are_of(group, self.backend):
            self._check(group)
            new = self._new_batch(group, batch.device, batch.params[0].dtype)
            if new.backend != batch.backend:
                return None
            batch.selection, batch.seed = new.selection, new.seed
            cached.options = CheckedOptions.of(group, self.defaults, self.backend)
        batch.grads = grads
        batch.state_lists = {key: batch.state_lists[key] for key in needed}
        return batch

    def _step_anew(self) -> CachedStep | None:
        """Checks every tensor, makes the states that are missing, and steps. Returns what the next
        step may be spared.
        """
        batches = [
            batch for group, first in self._groups() for batch in self._batches(group, first)
        ]
        places = self._check_memory(batches)
        self._complete(batches)
        self._run(batches)
        if (
            len(self.param_groups) != 1
            or len(batches) != 1
            or batches[0].backend == "reference"
            or batches[0].cuts
            or len(batches[0].params) != len(batches[0].group["params"])
        ):
            return None
        batches[0].forget_gradients()
        options = CheckedOptions.of(batches[0].group, self.defaults, self.backend)
        return CachedStep.of(batches[0], self.state, self._packed, places, options)

    def _groups(self) -> Iterator[tuple[Group, int]]:
        """Returns every group with the stream of its first parameter: streams number the
        parameters across groups, gradient or not.
        """
        first = 0
        # torch types no entry
        groups: list[Any] = self.param_groups
        for group in groups:
            yield group, first
            first += len(group["params"])

    def _batches(self, group: Group, first: int) -> list[Batch]:
        """Collects the group's parameters that have a gradient, by device and dtype; raises what
        cannot be stepped, and changes nothing.
        """
        self._check(group)
        batches: dict[tuple[torch.device, torch.dtype], Batch] = {}
        device: torch.device | None = None
        dtype: torch.dtype | None = None
        batch: Batch | None = None
        # every line here runs once a parameter and step
        for stream, p in enumerate(group["params"], first):
            grad = p.grad
            if grad is None:
                continue
            if p.dtype is not dtype or p.device != device:
                device, dtype = p.device, p.dtype
                batch = batches.get((device, dtype))
            state = self.state.get(p)
            if (
                not state
                or batch is None
                or grad.layout is not torch.strided
                or grad.dtype is not dtype
            ):
                check_parameter(stream, p, grad)
                if batch is None:
                    batch = batches[p.device, p.dtype] = self._new_batch(group, p.device, p.dtype)
            batch.params.append(p)
            batch.grads.append(grad)
            batch.states.append(state or {})
            n = p.numel()
            batch.layout += (
                stream,
                *(shards.layout(f"parameter {stream}", p) if shards.sharded(p) else (0, n, n)),
            )
        return list(batches.values())

    def _new_batch(self, group: Group, device: torch.device, dtype: torch.dtype) -> Batch:
        backend = (
            "reference"
            if group["differentiable"]
            else self.operator.choose(self.backend, device, dtype)
        )
        if group["fused"] and device.type == "meta":
            raise RuntimeError(
                "`fused=True` requires all the params to be floating point Tensors of supported "
                f"devices: ['cpu', 'cuda'] but {dtype} and meta"
            )
        seed = checks.signed_seed(group["seed"])
        return Batch.empty(group, Selection.of_group(group), backend, seed)

    def _check_memory(self, batches: list[Batch]) -> memory.Places:
        """Raises parameters that share memory. Where all addresses are those of the last time,
        none needs a look.
        """
        parts = [shards.local(p) for batch in batches for p in batch.params]
        found = memory.places(parts)
        if found == self._places:
            return found
        streams = [stream for batch in batches for stream in batch.layout[::4]]
        for stream, p in zip(streams, parts, strict=True):
            memory.refuse_overlap(f"parameter {stream}", p)
        pair = memory.shared(parts)
        if pair:
            first, second = sorted(streams[i] for i in pair)
            raise ValueError(
                f"parameters {first} and {second} share memory, so that a step would change it "
                "twice; pass one of them, or give the other a .clone() of its own"
            )
        self._places = found
        return found

    def _needed(self, group: Group) -> tuple[str, ...]:
        """Returns the keys of a parameter's state."""
        kept = ("saliency_min", "saliency_max") if group["statistics"] == "previous" else ()
        return ("step", *self._moments(group), *kept)

    def _complete(self, batches: list[Batch]) -> None:
        """Checks the batches' tensors, and makes what their parameters' states lack."""
        for batch in batches:
            check_batch(batch, self._needed(batch.group), self._moments(batch.group))
        for batch in batches:
            batch.states = [
                state if state else self.state[p]
                for p, state in zip(batch.params, batch.states, strict=True)
            ]
            may_pack = len(self.param_groups) == 1
            self._packed |= complete(batch, self._needed(batch.group), may_pack=may_pack)

    def _traced_batches(self) -> list[Batch]:
        """Returns the step's batches for torch.compile: it runs `_init_group` in Python, and traces
        what is done with the lists it fills.
        """
        batches = []
        for group, first in self._groups():
            needed = self._needed(group)
            for number in range(self._init_group(group, first, -1)):
                lists: list[list[Any]] = [[] for _ in range(4 + len(needed))]
                self._init_group(group, first, number, *lists)
                params, grads, layout, (backend, seed), *states = lists
                batch = Batch.empty(group, Selection(**options_of(group)), backend, seed)
                batch.params, batch.grads, batch.layout = params, grads, layout
                batch.state_lists = dict(zip(needed, states, strict=True))
                batches.append(batch)
        return batches

    def _init_group(self, group: Group, first: int, number: int, *lists: list[Any]) -> int:
        """Checks the group, creates its states and fills the lists with its batch `number`.
        Returns how many batches there are.
        """
        unpack(self._packed, self.state.values())
        self._packed = {}
        batches = self._batches(group, first)
        self._complete(batches)
        for batch in batches[number : number + 1] if lists else ():
            states = [batch.state_lists[key] for key in self._needed(group)]
            values: list[Sequence[object]] = [batch.params, batch.grads, batch.layout]
            values += [[batch.backend, batch.seed], *states]
            for filled, value in zip(lists, values, strict=True):
                filled += value
        return len(batches)

    def _run(self, batches: list[Batch]) -> None:
        if not torch.compiler.is_compiling():
            for batch in batches:
                # nothing to compute; the steps lie on the CPU
                if batch.params[0].is_meta:
                    torch._foreach_add_(batch.steps, 1)
            batches = [batch for batch in batches if not batch.params[0].is_meta]
        for batch in batches:
            batch.localise()
        self._update_all(batches)

    def _update_all(self, batches: list[Batch]) -> None:
        # GradScaler's, which sets them for the time of a step
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self._scopes.settle(batches, scale)
        for batch in batches:
            device, group = batch.device, batch.group
            lr, lr_tensor = _number_or_tensor(group["lr"])
            common = StepOptions(
                scope_statistics=batch.statistics,
                layout=batch.layout,
                grad_scale=None if scale is None else scale.to(device),
                found_inf=None if found is None else found.to(device),
                lr=lr,
                lr_tensor=lr_tensor,
                weight_decay=float(group["weight_decay"]),
                maximize=bool(group["maximize"]),
                seed=batch.seed,
                selection=batch.selection,
                plan=batch.plan,
            )
            batch.plan = self._update(batch, common)
            if any(batch.cuts):
                self._scopes.join_kept(batch, found)

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Loads a checkpoint of this optimizer or of torch's; keys its groups lack keep the value
        of the group they replace.

        Raises ValueError for a format newer than this version's, before anything has changed.
        """
        loaded: dict[str, Any] = {}

        def completed(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            loaded.update(state_dict)
            for saved in state_dict["param_groups"]:
                if saved.get("format", FORMAT) > FORMAT:
                    raise ValueError(
                        f"the checkpoint has format {saved['format']}, this version reads up to "
                        f"{FORMAT}; upgrade uegr-kernels"
                    )
            keep = [
                {k: v for k, v in group.items() if k not in ("params", "param_names")}
                for group in self.param_groups
            ]
            groups = state_dict["param_groups"]
            # else the base class says so
            if len(groups) == len(keep):
                groups = [
                    kept | saved | self.fixed for kept, saved in zip(keep, groups, strict=True)
                ]
            return state_dict | {"param_groups": groups}

        def restored(optimizer: Optimizer) -> None:
            for state in self.state.values():
                without_none(state)
            saved_ids = [i for group in loaded["param_groups"] for i in group["params"]]
            params = [(p, group) for group in self.param_groups for p in group["params"]]
            for i, (p, group) in zip(saved_ids, params, strict=True):
                saved = loaded["state"].get(i)
                if saved:
                    restore(self.state[p], saved, p, group["state_dtype"])
            if any("seed" in group for group in loaded["param_groups"]):
                self._drawn_seed, self.defaults["seed"] = None, self.param_groups[0]["seed"]

        handles = (
            self.register_load_state_dict_pre_hook(completed),
            self.register_load_state_dict_post_hook(restored, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __repr__(self) -> str:
        first, *groups = super().__repr__().split("\n", 1)
        return "\n".join((first, f"backend: {self.backend}", *groups))

    def __getstate__(self) -> dict[str, object]:
        return super().__getstate__() | {"backend": self.backend, "_drawn_seed": self._drawn_seed}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            for p in group["params"]:
                placed(self.state.get(p) or {}, p)
        if any(group["fused"] for group in self.param_groups):
            self._step_supports_amp_scaling = True


class SelectiveAdamW(SelectiveOptimizer):
    """Runs AdamW on a random selection of the elements (UEGR, Eq. 7-9 and Algorithm 1).

    For every tensor with gradient g, in float32 (float64 for float64): s = g*g, s~ = normalise(s),
    p = 1/(1 + exp(2*sharpness*(s~ - threshold))), b ~ Bernoulli(p), theta = AdamW(theta, b*g/p).

    params  iterable of parameters, of (name, parameter) or of groups; any float dtype and strides
    lr, betas, eps, weight_decay, amsgrad, maximize, capturable, differentiable  as in torch's AdamW
    threshold, sharpness  where p is 1/2, in units of s~, and how steep p is there (>= 0)
    normalization  "minmax" | "range" (Eq. 8 to the letter) | "rank" (share of smaller s; native
        backends: within 0.0006 or its bin) | "constant" (p is keep_probability)
    direction  "printed": p falls with saliency, as Eq. 9 is printed | "salient": p rises
    scope  "tensor" | "global": statistics over one tensor, or over all of the groups that say so
    statistics  "current" | "previous": of this step's gradient, or of the one before (one visit)
    rescale  divide by p;  min_probability  floor of p, at least 2^-24;  keep_probability  in (0, 1]
    target  "gradient": b*g/p feeds the moments | "update": g does; b/p multiplies AdamW's step
    state_dtype  None, or torch.bfloat16: moments rounded stochastically
    seed  integer, modulo 2^64; None: from torch's CPU generator (pass one if only some ranks step)
    fused  True: GradScaler's scale and found_inf are handled inside;  foreach  has no effect
    backend  "auto" | "reference" | "cpp" | "cuda" | "triton"

    Raises ValueError, TypeError, RuntimeError for bad options, when built. Equivalent to
    `selective.reference.selective_adamw_` and, with "constant", to torch.optim.AdamW.
    """

    operator = op.selective_adamw_
    numbers = ("eps",)
    # As torch.optim.Adam names it, so that each loads the other's checkpoints; one of Adam's goes
    # on with decoupled decay.
    fixed: ClassVar[dict[str, object]] = {"decoupled_weight_decay": True}
    flags = (*SelectiveOptimizer.flags, "amsgrad")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        threshold: float = Selection.threshold,
        sharpness: float = Selection.sharpness,
        normalization: str = Selection.normalization,
        direction: str = Selection.direction,
        scope: str = Selection.scope,
        statistics: str = Selection.statistics,
        rescale: bool = Selection.rescale,
        min_probability: float = Selection.min_probability,
        keep_probability: float = Selection.keep_probability,
        target: str = Selection.target,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        seed: int | None = None,
        backend: str = "auto",
    ):
        own = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
        }
        super().__init__(
            params,
            own,
            threshold=threshold,
            sharpness=sharpness,
            normalization=normalization,
            direction=direction,
            scope=scope,
            statistics=statistics,
            rescale=rescale,
            min_probability=min_probability,
            keep_probability=keep_probability,
            target=target,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            state_dtype=state_dtype,
            seed=seed,
            backend=backend,
        )

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        betas = group["betas"]
        is_pair = isinstance(betas, (tuple, list)) and len(betas) == 2
        for beta in betas if is_pair else (None,):
            if (
                type(beta) not in checks.PLAIN
                and not isinstance(beta, Tensor)
                and not checks.is_number(beta)
            ):
                raise TypeError(f"betas={betas!r} is no pair of numbers; give (beta1, beta2)")
        if isinstance(group["lr"], Tensor) and group["foreach"] and not group["capturable"]:
            raise ValueError(
                "lr as a Tensor is not supported for capturable=False and foreach=True"
            )
        if not 0.0 <= group["eps"]:
            raise ValueError(f"Invalid epsilon value: {group['eps']}")
        for i in (0, 1):
            if not 0.0 <= betas[i] < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {betas[i]}")
        if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
            raise ValueError("betas must be either both floats or both Tensors")
        for i in (0, 1):
            if isinstance(betas[i], Tensor):
                if not betas[i].is_floating_point():
                    raise TypeError(
                        f"betas[{i}]={betas[i]!r} is {betas[i].dtype}; give numbers, "
                        "or tensors of floating point"
                    )
                if group["foreach"] and not group["capturable"]:
                    raise ValueError(
                        f"betas[{i}] as a Tensor is not supported for capturable=False and "
                        "foreach=True"
                    )
                if betas[i].numel() != 1:
                    raise ValueError(f"Tensor betas[{i}] must be 1-element")

    def _moments(self, group: Group) -> tuple[str, ...]:
        return (
            ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
            if group["amsgrad"]
            else ("exp_avg", "exp_avg_sq")
        )

    def _update(self, batch: Batch, common: StepOptions) -> object:
        beta1, beta1_tensor = _number_or_tensor(batch.group["betas"][0])
        beta2, beta2_tensor = _number_or_tensor(batch.group["betas"][1])
        own = AdamWOptions(
            beta1=beta1,
            beta2=beta2,
            beta1_tensor=beta1_tensor,
            beta2_tensor=beta2_tensor,
            eps=float(batch.group["eps"]),
        )
        return op.selective_adamw_(
            batch.backend,
            batch.params,
            batch.grads,
            batch.state_lists["exp_avg"],
            batch.state_lists["exp_avg_sq"],
            batch.state_lists.get("max_exp_avg_sq", []),
            batch.steps,
            batch.saliency_mins,
            batch.saliency_maxs,
            common=common,
            own=own,
        )


class SelectiveSGD(SelectiveOptimizer):
    """Runs SGD on a random selection of the elements (UEGR, Eq. 7-9 and Algorithm 1 to the letter).

    s = g*g, s~ = normalise(s), p = 1/(1 + exp(2*sharpness*(s~ - threshold))), b ~ Bernoulli(p),
    theta = SGD(theta, b*g/p), in float32 (float64 for float64).

    lr, momentum, dampening, weight_decay, nesterov, maximize, capturable, differentiable  as in
        torch.optim.SGD; weight_decay*theta is added to b*g/p, or, with target="update", to g
    threshold, sharpness  where p is 1/2, in units of s~, and how steep p is there (>= 0)
    normalization  "minmax" | "range" | "rank" (native: by bins) | "constant": keep_probability
    direction  "printed": p falls with saliency | "salient": p rises
    scope  "tensor" | "global": statistics over one tensor, or over all of the groups that say so
    statistics  "current" | "previous": of this step's gradient, or of the one before
    rescale  divide by p;  min_probability  floor of p, at least 2^-24;  keep_probability  in (0, 1]
    target  "gradient": b*g/p feeds the momentum | "update": g does; b/p multiplies SGD's step
    state_dtype  None, or torch.bfloat16: the momentum rounded stochastically
    seed  integer, modulo 2^64; None: from torch's CPU generator (pass one if only some ranks step)
    fused  True: GradScaler's scale and found_inf are handled inside;  foreach  has no effect
    backend  "auto" | "reference" | "cpp" | "cuda" | "triton"

    The state keeps `step`, which numbers the masks. Raises ValueError, TypeError, RuntimeError for
    bad options, when built. Equivalent to `selective.reference.selective_sgd_` and, with
    "constant", to torch.optim.SGD.
    """

    operator = op.selective_sgd_
    numbers = ("momentum", "dampening")
    flags = (*SelectiveOptimizer.flags, "nesterov")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        threshold: float = Selection.threshold,
        sharpness: float = Selection.sharpness,
        normalization: str = Selection.normalization,
        direction: str = Selection.direction,
        scope: str = Selection.scope,
        statistics: str = Selection.statistics,
        rescale: bool = Selection.rescale,
        min_probability: float = Selection.min_probability,
        keep_probability: float = Selection.keep_probability,
        target: str = Selection.target,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        seed: int | None = None,
        backend: str = "auto",
    ):
        own = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(
            params,
            own,
            threshold=threshold,
            sharpness=sharpness,
            normalization=normalization,
            direction=direction,
            scope=scope,
            statistics=statistics,
            rescale=rescale,
            min_probability=min_probability,
            keep_probability=keep_probability,
            target=target,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            state_dtype=state_dtype,
            seed=seed,
            backend=backend,
        )

    def _check(self, group: Mapping[str, Any]) -> None:
        super()._check(group)
        if not group["momentum"] >= 0.0:
            raise ValueError(f"Invalid momentum value: {group['momentum']}")
        if group["dampening"] != group["dampening"]:
            raise ValueError(f"Invalid dampening value: {group['dampening']}")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def _moments(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _update(self, batch: Batch, common: StepOptions) -> object:
        own = SGDOptions(
            momentum=float(batch.group["momentum"]),
            dampening=float(batch.group["dampening"]),
            nesterov=bool(batch.group["nesterov"]),
        )
        return op.selective_sgd_(
            batch.backend,
            batch.params,
            batch.grads,
            batch.state_lists.get("momentum_buffer", []),
            batch.steps,
            batch.saliency_mins,
            batch.saliency_maxs,
            common=common,
            own=own,
        )

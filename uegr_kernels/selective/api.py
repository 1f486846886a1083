"""What users call: the selective optimizers, and the selection by itself."""

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd import forward_ad
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from ..core import checks, memory, shards
from . import op

FORMAT = 1  # of the state's layout; a key of every group
CONSTANT = "p and b are constants; give tensors that are detached, such as grad.detach()"

# backends whose operators check a whole call themselves and take a state in a single tensor
COMPILED = ("cpp", "cuda")
# parameters from which on, and elements a parameter up to which, states share one tensor
SWARM, TINY = 64, 4096
SINGLE = ("step", "saliency_min", "saliency_max")  # states of one value
SHAPE = operator.attrgetter("shape")
KIND = operator.attrgetter("device", "dtype")
GRADIENT = operator.attrgetter("grad")
# of what is kept from step to step: gradients are the user's to free
LEFT_OUT: dict[str, Any] = {"grads": [], "statistics": None}


@dataclasses.dataclass
class _Roster:
    """What a step over a single call found. While all of it is as it was, the next step needs
    no look at every tensor of its own.
    """

    params: list[Tensor]
    keys: list[Tensor]  # of the optimizer's state, and its values
    values: list[dict[str, Any]]
    batch: dict[str, Any]
    empty: list[Tensor]  # parameters without an element, which have no address
    kinds: list[Any]  # and their devices and dtypes
    sizes: list[int] | None  # elements of the parameters, where all are contiguous


class _Packed(NamedTuple):
    """A state of many small parameters in one tensor, which an operator takes in the place of its
    parts.

    Each part has a storage of its own over its piece of the memory, and is saved and copied as
    such.
    """

    whole: Tensor
    parts: list[Tensor]
    addresses: list[int]  # of the parts, as long as they lie there
    single: bool  # parts of one element each, which have one layout

    def stands_for(self, states: list[Tensor]) -> bool:
        """Whether the states are the parts, still where and as they were."""
        same = (
            all(map(operator.is_, states, self.parts))
            and list(map(Tensor.data_ptr, states)) == self.addresses
        )
        return same and (self.single or all(map(Tensor.is_contiguous, states)))


class SelectiveOptimizer(Optimizer):
    """What SelectiveAdamW and SelectiveSGD share: groups, seed, streams, states, checkpoints.
    Not built by itself.
    """

    operator: str
    numbers: tuple[str, ...]  # options of this optimizer's own that are numbers
    fixed: ClassVar[dict[str, Any]] = {}  # what every group has, a loaded one too
    # and that are True or False
    flags: tuple[str, ...] = ("maximize", "capturable", "differentiable", "foreach", "fused")
    _roster: _Roster | None
    _places: memory.Places | None  # of the parameters whose memory was looked at last
    _packed: dict[str, _Packed]  # by key of the state
    _room: dict[Any, Tensor]  # for statistics over a wider scope than a tensor
    # kept minima of which an earlier step made the whole's, so that none need be asked for
    _joined: dict[int, Tensor]

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], *, seed: int | None, backend: str
    ):
        if backend != "auto" and backend not in op.backends.BACKENDS:
            raise ValueError(
                f"backend={backend!r} is not a backend; use one of 'auto', "
                f"{', '.join(map(repr, op.backends.BACKENDS))}"
            )
        if seed is not None:
            seed = checks.signed_seed(seed) % 2**64
        self.backend = backend
        self._roster, self._packed, self._places, self._room, self._joined = None, {}, None, {}, {}
        self._drawn_seed: int | None = None  # drawn here and not agreed on with the other ranks yet
        self._check(defaults)
        super().__init__(params, defaults | {"seed": seed, "format": FORMAT})
        if defaults["fused"]:
            self._step_supports_amp_scaling = True

    def _check(self, group: dict[str, Any]) -> None:
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
            if not isinstance(group[name], Tensor) and abs(checks.plain(group[name])) > 1e300:
                raise ValueError(f"{name}={group[name]} is out of range; give a finite number")
        if not 0.0 <= group["weight_decay"]:
            raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
        if group["fused"] and group["differentiable"]:
            raise RuntimeError("`fused` does not support `differentiable`")
        if group["fused"] and group["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if group["differentiable"] and self.backend not in ("auto", "reference"):
            raise RuntimeError(
                "differentiable=True runs on the reference only, not on "
                f"backend={self.backend!r}; use backend='auto'"
            )
        if group["state_dtype"] not in (None, torch.bfloat16):
            raise ValueError(
                f"state_dtype={group['state_dtype']!r} is not supported; use None or torch.bfloat16"
            )
        _selection(group)

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The group's moment keys, in the operator's order."""
        raise NotImplementedError

    def _line(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group's options that belong to this optimizer's operator alone."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
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
            _selection(group).random or group["state_dtype"] for group in self.param_groups
        ):
            with unset_fake_temporarily():  # a fake tensor has no value to draw
                drawn = int(torch.randint(-(2**63), 2**63 - 1, (), device="cpu"))
            self.defaults["seed"] = self._drawn_seed = drawn % 2**64
        for group in self.param_groups:
            group["seed"] = (self.defaults["seed"] or 0) if group["seed"] is None else group["seed"]

    def _agree_on_seed(self) -> None:
        """Rank 0's drawn seed becomes everyone's, once; a given or loaded one is not sent."""
        drawn, self._drawn_seed = self._drawn_seed, None
        if (
            drawn is not None
            and torch.distributed.is_available()
            and torch.distributed.is_initialized()
        ):
            agreed = [drawn]
            torch.distributed.broadcast_object_list(agreed, src=0)
            self.defaults["seed"] = agreed[0]
            for group in self.param_groups:
                group["seed"] = agreed[0] if group["seed"] == drawn else group["seed"]

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
        a gradient or state of another shape than its parameter and for a bad option. On the meta
        device and under FakeTensorMode the states are made and nothing is computed; fused=True
        refuses the meta device, as torch does.
        """
        with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if torch.compiler.is_compiling():
                self._run(self._traced_batches())
                return loss
            self._agree_on_seed()  # before anything can raise: every rank takes part
            if forward_ad._current_level >= 0:
                self._refuse_tangents()
            if self._step_again():
                return loss
            batches = [
                batch for group, first in self._groups() for batch in self._batches(group, first)
            ]
            self._check_memory(batches)
            for batch in batches:
                self._check_states(batch)
            for batch in batches:
                self._complete_states(batch)
            self._run(batches)
            if (
                len(self.param_groups) == len(batches) == 1
                and batches[0]["backend"] != "reference"
                and not batches[0]["cuts"]
            ):
                self._remember(batches[0])
            return loss

    def _refuse_tangents(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        given = [*params, *(p.grad for p in params if p.grad is not None)]
        checks.refuse_transforms(
            f"the step of {type(self).__name__}", given, "step outside of forward mode"
        )

    def _run(self, batches: list[dict[str, Any]]) -> None:
        if not torch.compiler.is_compiling():
            for batch in batches:
                if batch["params"][0].is_meta:  # nothing to compute; the steps lie on the CPU
                    torch._foreach_add_(batch["step"], 1)
            batches = [batch for batch in batches if not batch["params"][0].is_meta]
        for batch in batches:
            self._localise(batch)
        self._settle_scopes(batches)
        for batch in batches:
            self._update(batch)
            if any(batch["cuts"]):
                self._join_kept(batch)

    def _traced_batches(self) -> list[dict[str, Any]]:
        """The step's batches for torch.compile: it runs `_init_group` in Python, and traces
        what is done with the lists it fills.
        """
        batches = []
        for group, first in self._groups():
            needed = self._needed(group)
            for part in range(self._init_group(group, first, -1)):
                lists: list[list[Any]] = [[] for _ in range(4 + len(needed))]
                self._init_group(group, first, part, *lists)
                params, grads, layout, others, *states = lists
                batch = {
                    "group": group,
                    "selection": op.Selection(*(group[name] for name in op.FIELDS)),
                }
                batch |= {
                    "params": params,
                    "grads": grads,
                    "layout": layout,
                    "statistics": None,
                    "cuts": (),
                    "plan": None,
                    "backend": others[0],
                    "seed": others[1],
                }
                batches.append(batch | dict(zip(needed, states, strict=True)))
        return batches

    def _init_group(self, group: dict[str, Any], first: int, part: int, *lists: list[Any]) -> int:
        """Checks the group, creates its states and fills the lists with its batch `part`.
        Returns how many batches there are.
        """
        batches = self._batches(group, first)
        for batch in batches:
            self._check_states(batch)
        for batch in batches:
            self._complete_states(batch)
        for batch in batches[part : part + 1] if lists else ():
            values = (
                batch["params"],
                batch["grads"],
                batch["layout"],
                [batch["backend"], batch["seed"]],
            )
            for filled, value in zip(
                lists, (*values, *(batch[key] for key in self._needed(group))), strict=True
            ):
                filled += value
        return len(batches)

    def _remember(self, batch: dict[str, Any]) -> None:
        group = batch["group"]
        if len(batch["params"]) == len(group["params"]):
            batch = batch | LEFT_OUT
            empty = [p for p in batch["params"] if p.numel() == 0]
            states = list(self.state.keys()), list(self.state.values())
            params = list(group["params"])
            sizes = (
                list(map(Tensor.numel, params)) if all(map(Tensor.is_contiguous, params)) else None
            )
            self._roster = _Roster(params, *states, batch, empty, list(map(KIND, empty)), sizes)

    def _step_again(self) -> bool:
        """Steps as the last time, with the gradients of now; False, and nothing has changed, where
        anything else differs.

        What the operator would refuse is left to the long way, which has the words for it. Once the
        operator was called nothing is tried again: what it raises, it raises.
        """
        roster = self._roster
        if roster is None:
            return False
        self._roster = None
        group, states = roster.batch["group"], roster.batch["states"]
        pairs = (
            (group["params"], roster.params),
            (self.state.keys(), roster.keys),
            (self.state.values(), roster.values),
        )
        if (
            len(self.param_groups) != 1
            or self.param_groups[0] is not group
            or any(len(now) != len(then) for now, then in pairs)
        ):
            return False
        if not all(all(map(operator.is_, now, then)) for now, then in pairs):
            return False
        if self._places is None or self._places[0] != list(map(Tensor.data_ptr, roster.params)):
            return False
        if roster.sizes is None:
            if self._places[1:] != (
                list(map(SHAPE, roster.params)),
                list(map(Tensor.stride, roster.params)),
            ):
                return False
        elif (
            not all(map(Tensor.is_contiguous, roster.params))
            or list(map(Tensor.numel, roster.params)) != roster.sizes
        ):
            # contiguous ones of as many elements are stepped alike, whatever their shape
            return False
        needed, grads = self._needed(group), list(map(GRADIENT, roster.params))
        try:
            addresses = list(map(Tensor.data_ptr, grads))  # that of freed memory is 0
            found = {key: list(map(operator.itemgetter(key), states)) for key in needed}
        except (RuntimeError, TypeError, KeyError):  # a sparse gradient, or none, has no address
            return False
        if addresses.count(0) != len(roster.empty) or list(map(KIND, roster.empty)) != roster.kinds:
            return False
        if not found.keys() <= roster.batch.keys():
            return False
        self._check(group)
        batch = self._new_batch(group, roster.params[0].device, roster.params[0].dtype)
        if batch["backend"] != roster.batch["backend"]:
            return False
        batch |= {
            "params": roster.params,
            "grads": grads,
            "states": states,
            "layout": roster.batch["layout"],
            "plan": roster.batch["plan"],
        }
        for key, now in found.items():
            packed = self._packed.get(key)
            if packed is not None and packed.stands_for(now):
                batch[key] = [packed.whole]
            elif all(map(operator.is_, now, roster.batch[key])):
                batch[key] = now
            else:
                return False
        self._settle_scopes([batch])
        self._update(batch)
        roster.batch = batch | LEFT_OUT
        self._roster = roster
        return True

    def _groups(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Every group with the stream of its first parameter: streams number the parameters
        across groups, gradient or not.
        """
        first = 0
        for group in self.param_groups:
            yield group, first
            first += len(group["params"])

    def _batches(self, group: dict[str, Any], first: int) -> list[dict[str, Any]]:
        """The group's parameters that have a gradient, by device and dtype; raises what cannot
        be stepped, and changes nothing.
        """
        self._check(group)
        batches: dict[tuple[torch.device, torch.dtype], dict[str, Any]] = {}
        device: Any = None
        dtype = batch = None
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
                _check_parameter(stream, p, grad)
                if batch is None:
                    batch = batches[device, dtype] = self._new_batch(group, device, dtype)
            batch["params"].append(p)
            batch["grads"].append(grad)
            batch["states"].append(state)
            n = p.numel()
            batch["layout"] += (
                stream,
                *(shards.layout(f"parameter {stream}", p) if shards.sharded(p) else (0, n, n)),
            )
        return list(batches.values())

    def _new_batch(
        self, group: dict[str, Any], device: torch.device, dtype: torch.dtype
    ) -> dict[str, Any]:
        backend = (
            "reference"
            if group["differentiable"]
            else op.choose(self.operator, self.backend, device, dtype)
        )
        if group["fused"] and device.type == "meta":
            raise RuntimeError(
                "`fused=True` requires all the params to be floating point Tensors of supported "
                f"devices: ['cpu', 'cuda'] but {dtype} "
                "and meta"
            )
        return {
            "group": group,
            "selection": _selection(group),
            "backend": backend,
            "seed": checks.signed_seed(group["seed"]),
            "statistics": None,
            "cuts": (),
            "plan": None,
            "params": [],
            "grads": [],
            "states": [],
            "layout": [],
        }

    def _check_states(self, batch: dict[str, Any]) -> None:
        """Raises a gradient or a state that does not fit its parameter: every tensor of every
        call, before the first one is stepped.
        """
        needed, moments = self._needed(batch["group"]), self._moments(batch["group"])
        for i, (p, grad, state) in enumerate(
            zip(batch["params"], batch["grads"], batch["states"], strict=True)
        ):
            stream = batch["layout"][4 * i]
            if grad.shape != p.shape or 0 in p.stride():
                _check_parameter(stream, p, grad)
            memory.check_there(f"parameter {stream}", p)
            memory.check_there(f"parameter {stream}'s gradient", grad)
            for key in needed if state else ():
                if key in state:
                    _check_state(stream, key, state[key], p, key in moments)

    def _check_memory(self, batches: list[dict[str, Any]]) -> None:
        """Raises parameters that share memory. Where all addresses are those of the last time,
        none needs a look.
        """
        parts = [shards.local(p) for batch in batches for p in batch["params"]]
        found = memory.places(parts)
        if found == self._places:
            return
        streams = [stream for batch in batches for stream in batch["layout"][::4]]
        for stream, p in zip(streams, parts, strict=True):
            if memory.overlaps_itself(p):
                how = "is expanded" if _expanded(p) else "overlaps itself"
                raise ValueError(
                    f"parameter {stream} {how}: its elements share memory and cannot "
                    "be written; call .clone() on it first"
                )
        pair = memory.shared(parts)
        if pair:
            first, second = sorted(streams[i] for i in pair)
            raise ValueError(
                f"parameters {first} and {second} share memory, so that a step would change it "
                "twice; pass one of them, "
                "or give the other a .clone() of its own"
            )
        self._places = found

    def _needed(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The keys of a parameter's state."""
        kept = ("saliency_min", "saliency_max") if group["statistics"] == "previous" else ()
        return ("step", *self._moments(group), *kept)

    def _complete_states(self, batch: dict[str, Any]) -> None:
        """Creates what a parameter's state lacks, and lists the states."""
        group, params = batch["group"], batch["params"]
        states = batch["states"] = [
            state if state else self.state[p]
            for p, state in zip(params, batch["states"], strict=True)
        ]
        for key in self._needed(group):
            # what is there (a checkpoint's, a hook's) is left alone
            lacking = [i for i, state in enumerate(states) if key not in state]
            if (
                len(lacking) == len(params) >= SWARM
                and len(self.param_groups) == 1
                and batch["backend"] in COMPILED
            ):
                real = not isinstance(params[0], FakeTensor) and not op.backends.traced()
                if real and all(
                    p.numel() <= TINY and p.is_contiguous() and not shards.sharded(p)
                    for p in params
                ):
                    self._pack_states(key, batch)
                    continue
            for i in lacking:
                states[i][key] = self._fresh_state(key, params[i], group)
            if key == "step" and params[0].is_cuda:  # one found on the CPU, after a load, moves
                for state in states:
                    state[key] = state[key].to(params[0].device)
            batch[key] = [state[key] for state in states]

    def _pack_states(self, key: str, batch: dict[str, Any]) -> None:
        """Creates a state of many small parameters in one tensor, each with a storage of its
        own there.
        """
        params = batch["params"]
        value, dtype, device = self._start(key, params[0], batch["group"])
        shapes = [() if key in SINGLE else p.shape for p in params]
        sizes = list(map(math.prod, shapes))
        whole = torch.full((sum(sizes),), value, dtype=dtype, device=device)
        parts = [part.view(shape) for part, shape in zip(whole.split(sizes), shapes, strict=True)]
        for state, part in zip(batch["states"], parts, strict=True):
            # Views, whose version is the whole's. By DLPack they pass for another library's
            # tensors, whose storage ends with them. Of an alias: a tensor that its own storage
            # holds would never end.
            part.data = from_dlpack(to_dlpack(part.detach()))
            state[key] = part
        batch[key] = [whole]
        self._packed[key] = _Packed(
            whole, parts, list(map(Tensor.data_ptr, parts)), len(whole) == len(parts)
        )

    def _fresh_state(self, key: str, p: Tensor, group: dict[str, Any]) -> Tensor:
        value, dtype, device = self._start(key, p, group)
        if key in SINGLE:
            return torch.full((), value, dtype=dtype, device=device)
        return torch.full_like(
            p, value, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False
        )

    def _start(
        self, key: str, p: Tensor, group: dict[str, Any]
    ) -> tuple[float, torch.dtype, torch.device | str]:
        """The value a state starts from, its dtype and its device."""
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        if key == "step":
            return 0.0, torch.float32, p.device if p.is_cuda else "cpu"
        if key.startswith("saliency"):
            return torch.nan, wide, p.device  # nothing kept yet
        # -0.0 marks a momentum buffer that has seen nothing; to a moment of AdamW it is 0.
        return -0.0 if key == "momentum_buffer" else 0.0, group["state_dtype"] or wide, p.device

    def _localise(self, batch: dict[str, Any]) -> None:
        """Puts this process's parts in the place of sharded tensors."""
        params = batch["params"]
        if not any(map(shards.sharded, params)):
            return
        batch["cuts"], batch["sizes"] = [shards.cut(p) for p in params], [p.numel() for p in params]
        batch["grads"] = [
            shards.alike(grad, p) for p, grad in zip(params, batch["grads"], strict=True)
        ]
        written = ("params", *self._needed(batch["group"]))
        batch["wholes"] = [t for key in written for t in batch[key] if shards.sharded(t)]
        for key in ("grads", *written):
            batch[key] = [shards.local(t) for t in batch[key]]

    def _settle_scopes(self, batches: list[dict[str, Any]]) -> None:
        """Hands the batches the statistics that their operator cannot take alone: over all of a
        "global" scope, or over the whole of tensors that other processes hold parts of.
        """
        scopes: dict[str, dict[shards.Cut, list[dict[str, Any]]]] = {}
        members = [batch for batch in batches if batch["selection"].normalization != "constant"]
        for batch in members:
            normalization = batch["selection"].normalization
            if batch["selection"].scope == "global":
                cuts = scopes.setdefault(normalization, {})
                for cut, chosen, part in self._parts(batch):
                    cuts.setdefault(self._to_ask(batch, cut, chosen), []).append(part)
            elif any(batch["cuts"]):
                rows = op.no_statistics(
                    len(batch["params"]), normalization, batch["params"][0].device
                )
                for cut, chosen, part in self._parts(batch):
                    ask = self._to_ask(batch, cut, chosen)
                    rows[chosen] = op.scope_statistics(
                        [part], normalization, rows=len(chosen), cut=ask, room={}
                    )
                batch["statistics"] = rows
        room = {} if torch.compiler.is_compiling() else self._room
        joined = {
            normalization: op.joint_statistics(cuts, normalization, room)
            for normalization, cuts in scopes.items()
        }
        for batch in members:
            if batch["selection"].scope == "global":
                batch["statistics"] = joined[batch["selection"].normalization].to(
                    batch["params"][0].device
                )

    def _to_ask(self, batch: dict[str, Any], cut: shards.Cut, chosen: list[int]) -> shards.Cut:
        """The processes whose statistics are needed ahead of the update: none where what was
        kept is already that of the whole.
        """
        kept = self._kept(batch)
        return (
            ()
            if kept and all(self._joined.get(id(kept[0][i])) is kept[0][i] for i in chosen)
            else cut
        )

    def _parts(
        self, batch: dict[str, Any]
    ) -> Iterator[tuple[shards.Cut, list[int], dict[str, Any]]]:
        """The batch's tensors by how they are cut: the cut, which they are, and what
        op.scope_statistics takes.
        """
        cuts = batch["cuts"] or [()] * len(batch["params"])
        for cut in dict.fromkeys(cuts):
            chosen = [i for i, other in enumerate(cuts) if other == cut]
            whole = len(chosen) == len(cuts)

            def pick(
                values: list[Any], chosen: list[int] = chosen, whole: bool = whole
            ) -> list[Any]:
                return values if whole else [values[i] for i in chosen]

            kept = self._kept(batch)
            yield (
                cut,
                chosen,
                {
                    "backend": batch["backend"],
                    "grads": pick(batch["grads"]),
                    "saliencies": [],
                    "layout": batch["layout"]
                    if whole
                    else [n for i in chosen for n in batch["layout"][4 * i : 4 * i + 4]],
                    "sizes": pick(batch["sizes"]) if cut else [],
                    "grad_scale": getattr(self, "grad_scale", None),
                    "kept": kept and tuple(map(pick, kept)),
                },
            )

    def _join_kept(self, batch: dict[str, Any]) -> None:
        """Makes what was kept of every process's part that of the whole."""
        torch.autograd.graph.increment_version(batch["wholes"])
        kept = self._kept(batch)
        if kept is None:
            return
        for cut, chosen, _ in self._parts(batch):
            pairs = torch.stack([torch.stack([values[i] for i in chosen]) for values in kept], 1)
            shards.join_(pairs, cut)
            for values, joined in zip(kept, pairs.unbind(1), strict=True):
                torch._foreach_copy_([values[i] for i in chosen], list(joined.unbind()))
        if getattr(self, "found_inf", None) is None:  # else a first step may have kept nothing
            self._joined |= {id(value): value for value in kept[0]}

    def _kept(self, batch: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]] | None:
        return (batch["saliency_min"], batch["saliency_max"]) if "saliency_min" in batch else None

    def _update(self, batch: dict[str, Any]) -> None:
        group, device = batch["group"], batch["params"][0].device
        lr = group["lr"]
        scale, found = (
            None if t is None else t.to(device)
            for t in (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        )
        batch["plan"] = op.call(
            self.operator,
            batch["backend"],
            batch["params"],
            batch["grads"],
            *self._lists(batch),
            batch["step"],
            *(self._kept(batch) or ([], [])),
            plan=batch["plan"],
            scope_statistics=batch["statistics"],
            layout=batch["layout"],
            grad_scale=scale,
            found_inf=found,
            lr=0.0 if isinstance(lr, Tensor) else float(lr),
            lr_tensor=lr if isinstance(lr, Tensor) else None,
            weight_decay=float(group["weight_decay"]),
            maximize=bool(group["maximize"]),
            seed=batch["seed"],
            selection=batch["selection"],
            **self._line(group),
        )

    def _lists(self, batch: dict[str, Any]) -> list[list[Tensor]]:
        """The operator's lists of moments; one the group does not use is empty."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this optimizer or of torch's; keys its groups lack keep the value
        of the group they replace.

        Raises ValueError for a format newer than this version's, before anything has changed.
        """
        loaded: dict[str, Any] = {}

        def complete(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
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
            if len(groups) == len(keep):  # else the base class says so
                groups = [
                    kept | saved | self.fixed for kept, saved in zip(keep, groups, strict=True)
                ]
            return state_dict | {"param_groups": groups}

        def restore(optimizer: Optimizer) -> None:
            # torch.optim.SGD keeps a buffer of None where it has no momentum
            for state in self.state.values():
                for key in [key for key, value in state.items() if value is None]:
                    del state[key]
            # The base class casts every state to the parameter's dtype; take the checkpoint's own
            # values again.
            saved_ids = [i for group in loaded["param_groups"] for i in group["params"]]
            params = [(p, group) for group in self.param_groups for p in group["params"]]
            for i, (p, group) in zip(saved_ids, params, strict=True):
                for key, value in loaded["state"].get(i, {}).items():
                    if isinstance(value, Tensor) and value.is_floating_point() and key != "step":
                        if key == "momentum_buffer" and "step" not in loaded["state"][i]:
                            value = value + 0.0  # torch's: a -0.0 in it has seen a gradient
                        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
                        dtype = wide if key.startswith("saliency") else group["state_dtype"] or wide
                        self.state[p][key] = value.to(dtype=dtype, device=p.device)
            if any("seed" in group for group in loaded["param_groups"]):
                self._drawn_seed, self.defaults["seed"] = None, self.param_groups[0]["seed"]

        handles = (
            self.register_load_state_dict_pre_hook(complete),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def __repr__(self) -> str:
        first, *groups = super().__repr__().split("\n", 1)
        return "\n".join((first, f"backend: {self.backend}", *groups))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"backend": self.backend, "_drawn_seed": self._drawn_seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._roster, self._packed, self._places, self._room, self._joined = None, {}, None, {}, {}
        for group in self.param_groups:
            for p in group["params"]:
                p_state = self.state.get(p) or {}
                if "step" in p_state:
                    step = torch.as_tensor(p_state["step"], dtype=torch.float32)
                    p_state["step"] = step.to(p.device if p.is_cuda else "cpu")
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

    operator = "selective_adamw_"
    numbers = ("eps",)
    # As torch.optim.Adam names it, so that each loads the other's checkpoints; one of Adam's goes
    # on with decoupled decay.
    fixed: ClassVar[dict[str, Any]] = {"decoupled_weight_decay": True}
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
        threshold: float = 0.8,
        sharpness: float = 5.0,
        normalization: str = "minmax",
        direction: str = "printed",
        scope: str = "tensor",
        statistics: str = "current",
        rescale: bool = True,
        min_probability: float = 0.0,
        keep_probability: float = 1.0,
        target: str = "gradient",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        seed: int | None = None,
        backend: str = "auto",
    ):
        defaults = {
            k: v
            for k, v in locals().items()
            if k not in ("self", "params", "seed", "backend", "__class__")
        }
        super().__init__(params, defaults | self.fixed, seed=seed, backend=backend)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas={betas!r} is no pair of numbers; give (beta1, beta2)")
        for beta in betas:
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
                        f"betas[{i}] as a Tensor is not supported for "
                        "capturable=False and foreach=True"
                    )
                if betas[i].numel() != 1:
                    raise ValueError(f"Tensor betas[{i}] must be 1-element")

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return (
            ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
            if group["amsgrad"]
            else ("exp_avg", "exp_avg_sq")
        )

    def _lists(self, batch: dict[str, Any]) -> list[list[Tensor]]:
        return [batch["exp_avg"], batch["exp_avg_sq"], batch.get("max_exp_avg_sq", [])]

    def _line(self, group: dict[str, Any]) -> dict[str, Any]:
        numbers, tensors = zip(
            *(
                (0.0, beta) if isinstance(beta, Tensor) else (float(beta), None)
                for beta in group["betas"]
            ),
            strict=True,
        )
        named = {
            "beta1": numbers[0],
            "beta2": numbers[1],
            "beta1_tensor": tensors[0],
            "beta2_tensor": tensors[1],
        }
        return named | {"eps": float(group["eps"])}


class SelectiveSGD(SelectiveOptimizer):
    """Runs SGD on a random selection of the elements (UEGR, Eq. 7-9 and Algorithm 1 to the letter).

    lr, momentum, dampening, weight_decay, nesterov  as in torch.optim.SGD; the keyword part as in
        SelectiveAdamW

    s and b act on the raw gradient; weight_decay*theta is added to b*g/p (target "gradient") or to
    g ("update"), then momentum. The state keeps `step` beside `momentum_buffer`: the masks are
    numbered by it. Raises ValueError, TypeError, RuntimeError for bad options, at
    construction. Equivalent to `selective.reference.selective_sgd_` and, with
    normalization="constant", to torch.optim.SGD.
    """

    operator = "selective_sgd_"
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
        threshold: float = 0.8,
        sharpness: float = 5.0,
        normalization: str = "minmax",
        direction: str = "printed",
        scope: str = "tensor",
        statistics: str = "current",
        rescale: bool = True,
        min_probability: float = 0.0,
        keep_probability: float = 1.0,
        target: str = "gradient",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        seed: int | None = None,
        backend: str = "auto",
    ):
        defaults = {
            k: v
            for k, v in locals().items()
            if k not in ("self", "params", "seed", "backend", "__class__")
        }
        super().__init__(params, defaults, seed=seed, backend=backend)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if not group["momentum"] >= 0.0:
            raise ValueError(f"Invalid momentum value: {group['momentum']}")
        if group["dampening"] != group["dampening"]:
            raise ValueError(f"Invalid dampening value: {group['dampening']}")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _lists(self, batch: dict[str, Any]) -> list[list[Tensor]]:
        return [batch.get("momentum_buffer", [])]

    def _line(self, group: dict[str, Any]) -> dict[str, Any]:
        return {
            "momentum": float(group["momentum"]),
            "dampening": float(group["dampening"]),
            "nesterov": bool(group["nesterov"]),
        }


def select_gradients_(
    params: Tensor | Sequence[Tensor],
    *,
    seed: int,
    step: int,
    saliency: Sequence[Tensor] | None = None,
    threshold: float = 0.8,
    sharpness: float = 5.0,
    normalization: str = "minmax",
    direction: str = "printed",
    scope: str = "tensor",
    statistics: str = "current",
    rescale: bool = True,
    min_probability: float = 0.0,
    keep_probability: float = 1.0,
    target: str = "gradient",
    backend: str = "auto",
) -> None:
    """Selects the gradients in place, g <- b*g/p (Eq. 7-9), for any other optimizer to step with.

    params  tensors whose .grad is selected; one without a gradient is passed over. A parameter's
        stream is its position
    seed, step  integers: the mask depends on them, the stream and the element alone; step from 1,
        below 2^24
    saliency  a tensor s >= 0 for every parameter, of its shape, in the place of g*g (an accumulated
        Fisher estimate); None: g*g
    The selection options are SelectiveAdamW's; statistics="previous" and target="update" need an
    optimizer. normalization="rank" is exact on the reference; native backends rank by bins of |g|'s
    upper 16 bits, and by samples above 2^20 elements (help(SelectiveAdamW)). Raises, before
    anything has changed: ValueError for a bad option, shape or overlapping gradient, TypeError for
    a dtype, RuntimeError for a sparse gradient. Equivalent to
    `selective.reference.select_gradients_`.
    """
    options = {k: v for k, v in locals().items() if k in op.FIELDS}
    selection = _stateless(options)
    params = [params] if isinstance(params, Tensor) else list(params)
    seed, step = checks.signed_seed(seed), checks.integer("step", step, 0, bits=24)
    if saliency is not None and len(saliency) != len(params):
        raise ValueError(
            f"saliency has {len(saliency)} tensors for {len(params)} parameters; give "
            "one for every parameter"
        )
    parts: dict[tuple[torch.device, torch.dtype], dict[str, Any]] = {}
    for stream, p in enumerate(params):
        if not isinstance(p, Tensor):
            raise TypeError(f"params[{stream}] is a {type(p).__name__}; give tensors")
        if p.grad is None:
            continue
        s = None if saliency is None else saliency[stream]
        if s is None and saliency is not None:
            raise TypeError(
                f"saliency[{stream}] is None; give a tensor for every parameter that has a gradient"
            )
        _check_gradient("select_gradients_", f"params[{stream}].grad", p.grad, s)
        if _expanded(p.grad):
            raise ValueError(
                f"params[{stream}].grad is expanded: its elements share memory and cannot be "
                "written; call .clone() on it first"
            )
        key = p.grad.device, p.grad.dtype
        new: dict[str, Any] = {
            "backend": None,
            "grads": [],
            "saliencies": [],
            "layout": [],
            "sizes": [],
            "grad_scale": None,
            "kept": None,
        }
        part = parts.setdefault(key, new)
        part["backend"] = part["backend"] or op.choose("select_gradients_", backend, *key)
        part["grads"].append(p.grad)
        part["saliencies"] += [] if s is None else [s]
        part["layout"] += (stream, 0, p.numel(), p.numel())
    if not parts:
        return
    shared = None
    with torch.no_grad():
        if scope == "global" and normalization != "constant":
            shared = op.joint_statistics({(): list(parts.values())}, normalization, {})
        for (device, _), part in parts.items():
            over = None if shared is None else shared.to(device)
            lists = part["grads"], part["saliencies"]
            op.call(
                "select_gradients_",
                part["backend"],
                *lists,
                scope_statistics=over,
                layout=part["layout"],
                step=step,
                seed=seed,
                selection=selection,
            )


def selection_probability(
    grad: Tensor,
    *,
    saliency: Tensor | None = None,
    threshold: float = 0.8,
    sharpness: float = 5.0,
    normalization: str = "minmax",
    direction: str = "printed",
    scope: str = "tensor",
    statistics: str = "current",
    rescale: bool = True,
    min_probability: float = 0.0,
    keep_probability: float = 1.0,
    target: str = "gradient",
    backend: str = "auto",
) -> Tensor:
    """Computes the probability p with which each element of a gradient is selected (Eq. 7-9).

    grad  any shape; float32, bfloat16, float16, float64;  saliency  s >= 0 of the same shape in the
        place of g*g
    The selection options are SelectiveAdamW's; on one tensor scope="global" equals "tensor".
    normalization="rank" is exact on the reference; native backends rank by bins of |g|'s upper 16
    bits, and by samples above 2^20 elements (help(SelectiveAdamW)). Returns p in [2^-24, 1], of
    grad's shape, float32 (float64 for float64); 1 where grad is not finite. Raises ValueError,
    TypeError, RuntimeError as select_gradients_. Equivalent to
    `selective.reference.selection_probability_`.
    """
    selection = _stateless({k: v for k, v in locals().items() if k in op.FIELDS})
    _check_gradient("selection_probability", "grad", grad, saliency)
    chosen = op.choose("selection_probability_", backend, grad.device, grad.dtype)
    with torch.no_grad():
        out = torch.empty(
            grad.shape,
            dtype=torch.float64 if grad.dtype == torch.float64 else torch.float32,
            device=grad.device,
        )
        op.call(
            "selection_probability_", chosen, grad.detach(), saliency, out=out, selection=selection
        )
    return out


def selection_mask(
    grad: Tensor,
    *,
    seed: int,
    step: int,
    stream: int = 0,
    saliency: Tensor | None = None,
    threshold: float = 0.8,
    sharpness: float = 5.0,
    normalization: str = "minmax",
    direction: str = "printed",
    scope: str = "tensor",
    statistics: str = "current",
    rescale: bool = True,
    min_probability: float = 0.0,
    keep_probability: float = 1.0,
    target: str = "gradient",
    backend: str = "auto",
) -> Tensor:
    """Draws which elements of a gradient are selected, b ~ Bernoulli(p) (Eq. 9), from Philox.

    grad  any shape; float32, bfloat16, float16, float64;  saliency  s >= 0 of the same shape in the
        place of g*g
    seed  any integer, modulo 2^64;  step  from 1, below 2^24;  stream  the parameter's number, in
        [0, 2^32)
    The selection options are SelectiveAdamW's; on one tensor scope="global" equals "tensor".
    normalization="rank" is exact on the reference; native backends rank by bins of |g|'s upper 16
    bits, and by samples above 2^20 elements (help(SelectiveAdamW)). Returns a bool tensor of grad's
    shape. Raises ValueError, TypeError, RuntimeError as select_gradients_. Equivalent to
    `selective.reference.selection_mask_`.
    """
    selection = _stateless({k: v for k, v in locals().items() if k in op.FIELDS})
    _check_gradient("selection_mask", "grad", grad, saliency)
    seed, step = checks.signed_seed(seed), checks.integer("step", step, 0, bits=24)
    stream = checks.integer("stream", stream, 0, bits=32)
    chosen = op.choose("selection_mask_", backend, grad.device, grad.dtype)
    with torch.no_grad():
        out = torch.empty(grad.shape, dtype=torch.bool, device=grad.device)
        layout = [stream, 0, grad.numel(), grad.numel()]
        op.call(
            "selection_mask_",
            chosen,
            grad.detach(),
            saliency,
            out=out,
            layout=layout,
            step=step,
            seed=seed,
            selection=selection,
        )
    return out


def _selection(group: dict[str, Any]) -> op.Selection:
    options = [group[name] for name in op.FIELDS]
    try:
        return op.make_selection(*options)
    except TypeError:  # an option that cannot be hashed: the class itself names it
        return op.Selection(*options)


def _stateless(options: dict[str, Any]) -> op.Selection:
    selection = op.Selection(**options)
    for name, only in (("statistics", "current"), ("target", "gradient")):
        if options[name] != only:
            raise ValueError(
                f"{name}={options[name]!r} needs an optimizer's state; use "
                f"{name}={only!r}, or SelectiveAdamW or SelectiveSGD"
            )
    return selection


def _check_gradient(function: str, name: str, grad: Tensor, saliency: Tensor | None) -> None:
    if not isinstance(grad, Tensor):
        raise TypeError(f"{name} is a {type(grad).__name__}; give a tensor")
    if shards.sharded(grad):
        raise TypeError(
            f"{name} is a DTensor, whose parts this function does not join; use an "
            "optimizer, or call full_tensor() on it"
        )
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"{name} is sparse ({grad.layout}), which is not supported; call "
            ".to_dense() on it first"
        )
    if grad.dtype not in checks.DTYPES:
        raise TypeError(f"{name} is {grad.dtype}; give float32, bfloat16, float16 or float64")
    tensors = [grad] if saliency is None else [grad, saliency]
    checks.refuse_transforms(function, [], CONSTANT, constants=tensors)
    if saliency is not None:
        if (
            not isinstance(saliency, Tensor)
            or saliency.dtype not in checks.DTYPES
            or saliency.layout is not torch.strided
        ):
            raise TypeError(
                f"the saliency of {name} is no dense floating-point tensor; give "
                "float32, bfloat16, float16 or float64"
            )
        if saliency.shape != grad.shape or saliency.device != grad.device:
            found = f"{tuple(saliency.shape)} on {saliency.device}"
            raise ValueError(
                f"the saliency of {name} has shape {found}; it must be "
                f"{tuple(grad.shape)} on {grad.device}"
            )


def _check_parameter(stream: int, p: Tensor, grad: Tensor) -> None:
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"parameter {stream} has a sparse gradient ({grad.layout}), which is not supported; "
            "call .to_dense() on it first"
        )
    if p.dtype not in checks.DTYPES or grad.dtype not in checks.DTYPES:
        raise TypeError(
            f"parameter {stream} is {p.dtype} with a gradient of {grad.dtype}: complex "
            "and integer tensors are not supported"
        )
    if shards.sharded(p) != shards.sharded(grad):
        raise TypeError(
            f"parameter {stream} is a {type(p).__name__} and its gradient a {type(grad).__name__}; "
            "make both DTensors, or neither"
        )
    if grad.shape != p.shape:
        raise ValueError(
            f"parameter {stream} has shape {tuple(p.shape)} but its gradient "
            f"{tuple(grad.shape)}; they must be equal"
        )
    if _expanded(p):
        raise ValueError(
            f"parameter {stream} is expanded: its elements share memory and cannot be "
            "written; call .clone() on it first"
        )


def _check_state(stream: int, key: str, value: Tensor, p: Tensor, moment: bool) -> None:
    """Raises a moment that is not as its parameter, or a count or statistic that is not one
    value.
    """
    named = f"parameter {stream}'s state {key!r}"
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{named} is a {type(value).__name__}; give a tensor, or delete the parameter's state"
        )
    if value.layout is not torch.strided or value.dtype not in checks.DTYPES:
        raise TypeError(
            f"{named} is {value.dtype}, {value.layout}; give a dense tensor of floating point"
        )
    if value.device != p.device and (key != "step" or value.device.type != "cpu"):
        raise ValueError(
            f"{named} is on {value.device}, the parameter on {p.device}; move it with .to()"
        )
    if moment and value.shape != p.shape:
        raise ValueError(
            f"parameter {stream} has shape {tuple(p.shape)} but its {key} "
            f"{tuple(value.shape)}; they must be equal"
        )
    if not moment and value.numel() != 1:
        raise ValueError(f"{named} has shape {tuple(value.shape)}; give one value")
    memory.check_there(named, value)
    if (
        key == "step"
        and value.device.type == "cpu"
        and not isinstance(value, torch._subclasses.FakeTensor)
    ):
        if not 0 <= value.item() < 2**24 - 1:
            raise ValueError(
                f"{named} is {value.item()}; give the number of steps taken, from 0 to 2^24 - 2"
            )
    if 0 in value.stride() and _expanded(value):
        raise ValueError(
            f"{named} is expanded: its elements share memory and cannot be written; "
            "call .clone() on it first"
        )


def _expanded(tensor: Tensor) -> bool:
    return any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )

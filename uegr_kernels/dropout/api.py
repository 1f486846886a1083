"""The public dropout module, and a function that puts it in the place of a model's dropouts."""

import fnmatch
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import checks
from . import op

STATE = ("gradient_norm", "pending")
SIZED = (
    "an AdaptiveDropout has its size from the first input; give num_features, or call it once "
    "before torch.compile(fullgraph=True)"
)
# [rows, units], [rows, places, units]; what has more is a map or attention's probabilities
MOST_AXES = 3


class AdaptiveDropout(nn.Module):
    """Drops units with large gradients more often: r_j = clamp(p * n_j / mean(n), 0, max_p).

    n_j is the moving average of the L2 norm of dL/dh_j over all other axes, h being the output and
    j an index of its last axis. Kept units are scaled by 1/(1 - r_j); r_j = p until a gradient has
    been seen; in eval mode the module is the identity.

    num_features  size of the last axis; None: taken from the first input, or from a state_dict
    p             mean rate, in [0, 1]; may be set at any time
    max_p         in [0, 1], the largest rate of a unit with a gradient norm
    momentum      in [0, 1): n = momentum * n + (1 - momentum) * new; the first one seen sets n
    backend       "auto", "reference", "cpp", "cuda" or "triton"

    Inputs [..., F]: float32, bfloat16, float16 or float64. One of four axes or more has no units
    and gets the plain rate p; so does, with one warning, a module whose F changes, from then on.
    State, float32 (float64 for float64): gradient_norm [F], n; pending [F], squares of norms, which
    the next call outside a backward folds into n. It is extra state of a state_dict, which may lack
    it, and no buffers; each rank of DDP or FSDP has its own. Norms that are not finite are dropped.
    Draws its key as nn.Dropout does, from torch's default generator of the input's device. Raises
    TypeError or ValueError for wrong arguments and inputs, RuntimeError for a backend that cannot
    serve the call, second and forward-mode derivatives, and torch.func's transforms. Equivalent to
    `reference.adaptive_dropout(h, reference.dropout_rates_(gradient_norm, pending, ...), key,
    pending)`.
    """

    gradient_norm: Tensor
    pending: Tensor

    def __init__(
        self,
        num_features: int | None = None,
        p: float = 0.3,
        *,
        max_p: float = 0.9,
        momentum: float = 0.9,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        checked = _checked(num_features, p, max_p, momentum, backend)
        self.num_features, self.p = checked.num_features, checked.p
        self.max_p, self.momentum = checked.max_p, checked.momentum
        self.backend = backend
        # in a model, for the warning
        self._name = ""
        # empty until the size is known
        self._make(self.num_features or 0, torch.float32, None)

    def forward(self, input: Tensor) -> Tensor:
        """Drops units of the input, in training mode."""
        if not self.training:
            return input
        checks.axes("input", input, "[..., F]")
        backend = op.adaptive_dropout.choose(self.backend, input.device, input.dtype)
        if input.dim() > MOST_AXES or not self._ready(input):
            return F.dropout(input, self.p)
        # A call inside a backward is a recompute, which has to find the rates of its forward.
        fold = torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1
        norm = self.gradient_norm
        # the same operator on norms of 0: a recompute may be of the call before
        if self._plain:
            norm, fold = torch.zeros_like(norm), False
        key = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=input.device)
        return op.dropped(
            input,
            norm,
            self.pending,
            key,
            p=float(self.p),
            max_p=float(self.max_p),
            momentum=float(self.momentum),
            fold=fold,
            backend=backend,
        )

    def reset_parameters(self) -> None:
        """Forgets the gradients seen and the widths met, as if the module were new."""
        self._make(self.num_features or 0, self.gradient_norm.dtype, self.gradient_norm.device)

    def get_extra_state(self) -> Tensor:
        """Returns the state, [3, F]: gradient_norm, pending, and ones where the rate is plain,
        else zeros.
        """
        norm, pending = self.gradient_norm, self.pending
        # nothing was seen there, and a checkpoint wants values
        if norm.is_meta:
            norm = pending = torch.zeros_like(norm, device="cpu")
        return torch.stack((norm, pending, torch.full_like(norm, float(self._plain))))

    def set_extra_state(self, state: Tensor) -> None:
        """Copies what `get_extra_state` gave to where the module is; ValueError where it does
        not fit.
        """
        reason = self._why_not(state)
        if reason is not None:
            raise ValueError(reason)
        norm, units = self.gradient_norm, state.shape[1] or self.num_features or 0
        dtype = torch.promote_types(norm.dtype, state.dtype)
        device = state.device if norm.is_meta else norm.device
        seen = bool(state.shape[1]) and not state.is_meta
        if not seen or (units, dtype, device) != (len(norm), norm.dtype, norm.device):
            self._make(units, dtype, device)
        if seen:
            self.gradient_norm.copy_(state[0].detach())
            self.pending.copy_(state[1].detach())
            self._used, self._plain = bool(state.any()), bool(state[2].any())

    def _why_not(self, state: object) -> str | None:
        """Returns None where `set_extra_state` takes the state, else why not."""
        if (
            not isinstance(state, Tensor)
            or state.dim() != 2
            or len(state) != 3
            or not state.is_floating_point()
        ):
            return (
                "the extra state of an AdaptiveDropout is a floating tensor [3, F], and this "
                f"is {state!r:.80}"
            )
        if self.num_features is not None and state.shape[1] not in (0, self.num_features):
            found = f"{state.shape[1]} units in the state, num_features={self.num_features} here"
            return f"size mismatch for gradient_norm: {found}"
        return None

    def _make(self, units: int, dtype: torch.dtype, device: torch.device | None) -> None:
        """Makes the state of a module that has seen nothing."""
        # what is made inside it cannot be written in training
        with torch.inference_mode(False):
            self.gradient_norm = torch.zeros(units, dtype=dtype, device=device)
            self.pending = torch.zeros(units, dtype=dtype, device=device)
        self._used = self._plain = False

    def _move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Moves the state to where fn puts a tensor, its values kept; from the meta device they are
        zeros.
        """
        with torch.inference_mode(False), torch.no_grad():
            for name in STATE:
                old = getattr(self, name)
                new = fn(old)
                # squares do not fit 16 bits
                if new.dtype not in (torch.float32, torch.float64):
                    new = torch.empty_like(old, dtype=torch.float32, device=new.device)
                if new is not old:
                    new.zero_() if old.is_meta else new.copy_(old)
                setattr(self, name, new)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdaptiveDropout":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._move(fn)
        return self

    def _ready(self, input: Tensor) -> bool:
        """Returns whether the state is that of the input's units, where they are; if not, the rate
        is plain.
        """
        norm, units = self.gradient_norm, input.shape[-1]
        if norm.shape[0] != units and norm.shape[0]:
            if not self._plain:
                self._turn_plain(input)
            return False
        op.refuse_transforms(input)
        if (
            norm.shape[0] == 0
            or norm.device != input.device
            or (input.dtype == torch.float64 and norm.dtype != torch.float64)
        ):
            self._follow(input)
        # A trace sets it without a look, which would have the next call traced anew.
        if torch.compiler.is_compiling() or not self._used:
            self._used = True
        return True

    def _turn_plain(self, input: Tensor) -> None:
        """Gives up units where the input has another width than those before it; ValueError where
        there were none, but `num_features`.
        """
        known = self.gradient_norm.shape[0]
        if self.num_features is not None and not self._used:
            raise ValueError(
                f"input of shape {tuple(input.shape)} has {input.shape[-1]} units, the module "
                f"{known}; build it with num_features=None, or give every width a module of its own"
            )
        _warn(
            f"{self._name or 'An AdaptiveDropout'}: the last axis had size {known} and now has "
            "another, so it is not one of units, and the plain rate p is used from now on; "
            "`replace_dropout(model, skip=...)` leaves such modules alone"
        )
        self._plain = True

    @torch.compiler.disable(reason=SIZED)  # type: ignore[untyped-decorator]
    def _follow(self, input: Tensor) -> None:
        """Makes the state, or moves it to where the input is; in a graph a backward could not
        write it.
        """
        norm, double = self.gradient_norm, input.dtype == torch.float64
        dtype = torch.float64 if double else norm.dtype
        if not len(norm):
            self._make(input.shape[-1], torch.float64 if double else torch.float32, input.device)
            return
        # which has no values, and would lose the state's
        if input.is_meta:
            checks.same_device("the module's state", norm, "input", input)
        self._move(lambda tensor: torch.empty_like(tensor, dtype=dtype, device=input.device))

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: object,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key, buffers = prefix + "_extra_state", [prefix + name for name in STATE]
        own = dict(state_dict)
        # of a version in which they were buffers
        if all(name in own for name in buffers):
            norm, pending = map(own.pop, buffers)
            own.setdefault(key, torch.stack((norm, pending, torch.zeros_like(norm))))
        reason = self._why_not(own[key]) if key in own else None
        if reason is not None:
            error_msgs.append(f"{key}: {reason}")
            del own[key]
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # a checkpoint of the model with nn.Dropout has none
        if key in missing_keys:
            missing_keys.remove(key)

    def extra_repr(self) -> str:
        """Returns what the module's repr says of it."""
        features = self.num_features or self.gradient_norm.numel() or None
        return (
            f"{features}, p={self.p}, max_p={self.max_p}, momentum={self.momentum}, "
            f"backend={self.backend!r}"
        )


class _Numbers(NamedTuple):
    num_features: int | None
    p: float
    max_p: float
    momentum: float


def _checked(
    num_features: int | None, p: float, max_p: float, momentum: float, backend: str
) -> _Numbers:
    """Returns AdaptiveDropout's numbers as Python's; raises for wrong arguments."""
    checks.backend(backend)
    return _Numbers(
        None if num_features is None else checks.integer("num_features", num_features, 1),
        checks.number("p", p, 0, 1),
        checks.number("max_p", max_p, 0, 1),
        checks.number("momentum", momentum, 0, 1, without=1),
    )


def _warn(text: str) -> None:
    """Warns, under a compiler while it traces: a graph cannot warn."""
    warnings.warn(text, stacklevel=2)


torch.compiler.assume_constant_result(_warn)


def replace_dropout(model: nn.Module, *, skip: Iterable[str] = (), **options: Any) -> int:
    """Puts an `AdaptiveDropout` in the place of every nn.Dropout inside `model`.

    model    an nn.Module that is not itself an nn.Dropout
    skip     patterns of names in `model.named_modules()`, `*` for anything; an nn.Dropout so named
        stays
    options  AdaptiveDropout's arguments; without `p` each keeps the p of the nn.Dropout that it
        replaces

    Returns how many nn.Dropout were replaced; one used in several places stays one. Training or
    eval mode is kept. A module whose last axis changes its size (attention's probabilities) keeps
    its plain rate, with one warning that names it. Raises TypeError or ValueError before anything
    is replaced.

    Equivalent to setting each attribute by hand.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give an nn.Module")
    if isinstance(model, nn.Dropout):
        raise ValueError(
            "model is itself an nn.Dropout, which cannot be replaced inside itself; "
            "build an AdaptiveDropout"
        )
    patterns = [skip] if isinstance(skip, str) else list(skip)
    for pattern in patterns:
        if not isinstance(pattern, str):
            kind = type(pattern).__name__
            raise TypeError(
                f"skip names {pattern!r}, a {kind}; give patterns, such as '*attention*'"
            )
    signature = inspect.signature(AdaptiveDropout)
    checks.options("AdaptiveDropout", options, signature.parameters)
    arguments = signature.bind(**options)
    arguments.apply_defaults()
    _checked(**arguments.arguments)
    places = [
        (parent, name, f"{path}.{name}" if path else name, child)
        for path, parent in model.named_modules()
        for name, child in parent._modules.items()
        if isinstance(child, nn.Dropout)
    ]
    kept = {
        child
        for _, _, name, child in places
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    replacements: dict[nn.Module, AdaptiveDropout] = {}
    for parent, attribute, name, child in places:
        if child not in kept:
            if child not in replacements:
                replacements[child] = AdaptiveDropout(**{"p": child.p} | options).train(
                    child.training
                )
                replacements[child]._name = name
            setattr(parent, attribute, replacements[child])
    return len(replacements)

"""What users call: the adaptive dropout module, and putting it in the place of a model's dropouts."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import op

BUFFERS = ("gradient_norm", "pending")


class AdaptiveDropout(nn.Module):
    """Dropout that drops units with large gradients more often: r_j = clamp(p * n_j / mean(n), 0, max_p) (SPEC 1, adaptive dropout).

    n_j is the moving average of the L2 norm of dL/dh_j over all other axes, h being the output and j an index of its last axis. Kept units
    are scaled by 1/(1 - r_j); r_j = p until a gradient has been seen; in eval mode the module is the identity.

    num_features  size of the last axis; None: taken from the first input, or from a state_dict
    p             mean rate, in [0, 1]; may be set at any time
    max_p         in [0, 1], the largest rate of a unit with a gradient norm
    momentum      in [0, 1): n = momentum * n + (1 - momentum) * new; the first one seen sets n
    backend       "auto", "reference", "cpp", "cuda" or "triton"

    Buffers: gradient_norm [F], n; pending [F], squares of the norms since the last call outside a backward, which folds their root into n.
    Norms that are not finite are dropped. Each call draws its key from torch's default generator of the input's device, as nn.Dropout does;
    the mask is generated again in the backward. Under DDP n follows rank 0's data (buffers are broadcast), under FSDP each rank's own.
    Inputs are float32, bfloat16, float16 or float64. Raises TypeError or ValueError for wrong arguments and inputs, RuntimeError for a
    backend that cannot serve the call. It has no second derivative and does not run under torch.func.vmap.

    Equivalent to `reference.adaptive_dropout(h, reference.dropout_rates_(gradient_norm, pending, ...), key, pending)`.
    """

    gradient_norm: Tensor
    pending: Tensor

    def __init__(
        self, num_features: int | None = None, p: float = 0.3, *, max_p: float = 0.9, momentum: float = 0.9, backend: str = "auto"
    ) -> None:
        super().__init__()
        if num_features is not None and (isinstance(num_features, bool) or not isinstance(num_features, int)):
            raise TypeError(f"num_features={num_features!r} is a {type(num_features).__name__}; give an integer, or None")
        if num_features is not None and num_features < 1:
            raise ValueError(f"num_features={num_features} is out of range; give an integer >= 1, or None")
        for name, value in (("p", p), ("max_p", max_p), ("momentum", momentum)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give a number")
            if not 0 <= value <= 1 or (name == "momentum" and value == 1):
                raise ValueError(f"{name}={value!r} is out of range; give a number in {'[0, 1)' if name == 'momentum' else '[0, 1]'}")
        if backend != "auto" and backend not in op.backends.BACKENDS:
            raise ValueError(f"backend={backend!r} is not a backend; use one of 'auto', {', '.join(map(repr, op.backends.BACKENDS))}")
        self.num_features, self.p, self.max_p, self.momentum, self.backend = num_features, p, max_p, momentum, backend
        for name in BUFFERS:
            self.register_buffer(name, torch.zeros(num_features or 0))  # empty until the size is known

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        self._check(input)
        if self.gradient_norm.numel() == 0:
            dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
            for name in BUFFERS:
                setattr(self, name, torch.zeros(input.shape[-1], dtype=dtype, device=input.device))
        backend = op.choose(self.backend, input.device, input.dtype)
        # A call inside a backward is a recompute, which has to find the rates of its forward.
        fold = torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1
        key = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=input.device)
        options = {"p": float(self.p), "max_p": float(self.max_p), "momentum": float(self.momentum), "fold": fold}
        return op.adaptive_dropout(input, self.gradient_norm, self.pending, key, backend=backend, **options)

    def _check(self, input: Tensor) -> None:
        if not isinstance(input, Tensor):
            raise TypeError(f"input is a {type(input).__name__}; give a tensor")
        if input.layout != torch.strided:
            raise TypeError(f"input is sparse ({input.layout}); give input.to_dense()")
        if input.dtype not in op.backends.DTYPES:
            raise TypeError(f"input is {input.dtype}; give float32, bfloat16, float16 or float64")
        if input.dim() == 0 or input.shape[-1] == 0:
            raise ValueError(f"input has shape {tuple(input.shape)}; give a last axis with the units")
        known = self.gradient_norm
        if known.numel() not in (0, input.shape[-1]):
            raise ValueError(
                f"input of shape {tuple(input.shape)} has {input.shape[-1]} units, the module {known.numel()}; "
                "give every width a module of its own, and nn.Dropout to axes whose size changes"
            )
        if known.numel() and known.device != input.device:
            raise ValueError(f"input is on {input.device}, the module's buffers on {known.device}; move the module with .to()")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        if self.num_features is None:
            for name in BUFFERS:
                if prefix + name in state_dict:
                    setattr(self, name, getattr(self, name).new_zeros(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdaptiveDropout":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in BUFFERS:  # squares do not fit 16 bits, so .half() and .bfloat16() leave the buffers float32
            buffer = getattr(self, name)
            setattr(self, name, buffer.to(torch.promote_types(buffer.dtype, torch.float32)))
        return self

    def extra_repr(self) -> str:
        features = self.num_features or self.gradient_norm.numel() or None
        return f"{features}, p={self.p}, max_p={self.max_p}, momentum={self.momentum}, backend={self.backend!r}"


def replace_dropout(model: nn.Module, **options: Any) -> int:
    """Puts an `AdaptiveDropout` in the place of every nn.Dropout inside `model`; a module used in several places stays one module.

    model    an nn.Module that is not itself an nn.Dropout
    options  AdaptiveDropout's arguments; without `p` each keeps the p of the nn.Dropout that it replaces

    Returns how many nn.Dropout were replaced. Training or eval mode is kept. Modules whose last axis changes its size from batch to batch
    (attention probabilities) are not for it: their second width raises. Raises TypeError or ValueError before anything is replaced.

    Equivalent to setting each attribute by hand.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give an nn.Module")
    if isinstance(model, nn.Dropout):
        raise ValueError("model is itself an nn.Dropout, which cannot be replaced inside itself; build an AdaptiveDropout")
    AdaptiveDropout(**options)  # raises for wrong options
    replacements: dict[nn.Module, AdaptiveDropout] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, nn.Dropout):
                if child not in replacements:
                    replacements[child] = AdaptiveDropout(**{"p": child.p} | options).train(child.training)
                setattr(parent, name, replacements[child])
    return len(replacements)

"""A model's nn.Dropout modules, adaptive for as long as a recipe lives."""

from typing import SupportsIndex

from torch import Tensor, nn

from ..dropout import AdaptiveDropout
from .recipe import plain_names


class LentDropout(AdaptiveDropout):
    """Turns an nn.Dropout into an AdaptiveDropout for a while, of which the model's state_dict says
    nothing.

    The module is the model's own and changes its class: its hooks, its p and mode, and whoever
    refers to it, have one module all along.
    """

    # its class before and after
    _own: type[nn.Dropout]
    # attributes that are for the time between
    _lent: list[str]
    # that have it
    _recipes: int

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state
    _load_from_state_dict = nn.Module._load_from_state_dict

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        """Makes copies and pickles of its own class: no `close()` would find them."""
        own = {key: value for key, value in vars(self).items() if key not in [*self._lent, "_lent"]}
        return object.__new__, (self._own,), own


class AdaptedDropouts:
    """Makes a model's nn.Dropout modules AdaptiveDropout of the same p, from here to the last
    `close()`.
    """

    def __init__(self, model: nn.Module, backend: str) -> None:
        self.modules: dict[str, LentDropout] = {}
        # state at `close()`
        self._last: dict[str, Tensor] = {}
        for name, module in plain_names(model.named_modules()):
            # A subclass that does something else stays what it is.
            own = type(module)
            if getattr(own, "forward", None) is nn.Dropout.forward:
                lent = vars(AdaptiveDropout(backend=backend)) | {
                    "_own": own,
                    "_recipes": 0,
                    "_name": name,
                }
                lent = {key: value for key, value in lent.items() if key not in vars(module)}
                vars(module).update(lent, _lent=list(lent))
                # What else a subclass has is there all the while.
                module.__class__ = (
                    LentDropout
                    if own is nn.Dropout
                    else type("LentDropout", (LentDropout, own), {})
                )
            if isinstance(module, LentDropout):
                module._recipes += 1
                self.modules[name] = module

    def state_dict(self) -> dict[str, Tensor]:
        """Returns AdaptiveDropout's extra state by module name."""
        return self._last | {
            name: AdaptiveDropout.get_extra_state(module) for name, module in self.modules.items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, module in self.modules.items():
            AdaptiveDropout.set_extra_state(module, state[name])

    def why_not(self, state: object) -> str | None:
        """Returns None where `load_state_dict` takes the state, else why not."""
        if not isinstance(state, dict) or state.keys() != self.modules.keys():
            found = list(state) if isinstance(state, dict) else state
            return f"it is of the dropouts {found}, the model's are {list(self.modules)}"
        return next(
            (
                reason
                for name, module in self.modules.items()
                if (reason := module._why_not(state[name]))
            ),
            None,
        )

    def close(self) -> None:
        """Makes the modules nn.Dropout again, with the p and the mode that they have now; does
        nothing the second time.
        """
        self._last = self.state_dict()
        for module in self.modules.values():
            module._recipes -= 1
            if not module._recipes:
                module.__class__ = module._own  # type: ignore[assignment]
                for key in [*module._lent, "_lent"]:
                    delattr(module, key)
        self.modules = {}

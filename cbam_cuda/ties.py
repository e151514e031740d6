"""What modules of a model have in common, and what else would be lost with one of them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .forms import CONVOLUTIONS

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Ties:
    """Of a model as it is when this is made."""

    def __init__(self, model: nn.Module) -> None:
        self._parents: dict[nn.Module, set[nn.Module]] = {}
        self._owners: dict[Tensor, list[nn.Module]] = {}
        for module in model.modules():
            for child in module.children():
                self._parents.setdefault(child, set()).add(module)
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._owners.setdefault(parameter, []).append(module)

    def refuse_more_parents(self, module: nn.Module) -> None:
        """Raise ValueError if it is used in several places."""
        if len(self._parents[module]) > 1:
            raise ValueError(f"its {type(module).__name__} is used by a module outside of it too")

    def refuse_losses(self, module: nn.Module) -> None:
        """Raise ValueError if another one in its place would lose something."""
        inside = set(module.modules())
        for part in inside:
            if any(getattr(part, hooks) for hooks in _HOOKS) or is_parametrized(part):
                name = type(part).__name__
                raise ValueError(f"{name} has hooks or parametrizations, which would be lost")
            if part is not module and not self._parents[part] <= inside:
                raise ValueError(f"its {type(part).__name__} is used by a module outside of it too")
            if isinstance(part, (nn.Linear, *CONVOLUTIONS)) and _tensors(part) - {"weight", "bias"}:
                raise ValueError(f"{type(part).__name__} has other tensors than weight and bias")
        around = inside | self._parents.get(module, set())
        if any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl for m in around):
            raise ValueError(
                "it is under torch.compile, which would go on with what it has compiled"
            )
        for parameter in module.parameters():
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                raise ValueError("a weight has hooks, which would be lost")
            owners = self._owners[parameter]
            if len(owners) != 1:
                raise ValueError(
                    "it shares weights with another module"
                    if not inside.issuperset(owners)
                    else "two of its layers share weights"
                )


def _tensors(layer: nn.Module) -> set[str]:
    return {*layer._parameters, *layer._buffers}

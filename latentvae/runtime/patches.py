"""Faster or leaner forwards for single modules of a stock model, and the way back.

A patch is a function set as the `forward` of one module instance. It gets the module as its first argument
and must not close over any module or tensor, so that a deep copy of the model is a model of its own. Nothing
enters the state dict or the config. Hooks of accelerate and of diffusers (offloading, layerwise casting) wrap
whatever `forward` they find; a patch goes underneath them, so they may come and go before or after it.
Whether a module is still what a patch took it for is asked at every call, in `plain`.
"""

import copy
import functools
import logging
import pickle
import types
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from latentvae.base.errors import ModelError

logger = logging.getLogger(__name__)

# Who patches, from the innermost out: where two patch one module, the later in this list is called, and may
# call the earlier as `underlying(module, feature)`.
FEATURES = ("seamless", "optimize", "tiling")

_OURS = "_latentvae"  # a plain attribute of a module: neither its state dict nor a config holds it


class Patches:
    """What we did to one module.

    Attributes:
        kind: the module's class, when we first came to it.
        name: the module's, for the log.
        functions: (feature, function), from the innermost out.
        original: the forward that somebody else had given it before us, or None.
        undo: what `restore` calls for each feature, for what it changed besides forwards.
        settings: what the outermost feature was asked for, in its own words.
        covered: somebody has put a forward of theirs around ours, so ours cannot be taken out.
        said: names of the modules of this VAE of which it was logged that they run as stock; one set for all.
    """

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.name = ""
        self.functions: list[tuple[str, Callable[..., Any]]] = []
        self.original: Callable[..., Any] | None = None
        self.undo: dict[str, Callable[[torch.nn.Module], None]] = {}
        self.settings: Any = None
        self.covered = False
        self.said: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Patches":
        twin = Patches(self.kind)
        memo[id(self)] = twin  # the original may lead back here
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Pickle as nothing: the copy is stock, and can be loaded where this package is not installed.

        Its `forward`, a bound method, is pickled by its name, and so found in the module's class again.
        """
        if self.original is not None:
            raise pickle.PicklingError(
                f"{self.name or 'a module'} had a forward of its own before latentvae patched it, which a "
                "pickled copy would lack. Call latentvae.restore(vae) before you pickle it."
            )
        _say_once("a pickled copy computes as stock: call optimize or enable_exact_tiling there again.")
        return dict, ()


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def patches_of(module: torch.nn.Module) -> Patches | None:
    """What we did to a module, if anything."""
    found = module.__dict__.get(_OURS)
    return found if isinstance(found, Patches) else None  # else it was pickled


def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the outermost patch of a module, or its own forward where no patch is left, or none can follow.

    Named as what it stands for: pickle stores a bound method by its name, so a pickled model loads as stock.
    """
    ours = patches_of(self)
    if ours is None or not ours.functions:
        return _own(self)(*args, **kwargs)
    feature, function = ours.functions[-1]
    if feature != "seamless" and transformed():
        if feature == "tiling":
            _say_once(
                "not tiled: torch.func, forward-mode AD, tracing and torch's modes go the ordinary way."
            )
        return underlying(self, "optimize")(*args, **kwargs)
    return function(self, *args, **kwargs)


def transformed() -> bool:
    """Whether something follows every operation that our kernels hide from it, so that stock has to run.

    Transforms of torch.func, forward-mode AD, tracing, and modes (of FlopCounterMode's kind). torch.compile
    is not among them: forwards that it traces are ours, without their kernels.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or (torch._C._len_torch_function_stack() > 0 and _modes_matter())
    )


def _modes_matter() -> bool:
    # torch.set_default_device is a mode too, which changes none of what we call
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def patch(module: torch.nn.Module, function: Callable[..., Any], feature: str) -> None:
    """Make `function(module, ...)` the forward of this one module, until `restore`.

    Args:
        function: takes the module first, then what its forward takes. Patching again replaces it.
        feature: one of `FEATURES`: who patches.
    """
    holder, name = innermost(module)
    current = getattr(holder, name)
    ours = patches_of(module)
    if ours is None:
        ours = Patches(type(module))
        setattr(module, _OURS, ours)
    if not is_ours(current):
        is_stock = getattr(current, "__func__", None) is type(module).forward
        # around ours, somebody's wrapper calls ours already; beneath it, ours would call itself for ever
        ours.covered = not is_stock and (ours.covered or bool(ours.functions))
        if not ours.covered:
            ours.original = None if is_stock else current  # given back by restore
            vars(holder)[name] = types.MethodType(forward, module)
    others = [pair for pair in ours.functions if pair[0] != feature]
    ours.functions = sorted([*others, (feature, function)], key=lambda pair: FEATURES.index(pair[0]))


def name_patches(vae: torch.nn.Module) -> None:
    """Tell what is patched its name in the VAE, for messages; and let each say anew that it runs as stock."""
    said: set[str] = set()
    for name, module in vae.named_modules():
        ours = patches_of(module)
        if ours is not None:
            ours.name, ours.said = name, said


def is_ours(function: Any) -> bool:
    """Whether this forward of a module is what `patch` puts there."""
    return getattr(function, "__func__", None) is forward


def underlying(module: torch.nn.Module, feature: str) -> Callable[..., Any]:
    """The forward that this module would have without the patch of `feature` and those above it."""
    # outer patches are left out, or two features would call each other for ever
    below = FEATURES[: FEATURES.index(feature)]
    ours = patches_of(module)
    for owner, function in reversed(ours.functions if ours else []):
        if owner in below:
            return functools.partial(function, module)
    return _own(module)


def _own(module: torch.nn.Module) -> Callable[..., Any]:
    """The forward that a module had before us."""
    ours = patches_of(module)
    if ours is not None and ours.original is not None:
        return ours.original
    return functools.partial(type(module).forward, module)  # torch.compile traces no construction of a method


def on_restore(module: torch.nn.Module, function: Callable[[torch.nn.Module], None], feature: str) -> None:
    """Have `restore` call `function(module)`, for what a feature changed besides forwards."""
    ours = patches_of(module) or Patches(type(module))
    setattr(module, _OURS, ours)
    ours.undo[feature] = function


def keep_settings(module: torch.nn.Module, settings: Any) -> None:
    """Keep with a patched module what its outermost feature was asked for."""
    ours = patches_of(module)
    if ours is not None:
        ours.settings = settings


def patched(model: torch.nn.Module, feature: str | None = None) -> list[str]:
    """Names of the modules in `model` that carry a patch (of that feature, or of any)."""
    features = FEATURES if feature is None else (feature,)
    return [
        name for name, module in model.named_modules() if any(is_patched(module, owner) for owner in features)
    ]


def is_patched(module: torch.nn.Module, feature: str) -> bool:
    """Whether this module carries a patch of that feature."""
    ours = patches_of(module)
    return ours is not None and any(owner == feature for owner, _ in ours.functions)


def restore(vae: AutoencoderKL, feature: str | None = None) -> AutoencoderKL:
    """Undo `optimize`, `enable_exact_tiling` and `make_seamless`: the VAE computes as stock diffusers does.

    A dtype that `optimize` was asked for stays: what rounding took is gone. Restoring twice, or a stock VAE,
    does nothing.

    Args:
        feature: only what this one of `FEATURES` did.

    Raises:
        ModelError: not an AutoencoderKL.
    """
    check_autoencoder(vae)
    undo(vae, feature)
    return vae


def undo(model: torch.nn.Module, feature: str | None = None) -> None:
    """What `restore` does, to a part of a VAE too."""
    for module in model.modules():
        ours = patches_of(module)
        if ours is None:
            continue
        for owner in [owner for owner in ours.undo if feature in (None, owner)]:
            ours.undo.pop(owner)(module)
        ours.functions = [pair for pair in ours.functions if feature not in (None, pair[0])]
        if not ours.functions and not ours.undo:
            _unpatch(module, ours)


def _unpatch(module: torch.nn.Module, ours: Patches) -> None:
    """Take our dispatching forward out again, wherever hooks have put it, and what we kept for it."""
    holder, name = innermost(module)
    if is_ours(getattr(holder, name)):
        if holder is module and name == "forward" and ours.original is None:
            delattr(module, "forward")  # as stock: an attribute would hide the class's from whoever looks
        else:
            setattr(holder, name, ours.original or types.MethodType(type(module).forward, module))
    elif ours.covered or "forward" in module.__dict__:
        ours.covered = True  # it stays inside somebody's wrapper, and calls what was there before it
        return
    delattr(module, _OURS)


def innermost(module: torch.nn.Module) -> tuple[Any, str]:
    """The object and attribute that hold a module's real forward, underneath every hook.

    Hooks replace `forward` by a `functools.partial` of theirs and keep what they found: accelerate in
    `_old_forward`, diffusers in the references of its registry.
    """
    holders: list[tuple[Any, str]] = [(module, "forward"), (module, "_old_forward")]
    for reference in getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", ()):
        holders += [(reference, "forward"), (reference, "original_forward")]
    for holder, name in holders:
        value = getattr(holder, name, None)
        if value is not None and not isinstance(value, functools.partial):  # a partial is a hook
            return holder, name
    return module, "forward"


def check_autoencoder(vae: Any) -> None:
    """Refuse anything but an `AutoencoderKL`.

    Raises:
        ModelError: says what came, and where the AutoencoderKL is if it is known.
    """
    if isinstance(vae, AutoencoderKL):
        return
    wrapped = ("vae", "module", "_orig_mod")  # in a pipeline, by DDP, by torch.compile
    inside = [name for name in wrapped if isinstance(getattr(vae, name, None), AutoencoderKL)]
    way_out = (
        f"Pass its .{inside[0]}."
        if inside
        else "Load one with latentvae.load or AutoencoderKL.from_pretrained."
    )
    raise ModelError(f"{type(vae).__name__} came; wanted a diffusers.AutoencoderKL. {way_out}")

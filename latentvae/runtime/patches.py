"""Faster or leaner forwards for single modules of a stock model, and the way back.

A patch is a function set as the `forward` of one module instance. It gets the module as its first argument
and must not close over any module or tensor, so that a deep copy of the model is a model of its own. Nothing
enters the state dict or the config. Hooks of accelerate and of diffusers (offloading, layerwise casting) wrap
whatever `forward` they find; a patch goes underneath them, so they may come and go before or after it.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL

from latentvae.base.errors import ModelError

# Who patches, from the innermost out: where two patch one module, the later in this list is called, and may
# call the earlier as `underlying(module, feature)`.
FEATURES = ("optimize", "tiling")

# plain attributes of a module: neither its state dict nor a config holds them, and a copy has its own
_PATCHES, _ORIGINAL, _UNDO = "_latentvae_patches", "_latentvae_original", "_latentvae_undo"


def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the outermost patch of a module, or its class's own forward where no patch is left.

    Named as what it stands for: pickle stores a bound method by its name, so a pickled model loads as stock.
    """
    patches = self.__dict__.get(_PATCHES)
    if patches:  # from the innermost out
        return patches[-1][1](self, *args, **kwargs)
    return type(self).forward(self, *args, **kwargs)


def patch(module: torch.nn.Module, function: Callable[..., Any], feature: str) -> None:
    """Make `function(module, ...)` the forward of this one module, until `restore`.

    Args:
        function: takes the module first, then what its forward takes. Patching again replaces it.
        feature: one of `FEATURES`: who patches.
    """
    holder, name = _innermost(module)
    current = getattr(holder, name)
    if getattr(current, "__func__", None) is not forward:
        if getattr(current, "__func__", None) is not type(module).forward:
            setattr(module, _ORIGINAL, current)  # someone else's patch: given back by restore
        setattr(holder, name, types.MethodType(forward, module))
    others = [pair for pair in module.__dict__.get(_PATCHES, ()) if pair[0] != feature]
    patches = sorted([*others, (feature, function)], key=lambda pair: FEATURES.index(pair[0]))
    setattr(module, _PATCHES, patches)


def underlying(module: torch.nn.Module, feature: str) -> Callable[..., Any]:
    """The forward that this module would have without the patch of `feature` and those above it."""
    # outer patches are left out, or two features would call each other for ever
    below = FEATURES[: FEATURES.index(feature)]
    for owner, function in reversed(module.__dict__.get(_PATCHES, ())):
        if owner in below:
            return types.MethodType(function, module)
    return module.__dict__.get(_ORIGINAL) or types.MethodType(type(module).forward, module)


def on_restore(module: torch.nn.Module, function: Callable[[torch.nn.Module], None], feature: str) -> None:
    """Have `restore` call `function(module)`, for what a feature changed besides forwards."""
    setattr(module, _UNDO, {**module.__dict__.get(_UNDO, {}), feature: function})


def patched(model: torch.nn.Module, feature: str | None = None) -> list[str]:
    """Names of the modules in `model` that carry a patch (of that feature, or of any)."""
    features = FEATURES if feature is None else (feature,)
    return [
        name for name, module in model.named_modules() if any(is_patched(module, owner) for owner in features)
    ]


def is_patched(module: torch.nn.Module, feature: str) -> bool:
    """Whether this module carries a patch of that feature."""
    return any(owner == feature for owner, _ in module.__dict__.get(_PATCHES, ()))


def restore(vae: AutoencoderKL, feature: str | None = None) -> AutoencoderKL:
    """Undo `optimize` and `enable_exact_tiling`: the VAE computes as stock diffusers does again.

    A dtype that `optimize` was asked for stays: what rounding took is gone. Restoring twice, or a stock VAE,
    does nothing.

    Args:
        feature: only what this one of `FEATURES` did.

    Raises:
        ModelError: not an AutoencoderKL.
    """
    check_autoencoder(vae)
    for module in vae.modules():
        undo = module.__dict__.get(_UNDO, {})
        for owner in [owner for owner in undo if feature in (None, owner)]:
            undo.pop(owner)(module)
        if not undo:
            module.__dict__.pop(_UNDO, None)
        patches = module.__dict__.get(_PATCHES, [])
        patches[:] = [pair for pair in patches if feature not in (None, pair[0])]
        if not patches:
            _unpatch(module)
    return vae


def _unpatch(module: torch.nn.Module) -> None:
    """Take our dispatching forward out again, wherever hooks have put it, and what we kept for it."""
    holder, name = _innermost(module)
    if getattr(getattr(holder, name), "__func__", None) is forward:
        original = module.__dict__.get(_ORIGINAL) or types.MethodType(type(module).forward, module)
        if holder is module and name == "forward" and _ORIGINAL not in module.__dict__:
            delattr(module, "forward")  # as stock: an attribute would hide the class's from whoever looks
        else:
            setattr(holder, name, original)
    for attribute in (_PATCHES, _ORIGINAL):
        module.__dict__.pop(attribute, None)


def _innermost(module: torch.nn.Module) -> tuple[Any, str]:
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

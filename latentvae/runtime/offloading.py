"""Hooks of accelerate and diffusers that bring a module's weights when it is called, and do nothing else."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

# By name: only the training engine imports accelerate.
BRING_WEIGHTS = {
    ("accelerate.hooks", "AlignDevicesHook"),
    ("accelerate.hooks", "CpuOffload"),
    ("accelerate.hooks", "LayerwiseCastingHook"),
    ("diffusers.hooks.group_offloading", "GroupOffloadingHook"),
    ("diffusers.hooks.group_offloading", "LayerExecutionTrackerHook"),
    ("diffusers.hooks.group_offloading", "LazyPrefetchGroupOffloadingHook"),
    ("diffusers.hooks.layerwise_casting", "LayerwiseCastingHook"),
}
WRAPPERS = ("accelerate.hooks", "diffusers.hooks.hooks")  # where the functions that run hooks are defined


def hooks_of(module: torch.nn.Module) -> list[Any]:
    """The hooks of both libraries on a module, from the outermost in."""
    hooks = [module.__dict__["_hf_hook"]] if "_hf_hook" in module.__dict__ else []
    registry = module.__dict__.get("_diffusers_hook")
    if registry is not None:
        hooks += [registry.hooks[name] for name in reversed(registry._hook_order)]
    # accelerate's hook of several hooks
    return [one for hook in hooks for one in getattr(hook, "hooks", (hook,))]


def foreign_hook(module: torch.nn.Module) -> str | None:
    """The class of a hook that may do more than bring weights, if there is one."""
    for kind in map(type, hooks_of(module)):
        if (kind.__module__, kind.__qualname__) not in BRING_WEIGHTS:
            return kind.__name__
    return None


@contextmanager
def weights_of(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Have the hooks of modules that nobody calls bring their weights, and afterwards take them away."""
    with ExitStack() as stack:
        for module in modules:
            for hook in hooks_of(module):
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, None)
        yield

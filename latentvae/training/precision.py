"""Where bfloat16 is computed by the hardware, and where it is only emulated and slower than float32."""

import torch

# of torch.cpu.get_capabilities(): x86 with AVX-512 or AMX, Arm with its own
_CPU_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 pays on a device: CPUs without instructions for it are slower than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return any(_cpu_capabilities().get(name) for name in _CPU_INSTRUCTIONS)
    return False


def resolve_precision(precision: str, device: torch.device) -> str:
    """What "auto" means on a device: bf16 where it is fast, else fp32; other names stay."""
    if precision != "auto":
        return precision
    return "bf16" if has_fast_bfloat16(device) else "fp32"


def _cpu_capabilities() -> dict[str, object]:
    """What torch knows of this CPU; older versions know only two things."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    known = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}
    return {name: getattr(torch.cpu, test, bool)() for name, test in known.items()}

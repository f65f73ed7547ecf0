"""Model FLOPs utilisation (MFU): the arithmetic that the model asks for, over what the devices could do in that time.

    MFU = tokens per second · FLOPs per token / (devices · peak FLOPs per second of a device)

FLOPs per token count the forward pass, and twice that for the backward pass. Work that is repeated (rematerialisation)
or masked (the upper half of causal scores) is not counted. The peak is that of dense bfloat16 products, so a run in
float32 cannot come near 1. Source of the definition: Chowdhery et al., PaLM, arXiv 2204.02311, appendix B.
"""

import jax

# Dense bfloat16 FLOPs per second, from the makers' data sheets, by the beginning of `jax.Device.device_kind`.
# The first entry that fits is taken.
PEAKS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 1153.5e12,  # half of a chip's 2307: JAX shows each of its two TensorCores as a device
}


def peak_flops(device_kind: str) -> float | None:
    """FLOPs per second of one device, or None for a device that is not in the table, such as a CPU."""
    return next((peak for kind, peak in PEAKS.items() if device_kind.startswith(kind)), None)


def utilisation(tokens_per_second: float, flops_per_token: float, devices: list[jax.Device]) -> float | None:
    """The MFU of `devices` together, or None where their peak is not known."""
    peak = peak_flops(devices[0].device_kind)
    return None if peak is None else tokens_per_second * flops_per_token / (len(devices) * peak)

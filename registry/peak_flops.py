"""How many floating-point operations a device can make in a second, from its maker's data sheets.

One decision: names are compared whole, as the driver tells them. A device that is not here, a slice of one, or a
processor has no peak: a utilisation of a guessed one would be a wrong number.
"""

from __future__ import annotations

BF16_PEAKS: dict[str, float] = {
    # Ampere: data sheets of A100, A30, A40 and A10
    **dict.fromkeys(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"), 312e12),
    **dict.fromkeys(("NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"), 312e12),
    "NVIDIA A30": 165e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA A10": 125e12,
    # data sheet of the RTX A6000, halved; GA102 white paper: with float32 sums, as PyTorch has them
    "NVIDIA RTX A6000": 154.8e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    # Ada: data sheets of L4 (halved, it is told with sparsity), L40 and L40S; Ada GPU architecture white paper
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181.05e12,
    "NVIDIA L40S": 362.05e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    # Hopper: data sheets of H100 and H200, halved
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H200": 989.5e12,
    "NVIDIA H200 NVL": 835.5e12,
    # Blackwell: data sheet of HGX B200, an eighth and halved
    "NVIDIA B200": 2250e12,
}
"""Name of a GPU → dense bfloat16 operations per second on its tensor cores, without sparsity."""

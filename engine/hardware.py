"""Peak speeds, memory and links of GPUs.

The figures are NVIDIA's for dense weights: the data sheets of the H200 (SXM), H100 (SXM), A100 (SXM), L40S and HGX
B200, and the white paper on the Ada architecture for the RTX 4090. The network between nodes belongs to the machine:
400 Gbit/s for each GPU in HGX and DGX machines from the H100 on, 200 in DGX A100, 100 in OVX machines of the L40S. The
RTX 4090 has no such machine; 100 are assumed.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One GPU and its links to others.

    Args:
        name: the common name.
        bf16: peak FLOP/s of bfloat16 matrix products with float32 accumulation.
        fp32: peak FLOP/s of float32 matrix products without TF32.
        memory: bytes.
        bandwidth: of that memory, bytes/s.
        link: to the other GPUs of its node, bytes/s in one direction: NVLink, or else PCIe.
        network: between nodes, bytes/s for each GPU in one direction.
    """

    name: str
    bf16: float
    fp32: float
    memory: float
    bandwidth: float
    link: float
    network: float

    def peak(self, precision: str) -> float:
        """FLOP/s at one of Lightning's precisions: bf16-mixed, bf16-true or 32-true. ValueError for another."""
        peaks = {"bf16-mixed": self.bf16, "bf16-true": self.bf16, "32-true": self.fp32}
        if precision not in peaks:
            raise ValueError(f"precision must be one of {', '.join(peaks)}, got {precision}")
        return peaks[precision]


DEVICES: dict[str, Device] = {
    "h200": Device("NVIDIA H200 SXM", 989.4e12, 67e12, 141e9, 4.8e12, 450e9, 50e9),
    "h100": Device("NVIDIA H100 SXM 80GB", 989.4e12, 67e12, 80e9, 3.35e12, 450e9, 50e9),
    "a100-80gb": Device("NVIDIA A100 SXM 80GB", 312e12, 19.5e12, 80e9, 2.039e12, 300e9, 25e9),
    "a100-40gb": Device("NVIDIA A100 SXM 40GB", 312e12, 19.5e12, 40e9, 1.555e12, 300e9, 25e9),
    "l40s": Device("NVIDIA L40S", 362e12, 91.6e12, 48e9, 864e9, 32e9, 12.5e9),
    "rtx4090": Device("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12, 24e9, 1.008e12, 32e9, 12.5e9),
    "b200": Device("NVIDIA B200 SXM", 2.25e15, 75e12, 180e9, 8e12, 900e9, 50e9),
}

# The driver's names in full: PCIe, NVL, laptop and partitioned devices are slower and have other names.
REPORTED = {
    "H200": "h200",
    "H100 80GB HBM3": "h100",
    "A100-SXM4-80GB": "a100-80gb",
    "A100-SXM-80GB": "a100-80gb",
    "A100-SXM4-40GB": "a100-40gb",
    "L40S": "l40s",
    "GeForce RTX 4090": "rtx4090",
    "B200": "b200",
}


def find(name: str) -> Device | None:
    """The device that `torch.cuda.get_device_name()` names; None if the name is not exactly one of REPORTED."""
    key = REPORTED.get(name.strip().removeprefix("NVIDIA "))
    return DEVICES[key] if key else None

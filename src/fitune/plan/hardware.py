"""What a GPU takes besides tensors: constants by name, with whether they were measured.

The context (driver, kernels, lazily loaded modules) is outside PyTorch's allocator; cuBLAS workspaces are inside it.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20
PAGE, PAGE_ENTRY = 4096, 8  # bytes of a page of page-locked host memory, and of its entry in the GPU's page table
# cuBLAS keeps one workspace per handle and stream. Plain path: the run's stream, from the thread that runs forwards and
# from autograd's (both seen in measurements). Engine: its own stream, on which the self-check runs too, and the run's,
# on which samples are generated before training (and some releases of transformers make rotary tables by a product).
NUM_WORKSPACES = {"plain": 2, "engine": 2}


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        name: as the driver reports it, or a class of devices.
        context_bytes: taken outside the allocator by a training process: driver, libraries, compiled kernels.
        workspace_bytes: of one cuBLAS handle and stream.
        measured: the two numbers were measured on this device; else they are the largest known of its class.
    """

    name: str
    context_bytes: int
    workspace_bytes: int
    measured: bool

    @property
    def on_cpu(self) -> bool:
        """No GPU: buffers are made to the token, and nothing is captured."""
        return not self.context_bytes

    def outside_bytes(self, host_bytes: int) -> int:
        """Taken outside PyTorch's allocator: the context, and the page table of page-locked host memory.

        34 GB of it, the block inputs of an 8B model at level `offload` with a row of 98,560 tokens, are 67 MB.
        """
        return self.context_bytes + host_bytes // PAGE * PAGE_ENTRY


CPU = Hardware("CPU", 0, 0, measured=True)
# The workspace before Hopper is 8.125 MiB, on it (sm90) 32 MiB.
# Measured: memory in use on the device during `python -m bench step` by the driver's counter, less what is in use when
# idle, less what the allocator had reserved, less the page table. On an H200 800 to 812 MB (fp8: 756 to 810) in all
# runs of today's engine, on an H100 up to 820; what once took more is in docs/memory.md.
H200 = Hardware("NVIDIA H200", 812_000_000, 32 * MIB, measured=True)
HOPPER = Hardware("a Hopper GPU", 820_000_000, 32 * MIB, measured=False)
OLDER = Hardware("a GPU before Hopper", 600_000_000, 8 * MIB + 128 * 1024, measured=False)
NAMES = {"H200": H200, "H100": HOPPER, "GH200": HOPPER, "A100": OLDER, "A10": OLDER, "RTX 3090": OLDER, "T4": OLDER}


def find_gpu(name: str | None) -> Hardware:
    """The row of a device name such as `NVIDIA H200`; without a name, or with one not known, the largest numbers."""
    words = (name or "").replace("-", " ").split()
    for key, row in NAMES.items():
        if all(word in words for word in key.split()):
            return row
    return HOPPER

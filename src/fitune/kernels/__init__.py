"""Functions over caller-given buffers: a plain PyTorch body each, and a Triton body for CUDA."""

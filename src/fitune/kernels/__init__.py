"""The elementwise kernels of the engine: functions over the caller's buffers, plain PyTorch and Triton."""

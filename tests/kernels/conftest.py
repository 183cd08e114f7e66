"""Triton's interpreter runs the kernels where there is no GPU; it must be chosen before triton is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

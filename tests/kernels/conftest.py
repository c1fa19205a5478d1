"""Kernel tests run the Triton providers in the interpreter, on CPU tensors."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

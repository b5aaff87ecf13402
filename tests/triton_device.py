"""Where the tests of Triton kernels run: compiled on a GPU, or interpreted on CPU tensors under TRITON_INTERPRET=1.

Triton decides which when it is first imported, so the interpreted tests are a run of pytest of their own (make test).
Importing this module skips the test file where neither is possible.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", minversion="3.6")

DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    from fasticl.testing import interpreter

    interpreter.install()

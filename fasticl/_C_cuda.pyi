# The types of the native module of CUDA kernels. What each takes stands in its binding, csrc/bindings_cuda.cpp.
from typing import Any

lane_stream: dict[str, Any]

def __getattr__(name: str) -> Any: ...

"""For contributors: Triton kernels proved on a machine without a GPU.

interpreter  runs kernels on CPU tensors: repaired arithmetic, reads and writes out of bounds, races between programs
aot          compiles what a launch would launch, for a GPU that is not there: registers, spills, shared memory, SASS
"""

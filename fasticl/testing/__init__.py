"""For contributors: GPU code proved on a machine without a GPU. Nothing that multiplies imports it.

interpreter  runs Triton kernels on CPU tensors: repaired arithmetic, reads and writes out of bounds, races
aot          compiles what a Triton launch would launch, for a GPU that is not there: registers, spills, SASS
cuda_on_cpu  runs CUDA C++ kernels as threads of a CPU; needs a checkout
"""

// fasticl._C: the CPU kernels as a Python module, and the choice of the instruction set.
#include "python.h"

namespace fasticl {

void bind_attention_mlp(py::module_&);
void bind_bitmap_linear(py::module_&);
void bind_decoder(py::module_&);
void bind_nm_linear(py::module_&);
void bind_sliced_linear(py::module_&);

namespace {

constexpr Target kTargets[] = {Target::scalar, Target::avx2, Target::avx512, Target::avx512_bf16};
constexpr const char* kTargetNames[] = {"scalar", "avx2", "avx512", "avx512_bf16"};

bool supported(Target t) {
#ifdef FASTICL_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("popcnt");
  if (t == Target::avx2) return avx2;
  if (t == Target::avx512_bf16) return supported(Target::avx512) && __builtin_cpu_supports("avx512bf16");
  if (t == Target::avx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni");
  }
#endif
  return t == Target::scalar;
}

Target best() {
  Target found = Target::scalar;
  for (const Target t : kTargets)
    if (supported(t)) found = t;
  return found;
}

Target in_force = best();

}  // namespace

Target target() { return in_force; }

}  // namespace fasticl

PYBIND11_MODULE(_C, m) {
  using namespace fasticl;
  m.doc() = "CPU kernels of FastICL. Takes addresses; fasticl.ops checks what is passed here.";
  m.def("target", [] { return kTargetNames[static_cast<int>(in_force)]; }, "Instruction set in force.");
  m.def(
      "targets",
      [] {
        py::list names;
        for (const Target t : kTargets)
          if (supported(t)) names.append(kTargetNames[static_cast<int>(t)]);
        return names;
      },
      "Instruction sets that this machine can run, worst first.");
  m.def(
      "set_target",
      [](const std::string& name) {
        for (const Target t : kTargets)
          if (name == kTargetNames[static_cast<int>(t)]) {
            if (!supported(t)) throw py::value_error("this machine cannot run the target '" + name + "'");
            in_force = t;
            return;
          }
        throw py::value_error("expected a target of targets(), got '" + name + "'");
      },
      "name"_a, "Forces an instruction set. For tests: results do not depend on it beyond rounding.");
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  bind_attention_mlp(m);
  bind_bitmap_linear(m);
  bind_decoder(m);
  bind_nm_linear(m);
  bind_sliced_linear(m);
}

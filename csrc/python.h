// The edge to Python: addresses and sizes, no torch. Each op's file defines its bind function; bindings.cpp calls it.
#pragma once
#include <pybind11/pybind11.h>

#include "cpu.h"

namespace fasticl {

namespace py = pybind11;
using namespace pybind11::literals;

using Address = uintptr_t;  // Tensor.data_ptr(); 0 is "none"

template <class T>
T* pointer(Address a) {
  return reinterpret_cast<T*>(a);
}

}  // namespace fasticl

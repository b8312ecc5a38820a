// The memory that Python passes to the bindings: addresses are integers, and 0 is null.

#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace relssl {

using Address = uintptr_t;

template <class T>
T* pointer(Address address, const char* name) {
  if (!address) throw pybind11::value_error(std::string(name) + " is null");
  return reinterpret_cast<T*>(address);
}

template <class T>
T* optional(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace relssl

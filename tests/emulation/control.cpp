// What a test says to the machine; beside csrc/cuda's own functions.
#include "cuda.h"

extern "C" __attribute__((visibility("default"))) void emulation_seed(uint64_t seed) { emulation::machine.seed(seed); }

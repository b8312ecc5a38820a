// What a test says to the machine; beside csrc/cuda's own functions.
#include "cuda.h"

extern "C" __attribute__((visibility("default"))) void emulation_seed(uint64_t seed) { emulation::machine.seed(seed); }

// The device of the last launch, and the calling thread's current one.
extern "C" __attribute__((visibility("default"))) int emulation_launched_on() { return emulation::launched_on; }
extern "C" __attribute__((visibility("default"))) int emulation_device() { return emulation::device; }

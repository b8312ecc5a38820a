// The functions by which a test controls the emulated machine.
#include "cuda.h"

extern "C" __attribute__((visibility("default"))) void emulation_seed(uint64_t seed) { emulation::machine.seed(seed); }

// Return the device of the last launch, and the current device of the calling thread.
extern "C" __attribute__((visibility("default"))) int emulation_launched_on() { return emulation::launched_on; }
extern "C" __attribute__((visibility("default"))) int emulation_device() { return emulation::device; }

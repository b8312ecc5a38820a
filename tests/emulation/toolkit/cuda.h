// The driver, as far as csrc/cuda/launch.h asks for it.
#pragma once
#include "cuda_runtime.h"

// The part of the driver's interface that csrc/cuda/launch.h uses.
#pragma once
#include "cuda_runtime.h"

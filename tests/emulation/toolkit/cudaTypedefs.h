// The types of the driver's functions are declared in cuda.h.
#pragma once
#include "cuda.h"

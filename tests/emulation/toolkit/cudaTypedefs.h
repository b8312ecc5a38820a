// The types of the driver's functions.
#pragma once
#include "cuda.h"

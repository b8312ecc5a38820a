"""GPU kernels written in Triton (installed as relssl.kernels)."""

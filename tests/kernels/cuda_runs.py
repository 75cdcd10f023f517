"""Where the CUDA backend's kernels are run by cuda_emulator, and weights for its tests."""

from __future__ import annotations

import platform
import sys
from functools import partial

import arrays
import emulation

from kernels import cuda

EMULATED = platform.system() == "Linux" and emulation.compiler() is not None
LAUNCH = sys.modules["kernels.cuda.launch"]  # in the package, its name stands for the function
weights_of = partial(arrays.weights_of, cuda)

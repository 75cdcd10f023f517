"""NVIDIA's run-time compiler: from a kernel's text to machine code of the GPU that MLX runs on."""

from __future__ import annotations

import ctypes
from functools import cache

LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12")  # whichever MLX's build has loaded
OPTIONS = ("--std=c++17", "--device-as-default-execution-space")
_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@cache
def device_attribute(attribute: int) -> int:
    """An attribute of the GPU that MLX runs on (device 0), as the driver reports it. Raises OSError."""
    value = ctypes.c_int()
    if ctypes.CDLL("libcuda.so.1").cuDeviceGetAttribute(ctypes.byref(value), attribute, 0) != 0:
        raise OSError("the CUDA driver does not answer")
    return value.value


@cache
def library() -> ctypes.CDLL:
    """NVRTC. Raises OSError where there is none."""
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError(f"none of {', '.join(LIBRARIES)} is here: they come with MLX's CUDA build")


@cache
def version() -> str:
    """NVRTC's, as in "13.0"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


@cache
def architecture() -> str:
    """What to compile for: sm_90 on an H100; for a GPU newer than NVRTC, the newest PTX it knows that runs there."""
    major, minor = map(device_attribute, _COMPUTE_CAPABILITY)
    return best_architecture(10 * major + minor, supported())


def best_architecture(device: int, known: list[int]) -> str:
    """device: its compute capability, 90 for 9.0; known: those that NVRTC compiles for. Raises RuntimeError."""
    if device in known:
        return f"sm_{device}"
    older = [each for each in known if each < device]
    if not older:
        raise RuntimeError(f"NVRTC {version()} knows no GPU as old as compute capability {device / 10:.1f}")
    return f"compute_{max(older)}"


def supported() -> list[int]:
    """Compute capabilities that NVRTC compiles for, 90 for 9.0."""
    count = ctypes.c_int()
    _check(library().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    known = (ctypes.c_int * count.value)()
    _check(library().nvrtcGetSupportedArchs(known))
    return list(known)


def compile_text(text: str, name: str, target: str) -> bytes:
    """CUDA C++ that includes nothing -> a cubin, or PTX where the target is compute_*.

    Raises RuntimeError with the compiler's first complaint.
    """
    nvrtc, program = library(), ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None))
    try:
        options = [option.encode() for option in (*OPTIONS, f"--gpu-architecture={target}")]
        failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if failed:
            log = _result(program, "ProgramLog").decode(errors="replace")
            complaint = next((line for line in log.splitlines() if "error" in line), log.strip() or "no reason given")
            raise RuntimeError(f"NVRTC: {complaint}")
        return _result(program, "PTX" if target.startswith("compute_") else "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _result(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library(), f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(code: int) -> None:
    if code:
        text = library().nvrtcGetErrorString
        text.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {text(code).decode()}")

"""Tells how many clusters of thread blocks a GPU holds at once, asked of CUDA's driver for an empty
kernel.
"""

import ctypes

import torch

SIZES = (2, 4, 8, 16)
# bytes of a block, as the loss kernel takes at 128,256 classes
SHARED = 131 * 1024 + 512
THREADS = 512
PTX = b".version 7.8\n.target sm_90\n.address_size 64\n.visible .entry nothing() { ret; }\n\0"
# of CUlaunchAttributeID
CLUSTER = 4
# of CUfunction_attribute
DYNAMIC_SHARED, ANY_CLUSTER = 8, 14


class Attribute(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("cluster", ctypes.c_uint * 3),
        ("rest", ctypes.c_char * 52),
    )


class Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


def clusters() -> dict[str, int | str]:
    """Returns, by size, the clusters of blocks of SHARED bytes that run at once, or the driver's
    word against it.
    """
    # makes the context
    torch.zeros(1, device="cuda")
    if torch.version.cuda is None or torch.cuda.get_device_capability() < (9, 0):
        return {"all": "this GPU has no clusters"}
    driver = ctypes.CDLL("libcuda.so.1")
    module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    status = driver.cuModuleLoadData(ctypes.byref(module), PTX)
    status = status or driver.cuModuleGetFunction(ctypes.byref(kernel), module, b"nothing")
    status = status or driver.cuFuncSetAttribute(kernel, DYNAMIC_SHARED, SHARED)
    if status:
        return {"all": f"CUDA error {status}"}
    refused = driver.cuFuncSetAttribute(kernel, ANY_CLUSTER, 1)
    found: dict[str, int | str] = {"above 8": f"CUDA error {refused}"} if refused else {}
    for size in SIZES:
        attribute = Attribute(CLUSTER, b"", (ctypes.c_uint * 3)(size, 1, 1))
        launch = Launch(
            (ctypes.c_uint * 3)(size * 64, 1, 1), (ctypes.c_uint * 3)(THREADS, 1, 1), SHARED
        )
        launch.attributes, launch.count = ctypes.addressof(attribute), 1
        number = ctypes.c_int()
        status = driver.cuOccupancyMaxActiveClusters(
            ctypes.byref(number), kernel, ctypes.byref(launch)
        )
        found[str(size)] = f"CUDA error {status}" if status else number.value
    return found

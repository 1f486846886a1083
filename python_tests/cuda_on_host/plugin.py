""
    "`-p plugin`: the CPU's tests run on the library of CUDA_ON_HOST, a folder."
    ""

    import os import pathlib

        from uegr_kernels
            .core import native

                native.LIBRARIES = pathlib.Path(os.environ["CUDA_ON_HOST"])

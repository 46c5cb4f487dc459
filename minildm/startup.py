"""What a command sets before NumPy and torch are imported: NumPy's threads, how idle threads wait, and how memory is
kept. No result depends on it, up to rounding.

Imported as a library, minildm leaves the process alone. What the user has set in the environment stays.
"""

import ctypes
import os

from minildm.torchrun import only_the_first_speaks

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_BLOCK = 1 << 30  # bytes
SPIN_COUNT = "1000"  # turns of the loop; GNU OpenMP's default is 300,000, and 100 with more threads than cores


def prepare_process():
    """Threads: between two operations OpenMP's threads wait in a loop for the next one. Beside another busy process
    that loop takes the very core that the work needs, which made sampling up to twenty times slower. Sleeping at
    once is no better where waking a thread takes longer than its work, as on some virtual machines. So they loop for
    some microseconds, and then sleep. NumPy's matrix products are small here, and OpenBLAS's threads would compete with
    torch's; so it gets one.

    Memory: glibc returns every block of more than 32 MB to the system at once, and the next step pays again for each of
    its pages; so blocks of up to 1 GB are kept, and large ones lie in large pages. The peak is a quarter higher.

    Several processes, started by torchrun: only the first prints.
    """
    only_the_first_speaks()
    if not {"GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # for other OpenMP libraries; GNU's heeds the count
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return
    if mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK) or mallopt(M_MMAP_THRESHOLD, 1 << 25):  # older glibc: up to 32 MB
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)

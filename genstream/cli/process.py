"""What the operating system says about this process."""

import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_IMPORTED_AT_S = time.perf_counter()
_START_TIME_FIELD = 19  # field 22 of /proc/self/stat, counted after the command name, which may hold spaces
_KIB = 1024


def seconds_since_process_start() -> float:
    """Age of this process; where the system does not say, time since this module was imported."""
    if sys.platform != "linux":
        return time.perf_counter() - _IMPORTED_AT_S
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(fields[_START_TIME_FIELD]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s


def resident_memory_bytes() -> int:
    """Memory of this process that is in RAM now."""
    import psutil

    resident: int = psutil.Process().memory_info().rss
    return resident


def processor_name() -> str:
    """The processor's model, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def hardware_name(device: "torch.device") -> str:
    """Processor or GPU with what else decides a speed: threads, system, version of torch."""
    import torch

    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{processor_name()}, {torch.get_num_threads()} threads"
    return f"{processor}, {platform.system()}, torch {torch.__version__}"


def peak_memory_bytes() -> int | None:
    """Most resident memory this process ever had; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * _KIB


def restart_peak_memory(device: "torch.device") -> bool:
    """Let `peak_memory_since` begin anew; False where the system cannot."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_memory_since(device: "torch.device") -> int:
    """Most memory in bytes since `restart_peak_memory`: PyTorch's on a GPU, else of the whole process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (peak,) = (line for line in lines if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * _KIB


def is_out_of_memory(error: BaseException) -> bool:
    """True for Python's and torch's ways of saying so, on CPU and GPU."""
    return isinstance(error, MemoryError) or any(
        words in str(error).lower() for words in ("out of memory", "can't allocate memory")
    )

"""How figures are written in tables."""

_MIB = 2**20
_GIB = 2**30


def mib(size_bytes: float) -> str:
    """Bytes as MiB."""
    return f"{size_bytes / _MIB:.1f} MiB"


def change(before: float, after: float) -> str:
    """What a figure became, in per cent of what it was."""
    return f"{100 * (after / before - 1):+.1f} %"


def gpu_memory(size_bytes: float) -> str:
    """Bytes in the units in which the memory of graphics cards is counted."""
    return f"{size_bytes / _GIB:.2f} GiB" if size_bytes >= _GIB / 10 else mib(size_bytes)

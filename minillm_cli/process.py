"""Settings that a process must have before it imports a framework. A setting of the user's own stays as it is."""

import contextlib
import os
import sys

MALLOC = {"hugetlb": 1, "mmap_threshold": 1 << 30, "trim_threshold": 1 << 32}
"""glibc's malloc settings for training: transparent huge pages (2 MB), and freed memory stays with the process, except
for single blocks of 1 GB and more."""
FIRST_GLIBC = (2, 35)
"""The first version that knows `hugetlb`."""
RESTARTED = "MINILLM_RESTARTED"
"""Set in a process that `set_malloc` has restarted, so that it does not do it again."""


def is_command() -> bool:
    """Whether this process was started as a command of this project, and not by a test or a program that calls one."""
    return sys.argv[0] in sys.orig_argv or "minillm_cli" in sys.orig_argv


def let_threads_sleep(*, decoding: bool = False) -> None:
    """Keeps torch's waiting threads from spinning. Call this before torch is imported.

    On busy cores, spinning threads made a training step take 4 to 7 times longer. A decoding step has a hundred short
    waits, and threads that sleep at once make it 2.5 times slower; for decoding, they spin for a while and then sleep.
    """
    os.environ.setdefault(*(("GOMP_SPINCOUNT", "30000") if decoding else ("OMP_WAIT_POLICY", "passive")))


def malloc_settings() -> dict[str, str]:
    """The environment variable with the settings MALLOC; empty if the user has set it or the C library has none.

    A training step on a CPU allocates and frees more than 1 GB. By default malloc returns large blocks to the system
    and gets them back as empty pages of 4 kB: 150,000 to 400,000 page faults per step.
    """
    if "GLIBC_TUNABLES" in os.environ or not _is_new_glibc():
        return {}
    return {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in MALLOC.items())}


def set_malloc() -> None:
    """Re-executes this command with `malloc_settings`, because glibc reads them only when a program starts. The process
    id and the standard streams stay. Call this first: whatever the program has done is lost. Without effect if this
    process is not a command, or if it cannot be re-executed."""
    settings = malloc_settings()
    if settings and is_command() and sys.executable and RESTARTED not in os.environ:
        with contextlib.suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | settings | {RESTARTED: "1"})


def _is_new_glibc() -> bool:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return name == "glibc" and tuple(int(part) for part in version.split(".")[:2]) >= FIRST_GLIBC
    except (AttributeError, OSError, ValueError):  # Windows, musl, macOS
        return False

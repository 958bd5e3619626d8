"""Repeat a measurement and keep the repetitions that other processes did not disturb."""

import os
import resource
import statistics
import time

MAX_FOREIGN = 0.10  # cores that other processes may use during a repetition


def busy_seconds():
    """CPU seconds used on the whole machine, stolen time included."""
    f = [int(x) for x in open("/proc/stat").readline().split()[1:]]
    return (f[0] + f[1] + f[2] + f[5] + f[6] + f[7]) / os.sysconf("SC_CLK_TCK")


def own_seconds():
    """CPU seconds of this process and of its finished children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def repeat(label, unit, measure, repetitions=5, tries=3):
    """Print and return the median of ``measure()`` over undisturbed repetitions (of all, if none was undisturbed)."""
    kept, all_ = [], []
    while len(kept) < repetitions and len(all_) < repetitions * tries:
        busy, own, start = busy_seconds(), own_seconds(), time.perf_counter()
        value = measure()
        foreign = (busy_seconds() - busy - own_seconds() + own) / (time.perf_counter() - start)
        all_.append(value)
        if foreign < MAX_FOREIGN:
            kept.append(value)
    values = kept or all_
    median = statistics.median(values)
    note = "" if kept else "  DISTURBED"
    print(
        f"{label:44s} {median:9.1f} {unit}  (min {min(values):.1f}, max {max(values):.1f}, kept {len(kept)} of {len(all_)}){note}",
        flush=True,
    )
    return median

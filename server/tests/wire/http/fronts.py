"""Fronts of processes."""

import functools

from front import Front


@functools.cache
def front_of(process):
    """One front per process, so that its connections are used again."""
    return Front(process.url, process.api_key)

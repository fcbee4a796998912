"""Reads ranges of files into memory that is there already."""

from __future__ import annotations

from io import FileIO


def read_into(file: FileIO, start: int, window: memoryview) -> int:
    """Fill a window of host memory from a byte offset on; returns the bytes read, fewer only at the file's end.

    Not a memory map, whose pages would count as the process's own.   Raises OSError as reading does.
    """
    file.seek(start)
    done = 0
    # One system call may give less than was asked for.
    while done < len(window) and (count := file.readinto(window[done:])):
        done += count
    return done

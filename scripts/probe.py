#!/usr/bin/env python
"""`stlm probe`, without installation."""

from _command import start

if __name__ == "__main__":
    start("probe")

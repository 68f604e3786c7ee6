#!/usr/bin/env python
"""`stlm supervise`, without installation."""

from _command import start

if __name__ == "__main__":
    start("supervise")

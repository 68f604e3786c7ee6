#!/usr/bin/env python
"""`stlm doctor`, without installation."""

from _command import start

if __name__ == "__main__":
    start("doctor")

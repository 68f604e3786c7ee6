#!/usr/bin/env python
"""`stlm make_instructions`, without installation."""

from _command import start

if __name__ == "__main__":
    start("make_instructions")

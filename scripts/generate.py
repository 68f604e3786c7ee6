#!/usr/bin/env python
"""`stlm generate`, without installation."""

from _command import start

if __name__ == "__main__":
    start("generate")

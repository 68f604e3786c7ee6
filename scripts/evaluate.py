#!/usr/bin/env python
"""`stlm evaluate`, without installation."""

from _command import start

if __name__ == "__main__":
    start("evaluate")

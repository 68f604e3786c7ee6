#!/usr/bin/env python
"""`stlm describe`, without installation."""

from _command import start

if __name__ == "__main__":
    start("describe")

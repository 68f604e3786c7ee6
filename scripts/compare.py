#!/usr/bin/env python
"""`stlm compare`, without installation."""

from _command import start

if __name__ == "__main__":
    start("compare")

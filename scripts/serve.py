#!/usr/bin/env python
"""`stlm serve`, without installation."""

from _command import start

if __name__ == "__main__":
    start("serve")

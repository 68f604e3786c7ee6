"""The commands, one module each: `main(argv)` parses the options and calls one function of the library."""

"""The command line: `minillm COMMAND`, and the same commands as scripts.

It parses arguments, calls the libraries and prints.
"""

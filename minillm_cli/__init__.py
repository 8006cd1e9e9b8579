"""The command line: `minillm COMMAND`, and the same commands as scripts. It parses, calls, and prints."""

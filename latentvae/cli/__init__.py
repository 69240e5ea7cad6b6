"""The command line: one file per verb, loaded when it is called. Imports every room below.

In: arguments. Out: files, tables or one JSON object, and an exit code.
"""

"""Errors, files, threads, optional and lazy packages. Imports nothing of latentvae.

In: paths and bytes. Out: files that are whole, and errors that say what to do.
"""

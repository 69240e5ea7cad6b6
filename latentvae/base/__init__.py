"""Errors, files, threads, optional packages. Imports nothing of latentvae.

In: paths and bytes. Out: files that are whole, and errors that say what to do.
"""

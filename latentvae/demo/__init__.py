"""The demo: a page in the browser on which every capability is tried; the only importer of gradio.

`server.start` serves it, `page.build` lays it out, `limits` and `gate` keep it safe, and each tab has a file.
"""

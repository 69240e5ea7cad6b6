"""The page in the browser, one file per tab; the only room that imports gradio.

In: pictures of visitors. Out: pictures, figures, and files to take home.
"""

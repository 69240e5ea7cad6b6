"""The page in the browser, one file per tab; the only room that imports gradio.

May import every room but cli, which starts it. Read page.py first: it names the tabs.
In: pictures of visitors. Out: pictures, figures, and files to take home.
"""

from latentvae.base import lazy

__getattr__ = lazy.importer(__name__)

"""The report page: what an artifact is, how close, how fast and how large, on one HTML page that opens from a disk.

`gather.py` reads the folder (and, if asked, draws and times), `plots.py` draws, `build.py` writes the page and its
pictures. Equal inputs give equal bytes: there is no clock on the page, and a time is there only because it was measured.
"""

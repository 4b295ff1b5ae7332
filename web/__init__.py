"""The page on which a model is tried: `app.py`. It draws with the flags of `sample.py`."""

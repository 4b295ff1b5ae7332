"""Captioned pictures as they lie on disk: folders, tars, tables, the hub."""

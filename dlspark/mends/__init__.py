"""Defects of other projects, mended: one small file each, that names the defect and where it is known."""

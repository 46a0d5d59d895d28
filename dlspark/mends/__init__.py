"""Workarounds for defects of other projects. Each file describes one defect and where it is reported."""

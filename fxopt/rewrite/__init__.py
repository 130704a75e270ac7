"""Replacing subgraphs: fusions, the driver that applies them, plugins, verification."""

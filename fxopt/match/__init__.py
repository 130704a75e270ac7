"""Finding subgraphs: the pattern language, roles in a region, legality, and why something did not match."""

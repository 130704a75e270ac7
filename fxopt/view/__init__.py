"""What happened while a model was compiled, and why not: the recorder, the report and its forms."""

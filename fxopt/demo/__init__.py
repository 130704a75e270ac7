"""The main job, shown: a real model with real weights through eager mode, Inductor and fxopt, side by side.

    models     finding and loading a model: the two demo models, a directory, a GGUF file
    generate   greedy generation with a compiled prefill and a compiled one-token decode over a static KV cache
    embed      sentence embeddings, mean pooled and normalised
    compare    what two backends' results have in common and where they part

Nothing here prints; `fxopt.cli.demo` does.
"""

"""How long each of fxopt's own stages takes, by depth: retrace, canonicalise, match, rewrite, verify, place.

    python benchmarks/compile_stages.py --layers 2 8 32 128

A Llama with small random weights; the sizes don't matter to a compiler, the number of nodes does. Inductor's part is
left out. Each depth runs in a process of its own: "cold" with an empty verdict cache, "warm" with what cold left there.
Processor seconds, which on a busy machine are steadier than others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

STAGES = ["retrace", "canonicalise", "match", "rewrite", "verify", "place"]


def measure(layers: int, attention: str) -> dict[str, float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import fxopt
    import fxopt.backend

    time.perf_counter = time.process_time  # what the stages are timed by
    fxopt.backend.compile_graph = lambda module, inputs, options: module.forward
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=256, attn_implementation=attention)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 256, (1, 16))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    fxopt.fusions()  # loading the plugins is paid once a process, not a graph
    with torch.no_grad(), fxopt.record() as rec:
        start = time.perf_counter()
        torch.compile(model, backend="fxopt")(ids, attention_mask=mask)
        total = time.perf_counter() - start
    (graph,) = rec.graphs
    sites = {"attention": layers, "rms_norm": 2 * layers + 1, "gated_mlp": layers, "rotary": layers}
    assert rec.counts() == sites, rec.counts()
    return {stage: graph.seconds[stage] for stage in STAGES} | {"nodes": graph.nodes, "whole call": total}


def in_new_process(layers: int, attention: str, cache: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--one", str(layers), "--attention", attention]
    done = subprocess.run(
        command, env=os.environ | {"FXOPT_CACHE_DIR": cache}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, nargs="*", default=[2, 8, 32, 128])
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--one", type=int)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one, arguments.attention)))
        return
    print("| layers | cache | nodes | " + " | ".join(STAGES) + " | all but retrace | whole call |")
    print("|" + "---|" * (len(STAGES) + 5))
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory() as cache:
            os.chmod(cache, 0o700)
            for state in ("cold", "warm"):
                found = in_new_process(layers, arguments.attention, cache)
                own = sum(found[stage] for stage in STAGES[1:])
                cells = " | ".join(f"{found[stage]:.3f}" for stage in STAGES)
                print(
                    f"| {layers} | {state} | {found['nodes']} | {cells} | {own:.3f} | {found['whole call']:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

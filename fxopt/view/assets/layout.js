"use strict";
// Runs in a worker, behind dagre: sizes and edges in, positions out. Rows go down, in the direction of the data.
function arrange(job) {
  const g = new dagre.graphlib.Graph({ multigraph: false });
  g.setGraph({ rankdir: "TB", nodesep: 14, ranksep: 26, marginx: 10, marginy: 10, ranker: "tight-tree" });
  g.setDefaultEdgeLabel(() => ({}));
  job.sizes.forEach(([width, height], i) => g.setNode(String(i), { width, height }));
  job.edges.forEach(([from, to]) => g.setEdge(String(from), String(to)));
  dagre.layout(g);
  return {
    id: job.id,
    width: g.graph().width,
    height: g.graph().height,
    nodes: job.sizes.map((_, i) => [g.node(String(i)).x, g.node(String(i)).y]),
    edges: job.edges.map(([from, to]) => g.edge(String(from), String(to)).points.map((p) => [p.x, p.y])),
  };
}
self.onmessage = (event) => self.postMessage(arrange(event.data));

"use strict";
// The page's script. Everything that came from a model is put in as text (textContent), never as markup; nothing is
// fetched. Layouts are made by dagre in a worker; where a worker is not allowed, in rows by the script itself.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";

  function make(tag, attributes = {}, ...children) {
    const svg = ["svg", "g", "rect", "text", "path", "title", "marker", "defs"].includes(tag);
    const made = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "onclick") made.addEventListener("click", value);
      else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value);
    }
    for (const child of children.flat(Infinity)) if (child !== null && child !== undefined) made.append(child);
    return made;
  }
  const fill = (element, ...children) => element.replaceChildren(...children.flat(Infinity).filter((c) => c));
  const short = (source) => (source || "").replace(/^.*(?:site|dist)-packages\//, "");
  const many = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

  // -- the data, with columns turned into nodes ------------------------------------------------------------------

  function nodes(drawing) {
    const text = (column, i) => drawing.strings[drawing[column][i]];
    const made = drawing.names.map((name, i) => ({
      name, i, inputs: drawing.inputs[i], users: [],
      op: text("ops", i), value: text("values", i), module: text("modules", i), source: text("sources", i),
    }));
    for (const node of made) for (const source of node.inputs) made[source].users.push(node.i);
    return made;
  }

  const graphs = data.graphs.map((graph) => ({
    ...graph,
    parts: graph.parts.map((part) => {
      const before = nodes(part.before), after = nodes(part.after);
      const index = (list) => new Map(list.map((node) => [node.name, node.i]));
      return { ...part, before, after, inBefore: index(before), inAfter: index(after) };
    }),
  }));

  const items = []; // what can be selected on the left, in order
  const groups = []; // {title, runs: [{pattern, items}]}: what repeats from layer to layer is one run
  const alike = (item) => (item.kind === "miss" ? `${item.miss.reason} ${item.miss.source}` : item.label.replace(/\d+/g, "*"));
  function group(title, found, tone = "") {
    if (!found.length) return;
    const runs = new Map();
    for (const item of found) (runs.get(alike(item)) || runs.set(alike(item), []).get(alike(item))).push(item);
    groups.push({ title, tone, count: found.length, runs: [...runs.values()] });
    items.push(...[...runs.values()].flat());
  }
  const several = graphs.length > 1;
  const where = (graph, words) => (several ? `${graph.name}: ${words}` : words);
  const fused = new Map(), raised = [], undone = [], misses = [], passed = [];
  for (const graph of graphs) {
    graph.steps.forEach((step, i) => {
      const part = graph.parts.find((p) => p.steps[0] <= i && i < p.steps[1]);
      const site = step.applied && graph.sites.find((s) => (s.node ? step.made.includes(s.node) : s.fusion === step.fusion && s.module === step.module));
      const label = where(graph, step.module || short(step.sources[0]) || step.made.join(" "));
      const item = { kind: "step", graph, part, step, site, label, saving: part && part.savings[i] };
      if (site) (fused.get(step.fusion) || fused.set(step.fusion, []).get(step.fusion)).push(item);
      else if (step.applied || step.verdict.detail.includes("nothing fused the result")) raised.push(item);
      else undone.push({ ...item, bad: true });
    });
    graph.misses.forEach((miss) => {
      const part = graph.parts.find((p) => p.inBefore.has(miss.node));
      misses.push({ kind: "miss", graph, part, miss, label: where(graph, `${miss.fusion}: ${miss.reason}`) });
    });
    if (!graph.normalized) passed.push({ kind: "passed", graph, label: graph.name });
  }
  for (const [fusion, found] of [...fused].sort((a, b) => b[1].length - a[1].length)) group(fusion, found, "fused");
  group("Undone", undone, "bad");
  group("Near misses", misses, "missed");
  group("Passed through", passed, "missed");
  group("Applied on the way", raised);

  // -- layout ----------------------------------------------------------------------------------------------------

  let worker = null, jobs = 0;
  const waiting = new Map();
  try {
    const source = $("dagre").textContent + "\n" + $("layout").textContent;
    worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
    worker.onmessage = (event) => { waiting.get(event.data.id)?.[0](event.data); waiting.delete(event.data.id); };
    worker.onerror = () => { // not allowed here after all: what is waiting is laid out in rows
      worker = null;
      for (const [resolve, job] of waiting.values()) resolve(rows(job));
      waiting.clear();
    };
  } catch { worker = null; }

  function layout(sizes, edges) {
    const job = { id: ++jobs, sizes, edges };
    if (!worker) return Promise.resolve(rows(job));
    return new Promise((resolve) => { waiting.set(job.id, [resolve, job]); worker.postMessage(job); });
  }

  function rows({ sizes, edges }) { // each node one row below the lowest that it reads; edges run downwards
    const rank = sizes.map(() => 0);
    for (const [from, to] of [...edges].sort((a, b) => a[1] - b[1])) rank[to] = Math.max(rank[to], rank[from] + 1);
    const x = [], at = [];
    let width = 0;
    sizes.forEach(([w], i) => { const left = x[rank[i]] || 10; at[i] = [left + w / 2, rank[i] * 66 + 30]; x[rank[i]] = left + w + 14; width = Math.max(width, x[rank[i]]); });
    const points = edges.map(([from, to]) => [[at[from][0], at[from][1] + 20], [at[to][0], at[to][1] - 20]]);
    return { width, height: (Math.max(0, ...rank) + 1) * 66 + 10, nodes: at, edges: points };
  }

  function curve(points) { // through the middles of dagre's segments, so that it has no corners
    const at = ([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`;
    let path = `M${at(points[0])}`;
    for (let i = 1; i < points.length - 1; i++) {
      const [x, y] = points[i], next = points[i + 1], last = i === points.length - 2;
      path += `Q${at([x, y])} ${at(last ? next : [(x + next[0]) / 2, (y + next[1]) / 2])}`;
    }
    return points.length === 2 ? `${path}L${at(points[1])}` : path;
  }

  // boxes: [{title, note, name, classes, pick, stacked, hover}]; edges: [[from, to, class]]
  async function draw(canvas, boxes, edges) {
    const ticket = (canvas.ticket = (canvas.ticket || 0) + 1);
    if (!boxes.length) return fill(canvas, make("p", { class: "empty" }, "nothing to draw here"));
    const sizes = boxes.map((box) => [Math.max(box.title.length * 7.3, box.note.length * 6.4) + 22, box.note ? 42 : 28]);
    const found = await layout(sizes, edges.map(([from, to]) => [from, to]));
    if (canvas.ticket !== ticket) return null; // another selection came meanwhile
    const arrow = make("marker", { id: "arrow", viewBox: "0 0 6 6", refX: 5, refY: 3, markerWidth: 6, markerHeight: 6, orient: "auto" }, make("path", { d: "M0 0.4L6 3L0 5.6z" }));
    const paths = edges.map(([, , kind], i) => make("path", { class: `edge ${kind || ""}`, "marker-end": "url(#arrow)", d: curve(found.edges[i]) }));
    const shapes = boxes.map((box, i) => {
      const [w, h] = sizes[i], [x, y] = found.nodes[i];
      const shape = make("g", { class: `node ${box.classes}`, tabindex: 0, role: "button", "data-node": box.name, transform: `translate(${x} ${y})`, "aria-label": `${box.title} ${box.note}` },
        make("title", {}, box.hover || box.name), box.stacked ? [8, 4].map((d) => make("rect", { class: "behind", x: d - w / 2, y: d - h / 2, width: w, height: h })) : null,
        make("rect", { x: -w / 2, y: -h / 2, width: w, height: h }),
        make("text", { y: box.note ? -3 : 4 }, box.title), box.note ? make("text", { class: "small", y: 12 }, box.note) : null);
      const pick = () => { for (const other of canvas.querySelectorAll(".picked")) other.classList.remove("picked"); shape.classList.add("picked"); box.pick(); };
      shape.addEventListener("click", pick);
      shape.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); event.stopPropagation(); pick(); } });
      return shape;
    });
    const drawn = make("svg", { viewBox: `0 0 ${found.width} ${found.height}`, width: found.width, height: found.height, role: "group" }, make("defs", {}, arrow), paths, shapes);
    drawn.style.minWidth = `${SMALLEST * found.width}px`; // it shrinks with its pane while it can be read, and scrolls then
    fill(canvas, drawn);
    return found;
  }

  // -- the middle: one rewrite, before and after -----------------------------------------------------------------

  const SMALLEST = 0.62; // of full size: type that can still be read
  const MOST = 60; // nodes around a rewrite that are drawn; a value with hundreds of readers says no more than with some

  function around(list, seeds, classes, side, item) {
    const lit = new Set(seeds), shown = new Set(seeds);
    for (const i of seeds) for (const near of [...list[i].inputs, ...list[i].users]) if (shown.size < MOST + lit.size) shown.add(near);
    const order = [...shown].sort((a, b) => a - b), at = new Map(order.map((i, k) => [i, k]));
    const boxes = order.map((i) => box(list, list[i], lit.has(i) ? classes : "near", side, item));
    const edges = [];
    for (const i of order) for (const from of list[i].inputs) if (at.has(from) && (lit.has(i) || lit.has(from))) edges.push([at.get(from), at.get(i), lit.has(i) && lit.has(from) ? `lit ${classes}` : ""]);
    return [boxes, edges];
  }

  const elided = (words, most = 32) => (words.length > most ? `${words.slice(0, most / 4)}…${words.slice(1 - (3 * most) / 4)}` : words);

  // Overloads and the hashes of implementations are for the details; a weight's name is its last module's and its own.
  function title(node) {
    if (node.op !== "placeholder") return elided(node.op.includes(" ") ? node.op : node.op.replace(/\.[^.]*$/, ""));
    return elided(node.name.replace(/^l_|_$/g, "").split("_modules_").pop().replace(/_(?:parameters|buffers)_/, "."));
  }

  function box(list, node, classes, side, item) {
    return { title: title(node), note: elided(node.value, 40), name: node.name, hover: `${node.name}: ${node.op} ${node.value}`, classes, pick: () => showNode(list, node, side, item) };
  }

  function showPanes(...names) {
    $("panes").classList.remove("stacked");
    const panes = names.map(([name, note, tone]) => make("div", { class: "pane" }, make("h2", { class: tone }, name, note ? make("span", {}, note) : null), make("div", { class: "canvas" })));
    fill($("panes"), panes);
    return panes.map((pane) => pane.lastChild);
  }

  // Side by side or one above the other, whichever lets them be larger; what stays too large to be read scrolls.
  function arrange(left, right, before, after) {
    const panes = $("panes"), [w, h] = [panes.clientWidth - 60, panes.clientHeight - 60];
    if (w <= 0 || h <= 0) return;
    const beside = Math.min(w / (before.width + after.width), h / Math.max(before.height, after.height));
    const above = Math.min(w / Math.max(before.width, after.width), (h - 60) / (before.height + after.height));
    const stacked = above > beside && beside < 0.9, scale = Math.min(1, Math.max(SMALLEST, stacked ? above : beside));
    panes.classList.toggle("stacked", stacked);
    for (const [canvas, size] of [[left, before], [right, after]]) {
      canvas.parentElement.style.flexGrow = String(Math.round(stacked ? size.height * scale + 50 : Math.max(250, size.width)));
      if (canvas.firstChild.style) canvas.firstChild.style.width = `${scale * size.width}px`;
    }
  }

  async function drawItem(item) {
    const { part, step, miss } = item;
    if (!part) {
      const [canvas] = showPanes([item.graph.name]);
      fill(canvas, make("p", { class: "empty" }, item.kind === "passed" ? "This graph was compiled as Dynamo made it." : "The graph was not recorded: record it with fxopt.record() to see it here."));
      return;
    }
    if (miss) {
      const [canvas] = showPanes(["where it ended", "", "old"]);
      return draw(canvas, ...around(part.before, [miss.node, miss.anchor].map((n) => part.inBefore.get(n)).filter((i) => i !== undefined), "old", "before", item));
    }
    const old = step.replaced.map((n) => part.inBefore.get(n)).filter((i) => i !== undefined);
    const made = step.made.map((n) => part.inAfter.get(n)).filter((i) => i !== undefined);
    const [left, right] = showPanes(["before", many(old.length, "node"), "old"], ["after", many(made.length, "node"), "new"]);
    const first = draw(left, ...around(part.before, old, "old", "before", item));
    if (made.length) {
      const [before, after] = await Promise.all([first, draw(right, ...around(part.after, made, "new", "after", item))]);
      if (before && after && selected === item) arrange(left, right, before, after);
    } else fill(right, make("p", { class: "empty" }, step.applied ? "Another rewrite took what this one made." : "It was undone: the model has its own nodes back."));
  }

  // -- the right: what is known of it ----------------------------------------------------------------------------

  const h3 = (words) => make("h3", {}, words);
  const code = (words) => make("code", {}, words);
  const table = (pairs) => make("table", {}, pairs.filter(([, value]) => value).map(([key, value]) => make("tr", {}, make("td", {}, key), make("td", {}, value))));
  const link = (words, onclick) => make("button", { class: "link", onclick }, words);
  function amount(bytes) {
    for (const unit of ["B", "KiB", "MiB", "GiB"]) { if (Math.abs(bytes) < 1024) return `${+bytes.toPrecision(3)} ${unit}`; bytes /= 1024; }
    return `${+bytes.toPrecision(3)} TiB`;
  }

  const VERDICTS = { equal: "✓ checked", meta: "shapes checked", failed: "✗ failed", unchecked: "not checked" };
  function verdict(found) {
    const error = found.error === null ? null : make("span", { class: "soft" }, `${(+found.error).toPrecision(3)}× the original's own error, against float64`);
    return make("p", { class: "verdict" }, make("span", { class: `badge ${found.status}`, title: found.status }, error && found.status === "meta" ? "approximate" : VERDICTS[found.status] || found.status), " ", error);
  }

  function place(source) { // "file:line in function: code"
    const [, at, line] = short(source).match(/^(.*?:\d+(?: in [^:]*)?): (.*)$/s) || [null, "", short(source)];
    return make("figure", {}, at ? make("figcaption", {}, at) : null, make("pre", {}, line || "unknown"));
  }

  const maths = (words) => code(words.replace(/\*\*(\d+)/g, "^$1").replace(/\*/g, "·"));
  function traffic(saving) {
    const { example, example_before: was } = saving;
    const bar = (share, tone) => { const made = make("span", { class: `bar ${tone}` }); made.style.width = `${Math.max(1, 100 * share)}%`; return made; };
    const drawn = was > 0 && example !== null ? [
      make("div", { class: "bars" }, make("span", {}, "before"), make("span", {}, bar(1, "old")), make("b", {}, amount(was)), make("span", {}, "after"), make("span", {}, bar((was - example) / was, "new")), make("b", {}, amount(was - example))),
    ] : [];
    const same = saving.flops_before === saving.flops_after;
    return [h3("memory traffic"), drawn, make("p", { class: "small soft" }, maths(saving.bytes_before), " → ", maths(saving.bytes_after), " bytes"),
      h3("FLOPs"), make("p", { class: "small soft" }, maths(saving.flops_before), same ? ", as before" : [" → ", maths(saving.flops_after), " in the op's reference"])];
  }

  function dims(graph) {
    const known = Object.entries(graph.dims);
    return known.length ? [h3("dimensions"), table(known.map(([name, meaning]) => [name, meaning]))] : [];
  }

  function nodeRows(list, names, index, side, item) {
    return table(names.map((name) => {
      const node = list && list[index.get(name)];
      return [node ? node.op : "", node ? [link(name, () => showNode(list, node, side, item)), " ", make("span", { class: "soft" }, node.value)] : code(name)];
    }).map(([op, what]) => [op || " ", make("span", {}, what)]));
  }

  // -- source: each sheet is in the page once, under Report; what is shown of it elsewhere is a copy while it is shown

  const FOLDED = 14; // lines of a long sheet that are shown at first

  const LINE = 18.6; // its height, in CSS pixels
  const kernelAt = (pre) => Math.max(0, pre.textContent.split("\n").findIndex((line) => /^@triton\.jit/.test(line))) * LINE; // past imports and reference

  async function copy(button, words) {
    let done = false;
    const put = (event) => { event.clipboardData.setData("text/plain", words); event.preventDefault(); done = true; };
    document.addEventListener("copy", put);
    document.execCommand("copy"); // in a sandboxed frame the clipboard's own interface is not allowed
    document.removeEventListener("copy", put);
    if (!done) done = await (navigator.clipboard?.writeText(words).then(() => true, () => false));
    button.textContent = done ? "copied" : "not allowed here";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  }

  const copies = (pre) => make("button", { class: "chip", title: "copy this source", onclick: (event) => { event.preventDefault(); copy(event.currentTarget, pre.textContent); } }, "copy");

  function parts(id) { // of a sheet: language, title, note, and a copy of its source
    const [language, title, note] = ["i", "strong", "small"].map((tag) => $(id).querySelector(`summary ${tag}`).textContent);
    return { language, title, note, pre: $(id).querySelector("pre").cloneNode(true) };
  }

  function sheet(id, note, item) {
    const { language, title, note: size, pre } = parts(id), lines = pre.textContent.trimEnd().split("\n");
    const open = make("button", { class: "chip", title: "read it in the middle", onclick: () => read(id, item) }, "open");
    const more = make("button", { class: "more", onclick: () => { made.classList.remove("folded"); more.remove(); } }, `all ${lines.length} lines`);
    const long = lines.length > FOLDED + 4;
    const made = make("div", { class: `sheet${long ? " folded" : ""}` }, make("div", { class: "head" }, make("i", {}, language), make("strong", {}, title), open, copies(pre)),
      make("p", { class: "soft small" }, `${note} (${size})`), language === "Inductor" ? null : [pre, long ? more : null]); // of the whole graph: to be opened
    if (long) setTimeout(() => { pre.scrollTop = kernelAt(pre); }); // once it is in the page
    return made;
  }

  function read(id, item) { // a sheet in the place of the graphs
    const { title, note, pre } = parts(id);
    const [canvas] = showPanes([title, note, "new"]);
    canvas.classList.add("reading");
    fill(canvas, pre);
    canvas.scrollTop = kernelAt(pre);
    canvas.ticket = (canvas.ticket || 0) + 1;
    fill($("bar"), make("button", { class: "chip", onclick: () => select(item) }, "before and after", make("span", {}, "×")), copies(pre));
  }

  for (const found of document.querySelectorAll("#report .sheet")) found.querySelector("summary").append(copies(found.querySelector("pre")));

  function showStep(item) {
    const { graph, part, step, site, saving } = item;
    const near = misses.filter((m) => m.graph === graph && m.miss.fusion === step.fusion).slice(0, 8);
    fill($("details"),
      make("h2", {}, `${step.fusion} → ${step.op || step.made.join(" ")}`),
      make("p", { class: "soft" }, step.module || ""),
      verdict(step.verdict), step.verdict.detail ? make("p", { class: "soft small" }, step.verdict.detail) : null,
      site ? [h3("computed by"), make("p", {}, make("b", {}, site.implementation)), make("p", {}, site.computed), site.passed_over.map(([name, why]) => make("p", { class: "soft small" }, `not ${name}: ${why}`))] : null,
      saving ? traffic(saving) : null,
      h3("source"), step.sources.map(place),
      site && site.sheets.length ? [h3("generated code"), site.sheets.map(([id, note]) => sheet(id, note, item))] : null,
      site && site.arguments.length ? [h3("arguments at the first call"), make("pre", {}, site.arguments.join("\n"))] : null,
      h3(`${many(step.replaced.length, "node")} replaced`), nodeRows(part && part.before, step.replaced, part && part.inBefore, "before", item),
      h3("made"), nodeRows(part && part.after, step.made, part && part.inAfter, "after", item),
      h3("rule"), make("p", {}, code(short(step.rule))),
      table([...Object.entries(step.tags).map(([key, value]) => [key, String(value)]), ["time", `${(+step.microseconds / 1000).toFixed(2)} ms`]]),
      dims(graph),
      near.length ? [h3("near misses of this fusion"), near.map((m) => make("p", {}, link(m.miss.reason, () => select(m))))] : null);
  }

  function showMiss({ graph, miss }) {
    fill($("details"), make("h2", {}, `not fused: ${miss.fusion}`), make("p", { class: "why" }, miss.reason),
      miss.hint ? [h3("what would make it fuse"), make("p", { class: "hint" }, miss.hint)] : null,
      h3("at"), place(miss.source || "source line unknown"),
      table([["node", code(miss.node || "")], ["search began at", code(miss.anchor)], ["matched so far", `${many(miss.progress, "node")}${miss.share < 1 ? `, ${Math.round(100 * miss.share)} % of the pattern` : ""}`]]), dims(graph));
  }

  function showPassed({ graph }) {
    fill($("details"), make("h2", {}, graph.name), make("p", { class: "soft" }, "passed through untouched"),
      make("p", { class: "why" }, graph.reason || "no reason was given"), graph.notes.map((note) => make("p", { class: "soft" }, note)));
  }

  function showNode(list, node, side, item) {
    const rewrites = items.filter((other) => other.kind === "step" && other.part === (item.part || item) && other.step[side === "before" ? "replaced" : "made"].includes(node.name));
    const to = (i) => make("p", {}, link(list[i].name, () => showNode(list, list[i], side, item)), " ", make("span", { class: "soft" }, list[i].value));
    fill($("details"), make("h2", {}, title(node)), table([["op", code(node.op)], ["name", code(node.name)], ["value", code(node.value)], ["module", node.module]]),
      h3("source"), place(node.source),
      rewrites.length ? [h3(side === "before" ? "replaced by" : "made by"), rewrites.map((r) => make("p", {}, link(`${r.step.fusion}: ${r.label}`, () => { tab("rewrites"); select(r); })))] : null,
      node.inputs.length ? [h3("reads"), node.inputs.slice(0, 40).map(to)] : null, node.users.length ? [h3("read by"), node.users.slice(0, 40).map(to)] : null);
  }

  const show = { step: showStep, miss: showMiss, passed: showPassed };

  // -- the model: nodes collapsed by module, opened group by group -----------------------------------------------

  const model = { part: null, side: "before", open: new Set() };
  const OWN = ": its own ops";
  const prefixes = (path) => path.split(".").map((_, i, parts) => parts.slice(0, i + 1).join("."));

  // The outermost closed module around a node, or the node itself. Where an open module does much by itself, between
  // its submodules, that is one box too.
  function standsFor(node, open, own) {
    const closed = node.module && prefixes(node.module).find((path) => !open.has(path));
    if (closed) return closed;
    const group = `${node.module}${OWN}`;
    return own.get(node.module) > 8 && !open.has(group) ? group : null;
  }

  function visible(list, open) {
    const boxes = new Map(), own = new Map();
    const inner = list.filter((node) => node.op !== "placeholder" && node.op !== "output" && !node.op.startsWith("get_attr"));
    for (const node of inner) own.set(node.module, (own.get(node.module) || 0) + 1);
    for (const node of inner) {
      const path = standsFor(node, open, own), key = path === null ? `#${node.i}` : path;
      if (!boxes.has(key)) boxes.set(key, { path, members: [] });
      boxes.get(key).members.push(node);
    }
    return stacked(boxes, open);
  }

  // Closed neighbours in a list of layers that do the same, three or more, are one box: layers.1 … layers.31.
  function stacked(boxes, open) {
    const made = new Map();
    let run = [];
    const numbered = (path) => path && path.match(/^(.*\.)?(\d+)$/);
    const ops = (box) => (box.ops ??= box.members.map((node) => node.op).join());
    const end = () => {
      const [first, last] = [run[0], run.at(-1)], path = first && `${first.path} … ${last.path}`;
      if (run.length < 3 || open.has(path)) for (const box of run) made.set(box.path, box);
      else made.set(path, { path, members: run.flatMap((box) => box.members), times: run.length, paths: run.map((box) => box.path) });
      run = [];
    };
    for (const [key, box] of boxes) {
      const here = numbered(box.path), before = run.length ? numbered(run.at(-1).path) : null;
      const follows = here && before && here[1] === before[1] && +here[2] === +before[2] + 1 && ops(box) === ops(run[0]);
      if (!follows) end();
      if (here) run.push(box);
      else made.set(key, box);
    }
    end();
    return made;
  }

  function openAtFirst(list) { // from the outside in while the picture stays readable; of layers that repeat, the first
    let open = new Set();
    for (;;) {
      const closed = [...visible(list, open).values()].filter((box) => box.path !== null && !box.times && !box.path.endsWith(OWN) && box.members.length > 1);
      closed.sort((a, b) => b.members.length - a.members.length);
      const stack = [...visible(list, open).values()].find((box) => box.times);
      const path = stack && !closed.some((box) => prefixes(stack.paths[0]).includes(box.path)) && ![...open].some((p) => /(^|\.)\d+$/.test(p)) ? stack.paths[0] : closed[0]?.path;
      if (!path) return open;
      const next = new Set([...open, path]);
      if (visible(list, next).size > 60 || next.size > 3) return open;
      open = next;
    }
  }

  const FAN = 6; // a box that more than so many others read (rotary tables, masks) keeps one edge, and says how many

  function drawModel() {
    const { part, side, open } = model;
    const [canvas] = showPanes(["the whole model", side === "before" ? "as it was captured" : "as it is compiled", side === "before" ? "old" : "new"]);
    if (!part) return fill(canvas, make("p", { class: "empty" }, "No graph was recorded."));
    const list = part[side], seen = visible(list, open), keys = [...seen.keys()], at = new Map(), changed = new Set();
    const tone = side === "before" ? "old" : "new", done = side === "before" ? "replaced" : "made";
    items.filter((item) => item.kind === "step" && item.part === part && item.step.applied).forEach((item) => item.step[done].forEach((n) => changed.add(n)));
    keys.forEach((key, k) => seen.get(key).members.forEach((node) => at.set(node.i, k)));
    const targets = keys.map(() => new Set());
    for (const node of list) for (const from of node.inputs) {
      const a = at.get(from), b = at.get(node.i);
      if (a !== undefined && b !== undefined && a !== b) targets[a].add(b);
    }
    const boxes = keys.map((key, k) => {
      const { path, members, times, paths } = seen.get(key), lit = members.filter((node) => changed.has(node.name)).length;
      const far = targets[k].size > FAN ? `, read in ${targets[k].size} places` : "";
      if (path === null || members.length === 1) { const one = box(list, members[0], lit ? tone : "", side, part); return { ...one, note: one.note + far }; }
      const note = `${times ? `${times} alike, each ` : ""}${many(members.length / (times || 1), "node")}${lit ? `, ${Math.round(lit / (times || 1))} ${done}` : ""}${far}`;
      const words = times ? `${paths[0].split(".").slice(-2).join(".")} … ${paths.at(-1).split(".").pop()}` : path.split(".").slice(-2).join(".");
      return { title: elided(words), note, name: path, stacked: times, classes: `group ${lit ? tone : ""}`, pick: () => { open.add(path); drawModel(); } };
    });
    const edges = targets.flatMap((to, a) => [...to].slice(0, to.size > FAN ? 1 : to.size).map((b) => [a, b, ""]));
    const opened = [...open].sort();
    fill($("bar"), make("span", { class: "switch" }, ["before", "after"].map((name) => make("button", { "aria-pressed": String(name === side), onclick: () => { model.side = name; drawModel(); } }, name))),
      opened.length ? make("span", {}, "open") : null, opened.map((path) => make("button", { class: "chip", title: "close this module", onclick: () => { for (const p of [...open]) if (p === path || p.startsWith(path + ".") || p === path + OWN) open.delete(p); drawModel(); } }, elided(path, 40), make("span", {}, "×"))));
    return draw(canvas, boxes, edges);
  }

  // -- selecting -------------------------------------------------------------------------------------------------

  function changes({ step, saving }) {
    const saves = saving && saving.example > 0 ? `, ${amount(saving.example)} less to read and write` : "";
    return `${many(step.replaced.length, "node")} → ${step.made.length}${saves}`;
  }

  let selected = null;
  function select(item) {
    selected = item;
    for (const row of $("list").querySelectorAll(".row")) row.setAttribute("aria-selected", String(row.item === item));
    const row = [...$("list").querySelectorAll(".row")].find((r) => r.item === item);
    if (row) {
      for (let around = row.closest("details"); around; around = around.parentElement.closest("details")) around.open = true;
      row.scrollIntoView?.({ block: "nearest" });
    }
    fill($("bar"), make("span", {}, item.kind === "step" ? changes(item) : item.kind === "miss" ? item.miss.reason : item.label));
    show[item.kind](item);
    drawItem(item);
  }

  function tab(name) {
    for (const button of document.querySelectorAll("nav button")) button.setAttribute("aria-selected", String(button.id === `tab-${name}`));
    $("report").hidden = name !== "report";
    $("explorer").hidden = name === "report";
    if (name === "model") {
      model.part = selected?.part || graphs.flatMap((graph) => graph.parts)[0] || null;
      if (model.part && model.opened !== model.part) { model.open = openAtFirst(model.part.before); model.opened = model.part; }
      drawModel();
    } else if (name === "rewrites" && selected) select(selected);
    current = name;
  }
  let current = "rewrites";

  if (!items.length) {
    $("list").append(make("p", { class: "empty" }, "Nothing to step through"));
    fill($("details"), make("h2", {}, "Nothing was fused"), make("p", { class: "soft" }, "No fusion matched in these graphs, and none nearly did. ", code("fxopt passes"), " lists what is looked for."));
  }
  function told(item, run) { // what tells one of a run from the others: the layer
    if (item.kind === "miss") return item.miss.node;
    const parts = item.label.split("."), i = parts.findIndex((part, k) => run.some((other) => other.label.split(".")[k] !== part));
    return i < 0 ? item.step.made.join(" ") : parts.slice(Math.max(0, i - 1), i + 1).join(".");
  }
  const choose = (item) => { if (current !== "rewrites") tab("rewrites"); select(item); };
  function row(item, words) {
    const made = make("div", { class: item.bad ? "row bad" : "row", role: "option", "aria-selected": "false", title: item.label, onclick: () => choose(item) }, make("bdi", {}, words));
    made.item = item;
    return made;
  }
  for (const { title, tone, count, runs } of groups) {
    const n = (number) => make("span", { class: "n" }, String(number));
    const rows = runs.map((run) => run.length < 4 ? run.map((item) => row(item, item.label))
      : make("details", { class: "run" }, make("summary", { title: alike(run[0]) }, make("span", { class: "pattern" }, make("bdi", {}, run[0].kind === "miss" ? run[0].label : alike(run[0]))), n(run.length)), make("div", { class: "rows" }, run.map((item) => row(item, told(item, run))))));
    $("list").append(make("details", { class: `kind ${tone}`, open: tone !== "" || groups.length === 1 ? "" : null }, make("summary", {}, title, n(count)), rows));
  }
  const keys = [["↑ ↓", "step"], ["← →", "kind"], ["1 2 3", "tabs"], ["t", "theme"], ["Esc", "back"]];
  $("list").append(make("p", { class: "keys" }, keys.map(([key, what]) => make("span", {}, make("kbd", {}, key), ` ${what}`))));

  // A frame can't see the colours of the notebook around it: where it guesses wrong, the reader says.
  function theme() {
    const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = root.style.colorScheme || "light dark";
    root.style.colorScheme = now === "light dark" ? (dark ? "light" : "dark") : "light dark";
  }
  $("theme").addEventListener("click", theme);

  const run = (item) => groups.flatMap((g) => g.runs).findIndex((found) => found.includes(item));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
    const jump = { ArrowRight: 1, l: 1, ArrowLeft: -1, h: -1 }[event.key];
    const tabs = { 1: "rewrites", 2: "model", 3: "report" }[event.key];
    if (tabs) tab(tabs);
    else if (step && current === "rewrites" && items.length) { event.preventDefault(); select(items[Math.min(items.length - 1, Math.max(0, items.indexOf(selected) + step))]); }
    else if (jump && current === "rewrites" && items.length) {
      const runs = groups.flatMap((g) => g.runs);
      event.preventDefault();
      select(runs[Math.min(runs.length - 1, Math.max(0, run(selected) + jump))][0]);
    }
    else if (event.key === "t") theme();
    else if (event.key === "Escape" && selected && current === "rewrites") select(selected);
  });
  for (const name of ["rewrites", "model", "report"]) $(`tab-${name}`).addEventListener("click", () => tab(name));
  $("tabs").hidden = false;
  if (items.length) { tab("rewrites"); select(items[0]); } else tab(graphs.some((graph) => graph.parts.length) ? "model" : "report");
})();

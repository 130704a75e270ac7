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
  const groups = []; // [title, items, open]
  function group(title, found) {
    if (found.length) groups.push([title, found]);
    items.push(...found);
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
  for (const [fusion, found] of [...fused].sort((a, b) => b[1].length - a[1].length)) group(fusion, found);
  group("Undone", undone);
  group("Near misses", misses);
  group("Passed through", passed);
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

  // boxes: [{title, note, name, classes, pick}]; edges: [[from, to, lit]]
  async function draw(canvas, boxes, edges) {
    const ticket = (canvas.ticket = (canvas.ticket || 0) + 1);
    if (!boxes.length) return fill(canvas, make("p", { class: "empty" }, "nothing to draw here"));
    const sizes = boxes.map((box) => [Math.max(box.title.length * 7.3, box.note.length * 6.4) + 22, box.note ? 42 : 28]);
    const found = await layout(sizes, edges.map(([from, to]) => [from, to]));
    if (canvas.ticket !== ticket) return; // another selection came meanwhile
    const arrow = make("marker", { id: "arrow", viewBox: "0 0 6 6", refX: 5, refY: 3, markerWidth: 6, markerHeight: 6, orient: "auto" }, make("path", { d: "M0 0L6 3L0 6z" }));
    const paths = edges.map(([, , lit], i) => make("path", { class: lit ? "edge lit" : "edge", "marker-end": "url(#arrow)", d: "M" + found.edges[i].map((p) => p.map((c) => c.toFixed(1)).join(" ")).join("L") }));
    const shapes = boxes.map((box, i) => {
      const [w, h] = sizes[i], [x, y] = found.nodes[i];
      const shape = make("g", { class: `node ${box.classes}`, tabindex: 0, role: "button", "data-node": box.name, transform: `translate(${x} ${y})`, "aria-label": `${box.title} ${box.note}` },
        make("title", {}, box.name), make("rect", { x: -w / 2, y: -h / 2, width: w, height: h }),
        make("text", { y: box.note ? -3 : 4 }, box.title), box.note ? make("text", { class: "small", y: 12 }, box.note) : null);
      const pick = () => { for (const other of canvas.querySelectorAll(".picked")) other.classList.remove("picked"); shape.classList.add("picked"); box.pick(); };
      shape.addEventListener("click", pick);
      shape.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); event.stopPropagation(); pick(); } });
      return shape;
    });
    const room = (canvas.clientWidth || found.width) - 24, scale = Math.min(1, Math.max(0.55, room / found.width));
    fill(canvas, make("svg", { viewBox: `0 0 ${found.width} ${found.height}`, width: found.width * scale, height: found.height * scale, role: "group" }, make("defs", {}, arrow), paths, shapes));
  }

  // -- the middle: one rewrite, before and after -----------------------------------------------------------------

  const MOST = 60; // nodes around a rewrite that are drawn; a value with hundreds of readers says no more than with some

  function around(list, seeds, classes, side, item) {
    const lit = new Set(seeds), shown = new Set(seeds);
    for (const i of seeds) for (const near of [...list[i].inputs, ...list[i].users]) if (shown.size < MOST + lit.size) shown.add(near);
    const order = [...shown].sort((a, b) => a - b), at = new Map(order.map((i, k) => [i, k]));
    const boxes = order.map((i) => box(list, list[i], lit.has(i) ? classes : "near", side, item));
    const edges = [];
    for (const i of order) for (const from of list[i].inputs) if (at.has(from) && (lit.has(i) || lit.has(from))) edges.push([at.get(from), at.get(i), lit.has(i) && lit.has(from)]);
    return [boxes, edges];
  }

  function box(list, node, classes, side, item) {
    const weight = node.op === "placeholder";
    const title = weight ? node.name.replace(/^l_|_$/g, "").split("_modules_").pop().slice(-32) : node.op.replace(/\.(default|Tensor|int)$/, "");
    return { title, note: node.value, name: node.name, classes, pick: () => showNode(list, node, side, item) };
  }

  function showPanes(...names) {
    const panes = names.map((name) => make("div", { class: "pane" }, make("h2", {}, name), make("div", { class: "canvas" })));
    fill($("panes"), panes);
    return panes.map((pane) => pane.lastChild);
  }

  function drawItem(item) {
    const { part, step, miss } = item;
    if (!part) {
      const [canvas] = showPanes(item.graph.name);
      fill(canvas, make("p", { class: "empty" }, item.kind === "passed" ? "This graph was compiled as Dynamo made it." : "The graph was not recorded: record it with fxopt.record() to see it here."));
      return;
    }
    if (miss) {
      const [canvas] = showPanes("where it ended");
      return draw(canvas, ...around(part.before, [miss.node, miss.anchor].map((n) => part.inBefore.get(n)).filter((i) => i !== undefined), "old", "before", item));
    }
    const old = step.replaced.map((n) => part.inBefore.get(n)).filter((i) => i !== undefined);
    const made = step.made.map((n) => part.inAfter.get(n)).filter((i) => i !== undefined);
    const [left, right] = showPanes("before", "after");
    draw(left, ...around(part.before, old, "old", "before", item));
    if (made.length) draw(right, ...around(part.after, made, "new", "after", item));
    else fill(right, make("p", { class: "empty" }, step.applied ? "Another rewrite took what this one made." : "It was undone: the model has its own nodes back."));
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

  function verdict(found) {
    const error = found.error === null ? "" : `, error ${(+found.error).toPrecision(3)} times the original's own`;
    return make("p", { class: found.status }, `${found.status}${error}`);
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

  function showStep(item) {
    const { graph, part, step, site, saving } = item;
    const generated = site && graph.generated[`${site.op}, ${site.implementation}`];
    const near = misses.filter((m) => m.graph === graph && m.miss.fusion === step.fusion).slice(0, 8);
    fill($("details"),
      make("h2", {}, `${step.fusion} → ${step.op || step.made.join(" ")}`),
      make("p", { class: "soft" }, step.module || ""),
      verdict(step.verdict), step.verdict.detail ? make("p", { class: "soft" }, step.verdict.detail) : null,
      site ? [h3("computed by"), table([[site.implementation, "chosen"], ...site.passed_over.map(([name, why]) => [name, why])])] : null,
      saving ? [h3("memory traffic"), table([
        ["before", code(saving.bytes_before)], ["after", code(saving.bytes_after)], ["saved", code(saving.bytes_saved)],
        ["which is", saving.example === null ? null : amount(saving.example)]]), h3("FLOPs"), table([["before", code(saving.flops_before)], ["the op's reference", code(saving.flops_after)]])] : null,
      h3("source"), step.sources.map((source) => make("p", {}, code(short(source)))),
      h3(`${step.replaced.length} nodes replaced`), nodeRows(part && part.before, step.replaced, part && part.inBefore, "before", item),
      h3("made"), nodeRows(part && part.after, step.made, part && part.inAfter, "after", item),
      h3("rule"), make("p", {}, code(short(step.rule))),
      table([...Object.entries(step.tags).map(([key, value]) => [key, String(value)]), ["time", `${(+step.microseconds / 1000).toFixed(2)} ms`]]),
      dims(graph),
      generated ? [h3("code"), make("pre", {}, generated)] : null,
      near.length ? [h3("near misses of this fusion"), near.map((m) => make("p", {}, link(m.miss.reason, () => select(m))))] : null);
  }

  function showMiss({ graph, miss }) {
    fill($("details"), make("h2", {}, `not fused: ${miss.fusion}`), make("p", { class: "failed" }, miss.reason),
      h3("at"), make("p", {}, code(short(miss.source) || "source line unknown")),
      table([["node", code(miss.node || "")], ["search began at", code(miss.anchor)], ["matched so far", `${miss.progress} nodes`]]), dims(graph));
  }

  function showPassed({ graph }) {
    fill($("details"), make("h2", {}, graph.name), make("p", { class: "failed" }, "passed through untouched"),
      make("p", {}, graph.reason || "no reason was given"), graph.notes.map((note) => make("p", { class: "soft" }, note)));
  }

  function showNode(list, node, side, item) {
    const rewrites = items.filter((other) => other.kind === "step" && other.part === (item.part || item) && other.step[side === "before" ? "replaced" : "made"].includes(node.name));
    const to = (i) => make("p", {}, link(list[i].name, () => showNode(list, list[i], side, item)), " ", make("span", { class: "soft" }, list[i].value));
    fill($("details"), make("h2", {}, node.op), table([["name", code(node.name)], ["value", code(node.value)], ["module", node.module]]),
      h3("source"), make("p", {}, code(short(node.source) || "unknown")),
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
    return boxes;
  }

  function openAtFirst(list) { // groups are opened from the outside in while the picture stays readable
    let open = new Set();
    for (;;) {
      const closed = [...visible(list, open)].filter(([, box]) => box.path !== null && !box.path.endsWith(OWN) && box.members.length > 1);
      closed.sort((a, b) => b[1].members.length - a[1].members.length);
      if (!closed.length) return open;
      const next = new Set([...open, closed[0][0]]);
      if (visible(list, next).size > 60 || next.size > 3) return open;
      open = next;
    }
  }

  function drawModel() {
    const { part, side, open } = model;
    const [canvas] = showPanes(side);
    if (!part) return fill(canvas, make("p", { class: "empty" }, "No graph was recorded."));
    const list = part[side], seen = visible(list, open), keys = [...seen.keys()], at = new Map(), changed = new Set();
    items.filter((item) => item.kind === "step" && item.part === part && item.step.applied).forEach((item) => item.step[side === "before" ? "replaced" : "made"].forEach((n) => changed.add(n)));
    keys.forEach((key, k) => seen.get(key).members.forEach((node) => at.set(node.i, k)));
    const boxes = keys.map((key) => {
      const { path, members } = seen.get(key), lit = members.filter((node) => changed.has(node.name)).length;
      if (path === null || members.length === 1) return box(list, members[0], lit ? (side === "before" ? "old" : "new") : "", side, part);
      const note = `${members.length} nodes${lit ? `, ${lit} ${side === "before" ? "replaced" : "made"}` : ""}`;
      return { title: path.split(".").slice(-2).join("."), note, name: path, classes: lit ? "group changed" : "group", pick: () => { open.add(path); drawModel(); } };
    });
    const edges = new Map();
    for (const node of list) for (const from of node.inputs) {
      const a = at.get(from), b = at.get(node.i);
      if (a !== undefined && b !== undefined && a !== b) edges.set(`${a} ${b}`, [a, b, false]);
    }
    const opened = [...open].sort();
    fill($("bar"), ["before", "after"].map((name) => make("button", { "aria-pressed": String(name === side), onclick: () => { model.side = name; drawModel(); } }, name)),
      make("span", {}, "open:"), opened.map((path) => make("button", { title: "close this module", onclick: () => { for (const p of [...open]) if (p === path || p.startsWith(path + ".") || p === path + OWN) open.delete(p); drawModel(); } }, `${path} ✕`)));
    return draw(canvas, boxes, [...edges.values()]);
  }

  // -- selecting -------------------------------------------------------------------------------------------------

  function changes({ step, saving }) {
    const saves = saving && saving.example > 0 ? `, ${amount(saving.example)} less to read and write` : "";
    return `${step.replaced.length} nodes → ${step.made.length}${saves}`;
  }

  let selected = null;
  function select(item) {
    selected = item;
    for (const row of $("list").querySelectorAll(".row")) row.setAttribute("aria-selected", String(row.item === item));
    const row = [...$("list").querySelectorAll(".row")].find((r) => r.item === item);
    if (row) { row.closest("details").open = true; row.scrollIntoView?.({ block: "nearest" }); }
    fill($("bar"), make("span", {}, item.kind === "step" ? changes(item) : item.label));
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

  for (const [title, found] of groups) {
    const rows = found.map((item) => { const row = make("div", { class: item.bad ? "row bad" : "row", role: "option", "aria-selected": "false", title: item.label, onclick: () => { if (current !== "rewrites") tab("rewrites"); select(item); } }, item.label); row.item = item; return row; });
    $("list").append(make("details", { open: groups[0][0] === title ? "" : null }, make("summary", {}, title, make("span", { class: "n" }, String(found.length))), rows));
  }
  $("list").append(make("p", { class: "keys" }, make("kbd", {}, "↑"), " ", make("kbd", {}, "↓"), " step through   ", make("kbd", {}, "1"), make("kbd", {}, "2"), make("kbd", {}, "3"), " tabs   ", make("kbd", {}, "Esc"), " back"));

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
    const tabs = { 1: "rewrites", 2: "model", 3: "report" }[event.key];
    if (tabs) tab(tabs);
    else if (step && current === "rewrites" && items.length) { event.preventDefault(); select(items[Math.min(items.length - 1, Math.max(0, items.indexOf(selected) + step))]); }
    else if (event.key === "Escape" && selected) show[selected.kind](selected);
  });
  for (const name of ["rewrites", "model", "report"]) $(`tab-${name}`).addEventListener("click", () => tab(name));
  $("tabs").hidden = false;
  if (items.length) { tab("rewrites"); select(items[0]); } else tab(graphs.some((graph) => graph.parts.length) ? "model" : "report");
})();
